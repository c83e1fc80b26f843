"""The reference is judged: what package and unquantized model share may be wrong on both sides (FAULTS.md A3)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlcbuild
from tests.end_to_end.workspace import Workspace, make_workspace

pytestmark = pytest.mark.slow

STORIES = Path(mlcbuild.__file__).parents[1] / "recipes" / "models" / "stories"
Tensors = dict[str, Any]


def no_rows(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"].zero_()


def layers_swapped(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".0.", ".5.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def rows_permuted(tensors: Tensors) -> None:
    """As a mapping for the other pairing of rope does it."""
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] = tensors[name].view(6, 2, 16, -1).transpose(1, 2).reshape(192, -1)


def one_layer_permuted(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].flip(0)


def another_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    tokens = {token["content"] for token in content["added_tokens"]}
    plain = [word for word in words if word not in tokens]
    ids = [content["model"]["vocab"][word] for word in plain]
    content["model"]["vocab"] |= dict(zip(plain, ids[1:] + ids[:1], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content))


def checkpoint(folder: Path, change: Callable[[Tensors], None] | None = None) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(STORIES, folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    return folder


def model(workspace: Workspace, name: str, folder: Path, verify: str) -> None:
    workspace.model(name, folder, f"verify: {{{verify}}}\n")
    workspace.recipe(name, "q0f32", name)


def test_a_reference_that_knows_nothing_lets_nothing_pass(
    tmp_path: Path, shared_cache: Path, tiny_checkpoint: Path
) -> None:
    workspace = make_workspace(tmp_path / "workspace", shared_cache, tiny_checkpoint)
    (workspace.root / "recipes/tiny-cpu.yaml").unlink()
    text = (STORIES / "evaluation.txt").read_text()
    workspace.write("recipes/models/text.txt", text[:4000])
    workspace.write("recipes/models/words.txt", "Once upon a time")
    for change in (no_rows, layers_swapped, rows_permuted):
        model(workspace, change.__name__, checkpoint(tmp_path / change.__name__, change), "text: text.txt")
    slightly = checkpoint(tmp_path / "slightly", one_layer_permuted)
    model(workspace, "bounded", slightly, "text: text.txt, perplexity: 4")
    another = checkpoint(tmp_path / "another")
    another_tokenizer(another)
    model(workspace, "another_tokenizer", another, "text: text.txt")
    model(workspace, "four_words", STORIES, "text: words.txt")
    model(workspace, "good", STORIES, "text: text.txt, perplexity: 4")
    said = workspace.doit("build", check=False).stdout
    assert {path.name for path in (workspace.root / "dist").iterdir() if path.is_dir()} == {"good"}
    for name in ("no_rows", "layers_swapped", "rows_permuted", "another_tokenizer", "bounded"):
        assert f"{name}-q0f32 does not pass verification: the unquantized model itself has a perplexity of" in said
    assert "which tensor is which" in said and "rope: theta" in said and "(another model's?)" in said
    assert "four_words-q0f32 does not pass verification: the evaluation text gave" in said
    assert "tokens to score, fewer than 256" in said
