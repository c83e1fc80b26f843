"""Imports run one way, as docs/design.md says; what a build without work imports is light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlcbuild
from tests.docs.pages import DOCS, blocks, code, table

PACKAGE = Path(mlcbuild.__file__).parent
PAGE = (DOCS / "design.md").read_text()
SOURCES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
SOURCES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}
HEAVY = {"jsonschema", "numpy", "rich", "safetensors", "tokenizers", "torch", "transformers", "tvm", "tvm_ffi", "yaml"}


def unit(module: str) -> str:
    """The row of the table that a module belongs to: `compiler` for mlcbuild.compiler.cpu.rows."""
    parts = module.split(".")[1:]
    return "recipes.types" if parts[:2] == ["recipes", "types"] else parts[0] if parts else "errors"


def imported(tree: ast.AST, inside_functions: bool = True, for_types: bool = False) -> Iterator[str]:
    """Names of modules that a program imports; with `from a import b` both `a` and `a.b`, whichever exists.

    `for_types`: also what mypy alone imports.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        # TYPE_CHECKING is for mypy; nothing is imported when the program runs.
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if (inside_functions or not function) and (for_types or not checking):
            waiting += ast.iter_child_nodes(node)


def ours(names: Iterator[str]) -> set[str]:
    """Those of our modules, each as itself and not as the package it lies in."""
    found = {name for name in names if name in SOURCES}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)} - {"mlcbuild"}


def actual() -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for name, path in SOURCES.items():
        if name == "mlcbuild":
            continue
        reached = {unit(module) for module in ours(imported(ast.parse(path.read_text())))}
        edges.setdefault(unit(name), set()).update(reached - {unit(name)})
    return edges


def order() -> list[set[str]]:
    (listed,) = [block.text for block in blocks(PAGE) if block.info == ("text", "order")]
    return [set(line.split()) for line in listed.splitlines()]


def allowed() -> dict[str, set[str]]:
    """What each package may import, by the table; `errors`, which has no row, may import nothing."""
    rows = table(PAGE, "package", "may import", "what it does")
    return {"errors": set(), **{code(row[0])[0]: set(code(row[1])) for row in rows}}


def test_the_table_goes_down_the_list() -> None:
    levels = {name: level for level, names in enumerate(order()) for name in names}
    assert set(levels) == set(allowed())
    wrong = {f"{a} -> {b}" for a, reached in allowed().items() for b in reached if levels[a] >= levels[b]}
    assert not wrong, "an import upwards, or between packages on one line of the list"


def test_everything_imports_only_what_the_table_allows() -> None:
    rules = allowed()
    assert set(actual()) == set(rules), "docs/design.md names every package, and no other"
    wrong = {f"{a} -> {b}" for a, reached in actual().items() for b in reached if b not in rules[a]}
    assert not wrong, "import it another way, or change the table of docs/design.md and say why"


@pytest.mark.parametrize("package", sorted({unit(name) for name in SOURCES}))
def test_no_module_needs_itself(package: str) -> None:
    """Inside a package, too, imports run one way, those for types included: a module is read after what it needs."""
    mine = {name for name in SOURCES if unit(name) == package and name != "mlcbuild"}
    needs = {
        name: ours(imported(ast.parse(SOURCES[name].read_text()), for_types=True)) & mine - {name} for name in mine
    }
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_below_the_graph_only_the_types_of_recipes_are_known() -> None:
    edges = actual()
    commands = {"cli", "tasks", "doit_face"}
    above = {*commands, "inspect", "smoke", "workspace", "planning", "recipes"}
    assert {name for name, reached in edges.items() if "recipes" in reached} <= above


def test_what_is_needed_only_where_something_has_changed_is_not_imported_before() -> None:
    """Reading `dodo.py` is most of a build with nothing to do: planning and running would double it."""
    seen: set[str] = set()
    waiting = ["mlcbuild.tasks"]
    while waiting:
        name = waiting.pop()
        if name in SOURCES and name not in seen:
            seen.add(name)
            waiting += imported(ast.parse(SOURCES[name].read_text()), inside_functions=False)
    assert {"mlcbuild.workspace.fastpath", "mlcbuild.doit_face.reporter"} <= seen
    later = {
        "planning.planner",
        "workspace.session",
        "engine.builder",
        "workspace.estimate",
        "cache.store",
        "models.structure",
    }
    later |= {"doit_face.run", "reporting.html", "reporting.history", "cache.gc", "compiler.tools"}
    names = {f"mlcbuild.{name}" for name in later}
    assert names <= SOURCES.keys() and not names & seen


@pytest.mark.parametrize("start", ["mlcbuild.cli.main", "mlcbuild.tasks"])
def test_nothing_heavy_is_imported_before_it_is_needed(start: str) -> None:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in SOURCES:
            continue
        seen.add(name)
        names = set(imported(ast.parse(SOURCES[name].read_text()), inside_functions=False))
        heavy = {module.partition(".")[0] for module in names} & HEAVY
        assert not heavy, f"{name} imports {sorted(heavy)} when it is imported itself: import it in the function"
        waiting += names
        waiting += [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]


def test_tvm_without_torch_is_tvm_without_torch() -> None:
    """tvm_ffi imports torch where it is installed, as here; what compiles and runs models does not."""
    program = """
import sys, importlib.util
assert importlib.util.find_spec("torch") is not None
from mlcbuild.engine.child import without_torch
without_torch()
import tvm
print([name for name in sys.modules if name.startswith("torch.")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr[-500:]) == ("[]\n", "")
