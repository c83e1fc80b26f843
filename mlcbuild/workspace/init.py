"""`mlcbuild init DIR`: a new workspace."""

from __future__ import annotations

from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.files import stock

_DODO = '''\
"""The tasks of this workspace: `doit list`, `doit build`, `doit build recipe=NAME`."""

from mlcbuild.tasks import *  # noqa: F403
'''

_RECIPE = """\
# yaml-language-server: $schema=../schema/recipe.schema.json
# `stories` is a model that comes with mlcbuild. Your own are files in recipes/models/.
model: stories
quantization: q4f16_1
target: cpu
"""

_GITIGNORE = """\
/cache/
/dist/
/.doit.db*
__pycache__/
"""

_README = """\
# A workspace of mlcbuild

    doit build                          # every recipe of recipes/ into dist/
    doit build recipe=stories-cpu       # one of them
    mlcbuild generate dist/stories-cpu --prompt "Once upon a time"
    mlcbuild check                      # what is wrong with the YAML files

`recipes/NAME.yaml` is one model x quantization x target; `recipes/matrix/` multiplies lists of them. Files of your own
in `recipes/models/`, `architectures/`, `quantizations/`, `targets/` and `templates/` join those that come with
mlcbuild, and take their place where the name is the same.

`schema/` is for your editor, which completes keys from it and explains them; mlcbuild checks against its own copy.
"""


def init(folder: Path) -> list[Path]:
    """Writes a workspace that builds the model that ships with mlcbuild, and returns the files.

    Raises MlcBuildError, and writes nothing, where one of the files is there already.
    """
    files = {
        folder / "dodo.py": _DODO,
        folder / "recipes" / "stories-cpu.yaml": _RECIPE,
        folder / ".gitignore": _GITIGNORE,
        folder / "README.md": _README,
    }
    for schema in sorted(stock().schema.glob("*.schema.json")):
        files[folder / "schema" / schema.name] = schema.read_text(encoding="utf-8")
    there = [path.relative_to(folder).as_posix() for path in files if path.exists() or path.is_symlink()]
    if there:
        raise MlcBuildError(f"{folder}: {', '.join(there)} already there; nothing was written, choose another folder")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise MlcBuildError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    return list(files)
