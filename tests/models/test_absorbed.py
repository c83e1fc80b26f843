"""Latent attention whose KV cache has latents: which models have that, what it takes, and the halves of kv_b_proj."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.compiler.abi.metadata import describe
from mlcbuild.errors import CheckpointError
from mlcbuild.inspect.sizes import size
from mlcbuild.merging.rearranged import rearranged
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from tests.checkpoints.files import write
from tests.models.test_odd_configs import DEEPSEEK
from tests.support.llama import QUANTIZATIONS, architecture

V3 = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
V3 |= {"num_key_value_heads": 128, "qk_nope_head_dim": 128, "v_head_dim": 128}
MINICPM3 = {"num_hidden_layers": 62, "num_attention_heads": 40, "kv_lora_rank": 256, "qk_rope_head_dim": 32}
MINICPM3 |= {"num_key_value_heads": 40, "qk_nope_head_dim": 64, "v_head_dim": 64}


def structure_of(decoder: dict[str, Any] | None = None, **changes: Any) -> Structure:
    known = architecture("deepseek_v3")
    data = {**known.data, "decoder": {**known.data["decoder"], **(decoder or {})}}
    return resolve(dataclasses.replace(known, data=data), {**DEEPSEEK, **changes}, {})


@pytest.mark.parametrize(
    ("changes", "heads", "whole", "latents"),
    [  # bytes of a token in 16 bits, with whole keys and values and with latents
        (V3, (256, 1, 288), 2 * 61 * 128 * 192 * 2, 61 * 576 * 2),
        (MINICPM3, (80, 1, 144), 2 * 62 * 40 * 96 * 2, 62 * 288 * 2),
    ],
    ids=["DeepSeek V3", "MiniCPM3 4B"],
)
def test_what_a_token_takes(changes: dict[str, Any], heads: tuple[int, int, int], whole: int, latents: int) -> None:
    made = structure_of(**changes)
    assert made.cache_heads == heads
    for structure, expected in ((made, latents), (structure_of({"whole_keys": True}, **changes), whole)):
        found = size(structure, QUANTIZATIONS["q4f16_1"])
        assert found.cache == expected * found.tokens
        told = describe(structure, "q4f16_1", ())["kv_cache"]  # by which runtimes and packages' lists compute it
        heads_and_width = told["num_key_value_heads"] * told["head_dim"]
        assert 2 * told["num_hidden_layers"] * heads_and_width * 2 == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_lora_rank": 600, "num_attention_heads": 64, "num_key_value_heads": 64},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
    ],
    ids=["too wide for kernels", "no fewer numbers"],
)
def test_other_models_have_whole_keys_and_values(changes: dict[str, Any]) -> None:
    made = structure_of(**changes)
    assert made.whole_keys and not made.absorbed and "kv_b_proj" in made.roles()
    assert made.cache_heads == (made.num_attention_heads, made.num_key_value_heads, made.head_dim)


def test_the_halves_of_kv_b_proj(tmp_path: Any) -> None:
    """w_uk [heads, kv_lora_rank, K] and w_uv [heads, V, kv_lora_rank], of rows that are each head's key and value."""
    structure = structure_of(num_hidden_layers=1)
    mine = [each for each in parameters(structure) if each.role.startswith("latent_")]
    assert [(each.name, each.shape) for each in mine] == [
        ("model.layers.0.self_attn.w_uk.weight", (4, 32, 24)),
        ("model.layers.0.self_attn.w_uv.weight", (4, 20, 32)),
    ]
    source = "model.layers.0.self_attn.kv_b_proj.weight"
    values = np.random.default_rng(0).standard_normal((4 * 44, 32)).astype(np.float32)
    path = write(tmp_path / "model.safetensors", {source: values})
    table = read_table({path.name: path}, {path.name: "digest"})
    keys, rest = (np.concatenate(list(each.pieces())) for each in rearranged(mine, table))
    x, latent = np.ones(24), np.arange(32) / 32
    for head, rows in enumerate(values.reshape(4, 44, 32).astype(np.float64)):
        np.testing.assert_allclose(latent @ (keys[head] @ x), (rows[:24] @ latent) @ x, rtol=1e-5)
        np.testing.assert_array_equal(rest[head], rows[24:].astype(np.float32))
    path = write(tmp_path / "model.safetensors", {source: values[:-1]})
    with pytest.raises(CheckpointError) as caught:
        index(mine, read_table({path.name: path}, {path.name: "digest"}))
    sentence = f"model.safetensors: tensor {source}: shape [175, 32], but config.json makes it [176, 32]"
    assert str(caught.value).splitlines() == [sentence] * 2
