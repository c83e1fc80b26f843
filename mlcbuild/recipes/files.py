"""Which YAML files there are, the workspace's and those that come with mlcbuild, of which kind and under which name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlcbuild
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.problems import Problem, did_you_mean
from mlcbuild.regular import nowhere

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

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NAME_RULE = "a name is letters, digits, `.`, `_` and `-`, starting with a letter or a digit"
LONGEST_NAME = 200  # characters: a file system takes 255 bytes, and steps' names have words and endings around these
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class File:
    kind: str
    name: str
    path: Path
    shown: str  # the path as problems give it
    stock: bool = False  # it came with mlcbuild


@dataclass(frozen=True)
class Stock:
    """The parts that come with mlcbuild: two folders of the installed package, or of the repository around it."""

    recipes: Path  # architectures, quantizations, targets, templates, models
    schema: Path


def stock() -> Stock:
    """Raises MlcBuildError when the installation is damaged."""
    package = Path(mlcbuild.__file__).resolve().parent
    # The wheel's own folder first: beside an installed package there may be a stranger's `schema` or `recipes`.
    for parent in (package / "stock", package.parent):
        found = Stock(parent / "recipes", parent / "schema")
        if (found.recipes / "architectures").is_dir() and (found.schema / "recipe.schema.json").is_file():
            return found
    raise MlcBuildError(f"{package}: the stock recipes are missing; install mlcbuild again")


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
        try:
            paths = _yaml_files(recipes / FOLDERS[kind])
        except OSError as error:
            problems.append(unreadable(shown(recipes / FOLDERS[kind], root), error))
            continue
        for path in paths:
            file = File(kind, path.stem, path, shown(path, root))
            if path.suffix not in _ENDINGS:
                text = f"rename the file: its name ends in `{path.suffix.lower()}`, in small letters"
            elif not NAME.fullmatch(file.name):
                text = f"rename the file: {NAME_RULE}"
            elif len(file.name) > LONGEST_NAME:
                text = f"rename the file: a name has at most {LONGEST_NAME} characters"
            elif file.name in taken:
                text = f"the name `{file.name}` is taken by {taken[file.name].shown}; rename or remove one of the two"
            else:
                taken[file.name] = file
                continue
            problems.append(Problem(file.shown, 1, 1, text))
        files += taken.values()
    return files, problems


def strays(recipes: Path, root: Path) -> Iterator[Problem]:
    """YAML files in folders that nothing reads: a mistyped folder would otherwise be passed over in silence."""
    known = [folder for folder in FOLDERS.values() if folder]
    for folder in sorted(entry for entry in recipes.iterdir() if entry.is_dir()):
        if folder.name in known or folder.name.startswith("."):
            continue
        try:
            paths = _yaml_files(folder)
        except OSError:  # it is as if it were not there
            continue
        for path in paths:
            hint = did_you_mean(folder.name, known) or f"; the folders are {', '.join(f'{name}/' for name in known)}"
            yield Problem(shown(path, root), 1, 1, f"nothing reads the folder {shown(folder, root)}/{hint}")


def unreadable(name: str, error: OSError) -> Problem:
    # An error of opening a file names it, one of reading does not.
    hint = nowhere(Path(error.filename)) if error.filename else ""
    return Problem(name, 1, 1, f"cannot be read: {error.strerror}{hint}")


def yaml_file(recipes: Path, kind: str, name: str) -> Path | None:
    """The file of a name in the folder `recipes`; None where there is none."""
    places = (recipes / FOLDERS[kind] / f"{name}{ending}" for ending in _ENDINGS)
    return next((path for path in places if name and path.is_file()), None)


def shown(path: Path, root: Path) -> str:
    """Relative to the workspace where it lies inside; what cannot be printed is escaped."""
    text = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file so that no reader ever sees half of it, whatever happens meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_new(path: Path, text: str) -> None:
    """Makes the file `path`, and the folders around it. Raises MlcBuildError, also where it is there already."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise MlcBuildError(f"{error.filename or path}: cannot be written: {error.strerror}") from None


def _yaml_files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in entries if each.name.lower().endswith(_ENDINGS) and not _is_folder(each)]
    except FileNotFoundError:
        if folder.is_symlink():  # to a folder that is gone: its files are missed, and not absent
            raise
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: reading it says so
        return False
