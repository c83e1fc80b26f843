"""Where what lies in a cache folder is spelled once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mlcbuild
from mlcbuild.cache import layout

PACKAGE = Path(mlcbuild.__file__).parent
NAMES = {name for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
FOLDERS = "|".join(re.escape(getattr(layout, name)) for name in sorted(NAMES) if name != "BORROWED")
SPELLED = re.compile(rf"(?:{FOLDERS})|(?:.*/)?(?:{FOLDERS})/.*|\.at|.*\.at\b|run-.*")
# What is called the same and is something else: a command, its arguments, a word of a table.
OTHERS = {"cli/models.py": {"test-run"}, "cli/workspace.py": {"logs"}, "workspace/maintenance.py": {"pins"}}
OTHERS |= {f"compiler/gpu/{name}.py": {"partial"} for name in ("cuda_rows", "cuda_fused")}  # sums


def texts(path: Path) -> Iterator[str]:
    """The strings of a program, pieces of f-strings included, but not its docstrings."""
    tree = ast.parse(path.read_text())
    sentences = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in sentences:
            yield node.value


def test_no_other_module_spells_a_place_in_the_cache() -> None:
    spelled = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        found = {text for text in texts(path) if " " not in text and SPELLED.fullmatch(text)} - OTHERS.get(name, set())
        if found:
            spelled[name] = found
    assert set(spelled) == {"cache/layout.py"}


def test_entries_and_blobs_lie_in_folders_of_their_first_two_digits(tmp_path: Path) -> None:
    digest = f"{'ab' * 32}"
    assert layout.action_name(digest) == f"ac/ab/{digest}.json"
    assert layout.blob_name(digest) == f"cas/ab/{digest}"
    assert layout.borrowed_name(digest) == f"cas/ab/{digest}.at"
    entry = tmp_path / layout.action_name(digest)
    entry.parent.mkdir(parents=True)
    entry.touch()
    assert list(layout.action_files(tmp_path)) == [entry]
