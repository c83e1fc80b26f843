"""Loading: what comes out, and what is remembered so that the next load is quick."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlcbuild
from mlcbuild.errors import RecipeError
from mlcbuild.recipes import load as load_module
from mlcbuild.recipes.files import Stock, stock
from mlcbuild.recipes.types import Weights
from tests.recipes.conftest import RECIPE, Workspace


def test_a_recipe_with_everything_looked_up(workspace: Workspace) -> None:
    workspace.write("r.yaml", RECIPE)
    catalog = workspace.load()
    recipe = catalog.recipes["r"]
    assert (recipe.name, recipe.origin) == ("r", "recipes/r.yaml")
    assert recipe.model is catalog.models["tiny"] and recipe.model.architecture is None
    assert recipe.quantization.weights == Weights(4, 32, "uint32", "NK", True)
    assert (recipe.quantization.kind, recipe.quantization.embedding) == ("q4", "quantized")
    assert recipe.target.device == {"kind": "llvm", "mcpu": "native"}
    assert (recipe.target.linker.kind, recipe.target.linker.target) == ("zig", "native")
    assert "-shared" in recipe.target.linker.flags
    assert recipe.template.data["roles"] == {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"}
    assert (recipe.overrides, recipe.verify) == ({}, recipe.model.verify)
    assert catalog.architectures["llama"].match == {"model_type": ("llama",)}


def test_an_unquantized_format(workspace: Workspace) -> None:
    quantization = workspace.load().quantizations["q0f32"]
    assert (quantization.weights, quantization.model_dtype, quantization.kind) == (None, "float32", "q0")


def test_a_number_is_what_it_was_written_as(workspace: Workspace) -> None:
    workspace.write("r.yaml", RECIPE + "verify: {kl: 5e-2}\noverrides: {max_batch_size: 1}\n")
    recipe = workspace.load().recipes["r"]
    assert recipe.verify.kl == 0.05
    assert type(recipe.overrides["max_batch_size"]) is int


def test_all_problems_are_in_the_error(workspace: Workspace) -> None:
    workspace.write("a.yaml", RECIPE.replace("tiny", "tny"))
    workspace.write("b.yaml", "")
    with pytest.raises(RecipeError) as error:
        workspace.load()
    assert error.value.problems == (
        "recipes/a.yaml:1:8: `model` is `tny`, expected a name of recipes/models/; did you mean `tiny`?",
        "recipes/b.yaml:1:1: the file is empty",
    )


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "cut", "flipped", b"\xff\xfe"])
def test_a_damaged_memo_is_no_memo(workspace: Workspace, tmp_path: Path, damage: str | bytes) -> None:
    workspace.write("r.yaml", RECIPE)
    memo = tmp_path / "memo.json"
    first = workspace.load(memo)
    good = memo.read_bytes()
    if damage == "cut":
        damage = good[:-20]
    elif damage == "flipped":
        damage = good.replace(b"q4f16_1", b"q4f32_1")
    memo.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert workspace.load(memo) == first
    assert memo.read_bytes() == good


def test_a_memo_is_of_one_set_of_schemas(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.write("r.yaml", RECIPE)
    memo = tmp_path / "memo.json"
    workspace.load(memo)
    stricter = tmp_path / "schema"
    shutil.copytree(workspace.stock.schema, stricter)
    schema = json.loads((stricter / "recipe.schema.json").read_text())
    schema["required"].append("verify")
    (stricter / "recipe.schema.json").write_text(json.dumps(schema))
    monkeypatch.setattr(load_module, "stock", lambda: Stock(workspace.stock.recipes, stricter))
    with pytest.raises(RecipeError, match="`verify` is missing"):
        workspace.load(memo)


def test_a_memo_forgets_what_is_gone_and_never_holds_a_mistake(workspace: Workspace, tmp_path: Path) -> None:
    memo = tmp_path / "folder" / "memo.json"
    workspace.write("r.yaml", RECIPE)
    workspace.load(memo)
    small = memo.stat().st_size
    extra = workspace.write("extra.yaml", RECIPE + "# more\n")
    workspace.load(memo)
    assert memo.stat().st_size > small
    extra.write_text("modle: x\n")
    for _ in range(2):
        with pytest.raises(RecipeError):
            workspace.load(memo)
    assert memo.stat().st_size == small


def test_a_memo_that_cannot_be_written_is_let_be(workspace: Workspace, tmp_path: Path) -> None:
    workspace.write("r.yaml", RECIPE)
    (tmp_path / "file").touch()
    assert list(workspace.load(tmp_path / "file" / "memo.json").recipes) == ["r"]


def test_with_a_memo_neither_parser_nor_validator_is_imported(tmp_path: Path) -> None:
    """On the path of a build that changes nothing each would cost more than all the rest."""
    package = Path(mlcbuild.__file__).parent
    copy = tmp_path / "copy"  # of the repository, so that what it lacks at the moment does not matter
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package / "recipes", copy / "mlcbuild" / "recipes", ignore=ignore)
    for name in ("__init__.py", "errors.py", "regular.py", "text.py"):
        shutil.copy(package / name, copy / "mlcbuild" / name)
    shutil.copytree(stock().schema, copy / "schema")
    shutil.copytree(stock().recipes, copy / "recipes", ignore=shutil.ignore_patterns("stories", "*.safetensors"))
    for model in (copy / "recipes" / "models").glob("*.yaml"):
        model.write_text("source: {path: .}\ntemplate: chatml\n")
    code = (
        "import sys; from pathlib import Path; from mlcbuild.recipes.load import load\n"
        "load(Path('.'), Path('memo.json'))\n"
        "print(*[name for name in ('yaml', 'jsonschema', 'referencing', 'tvm', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [run.split() for run in runs] == [["yaml"], []]  # what is right needs no validator
