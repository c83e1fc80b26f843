"""Which files a workspace has, of which kind, under which name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.problems import Problem, did_you_mean

FOLDERS = {
    "recipe": "",
    "matrix": "matrix",
    "model": "models",
    "architecture": "architectures",
    "quantization": "quantizations",
    "target": "targets",
    "template": "templates",
}
STOCK_KINDS = ("model", "architecture", "quantization", "target", "template")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME_WORDS = "letters, digits, `.`, `_` and `-`, starting with a letter or a digit"
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class File:
    kind: str
    name: str
    path: Path
    shown: str  # the path as problems give it
    stock: bool = False  # it came with mlcbuild


def find_root(start: Path) -> Path:
    """The nearest folder at or above `start` with `dodo.py` and `recipes/`. Raises MlcBuildError."""
    for folder in (start, *start.parents):
        if (folder / "dodo.py").is_file() and (folder / "recipes").is_dir():
            return folder
    raise MlcBuildError(
        f"{start}: not inside a workspace (a folder with `dodo.py` and `recipes/`); `mlcbuild init DIR` makes one"
    )


def discover(recipes: Path, root: Path, kinds: Iterable[str]) -> tuple[list[File], list[Problem]]:
    """The YAML files of the folder `recipes`, sorted, and what is wrong with their names and places."""
    files: list[File] = []
    problems: list[Problem] = []
    for kind in kinds:
        taken: dict[str, File] = {}
        for path in _yaml_files(recipes / FOLDERS[kind]):
            file = File(kind, path.stem, path, shown(path, root))
            if not _NAME.fullmatch(file.name):
                text = f"rename the file: a name is {_NAME_WORDS}"
                problems.append(Problem(file.shown, 1, 1, text))
            elif file.name in taken:
                text = f"the name `{file.name}` is taken by {taken[file.name].shown}; rename or remove one of the two"
                problems.append(Problem(file.shown, 1, 1, text))
            else:
                taken[file.name] = file
        files += taken.values()
    return files, problems


def strays(recipes: Path, root: Path) -> Iterator[Problem]:
    """YAML files in folders that nothing reads: a mistyped folder would otherwise be passed over in silence."""
    known = [folder for folder in FOLDERS.values() if folder]
    for folder in sorted(entry for entry in recipes.iterdir() if entry.is_dir()):
        if folder.name in known or folder.name.startswith("."):
            continue
        for path in _yaml_files(folder):
            hint = did_you_mean(folder.name, known) or f"; the folders are {', '.join(f'{name}/' for name in known)}"
            yield Problem(shown(path, root), 1, 1, f"nothing reads the folder {shown(folder, root)}/{hint}")


def shown(path: Path, root: Path) -> str:
    """Relative to the workspace where it lies inside; what cannot be printed is escaped."""
    text = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _yaml_files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(_ENDINGS) and not entry.is_dir()]
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]
