"""`mlcbuild init DIR`: a new workspace, with what lies in the folder `new`."""

from __future__ import annotations

from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.files import stock, write_new

_NEW = Path(__file__).with_name("new")
_NAMES = {
    "dodo.py": "dodo.txt",
    "recipes/stories-cpu.yaml": "recipe.yaml",
    ".gitignore": "gitignore.txt",
    "README.md": "README.md",
    ".vscode/settings.json": "editor.json",
}


def init(folder: Path) -> list[Path]:
    """Writes a workspace that builds the model that ships with mlcbuild, and returns the files.

    Raises MlcBuildError, and writes nothing, where one of the files is there already.
    """
    files = {folder / name: _NEW / source for name, source in _NAMES.items()}
    files |= {folder / "schema" / schema.name: schema for schema in sorted(stock().schema.glob("*.schema.json"))}
    there = [path.relative_to(folder).as_posix() for path in files if path.exists() or path.is_symlink()]
    if there:
        raise MlcBuildError(f"{folder}: {', '.join(there)} already there; nothing was written, choose another folder")
    for path, source in files.items():
        write_new(path, source.read_text(encoding="utf-8"))
    return list(files)
