"""`mlcbuild init DIR`."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.files import find_root, stock
from mlcbuild.recipes.load import read
from mlcbuild.workspace.init import init


def test_a_new_workspace(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "workspace"
    written = {path.relative_to(folder).as_posix() for path in init(folder)}
    assert {"dodo.py", ".gitignore", "README.md", "recipes/stories-cpu.yaml", "schema/recipe.schema.json"} <= written
    assert find_root(folder / "recipes") == folder
    reading = read(folder)
    assert [problem for problem in reading.problems if problem.file.startswith("recipes/")] == []
    assert (reading.counts["recipe"], reading.counts["matrix"], reading.warnings) == (1, 0, ())
    assert (folder / "recipes" / "stories-cpu.yaml").read_text().splitlines()[2:] == [
        line for line in (stock().recipes / "stories-cpu.yaml").read_text().splitlines() if not line.startswith("#")
    ]
    compile((folder / "dodo.py").read_text(), "dodo.py", "exec")


def test_an_editor_finds_the_schema_of_each_file(tmp_path: Path) -> None:
    """By globs, as yaml-language-server reads them; each names the schema that the stock files name themselves."""
    init(tmp_path)
    settings = json.loads((tmp_path / ".vscode" / "settings.json").read_text())["yaml.schemas"]
    assert all((tmp_path / schema).is_file() for schema in settings)
    files = list(stock().recipes.rglob("*.yaml"))
    for file in files:
        place = PurePath("recipes", file.relative_to(stock().recipes))
        found = [
            schema
            for schema, glob in settings.items()
            if len(PurePath(glob).parts) == len(place.parts) and place.match(glob)
        ]
        named = re.match(r"# yaml-language-server: \$schema=(\S+)", file.read_text())
        assert named and [PurePath(schema).name for schema in found] == [PurePath(named[1]).name], file
    assert len(files) > 100


def test_files_that_are_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "dodo.py").write_text("mine")
    (tmp_path / "recipes" / "stories-cpu.yaml").symlink_to("nowhere")
    with pytest.raises(MlcBuildError) as error:
        init(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: dodo.py, recipes/stories-cpu.yaml already there; nothing was written, choose another folder"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dodo.py", "recipes"]
    assert (tmp_path / "dodo.py").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MlcBuildError, match=r"cannot be written: Not a directory$"):
        init(tmp_path / "file" / "workspace")
