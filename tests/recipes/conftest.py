"""A workspace in a temporary folder, beside a small stock: the real quantizations and targets, and one model `tiny`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlcbuild.recipes import load
from mlcbuild.recipes.files import Stock, stock
from mlcbuild.recipes.load import read
from mlcbuild.recipes.types import Catalog

RECIPE = "model: tiny\nquantization: q4f16_1\ntarget: cpu\n"


@dataclass(frozen=True)
class Workspace:
    root: Path
    stock: Stock

    def write(self, name: str, text: str | bytes = "") -> Path:
        """Writes a file of the folder recipes/."""
        path = self.root / "recipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def problems(self) -> list[str]:
        return [str(problem) for problem in read(self.root).problems]

    def problem(self, name: str, text: str | bytes) -> str:
        """The one problem of a workspace in which the file `name` has this text, without the file's name."""
        self.write(name, text)
        problems = self.problems()
        assert len(problems) == 1, problems
        return problems[0].removeprefix(f"recipes/{name}:")

    def load(self, memo: Path | None = None) -> Catalog:
        return load.load(self.root, memo)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    real = stock()
    recipes = tmp_path / "stock" / "recipes"
    for folder in ("architectures", "quantizations", "targets", "templates"):
        shutil.copytree(real.recipes / folder, recipes / folder)
    (recipes / "models" / "tiny").mkdir(parents=True)
    (recipes / "models" / "tiny.yaml").write_text("source: {path: tiny}\ntemplate: chatml\n")
    small = Stock(recipes, real.schema)
    monkeypatch.setattr(load, "stock", lambda: small)
    root = tmp_path / "workspace"
    (root / "recipes").mkdir(parents=True)
    return Workspace(root, small)
