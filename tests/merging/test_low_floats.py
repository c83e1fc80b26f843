"""Checkpoints of floats of 8 and 4 bits: the same package as from the floats that they stand for, by other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlcbuild.checkpoints.header import read_header
from mlcbuild.engine.job import local_job
from mlcbuild.errors import CheckpointError
from mlcbuild.merging import low_floats
from mlcbuild.merging.prequantized import Scheme
from mlcbuild.models import architecture
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import quantization_json
from mlcbuild.steps import convert, quantize
from tests.merging.test_prequantized import CONFIG, LINEAR
from tests.support import llama

STOCK = load(Path(__file__).parents[2]).quantizations
Tensors = Mapping[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "weight_block_size": [48, 32]}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
}


def made(folder: Path, tensors: Tensors, config: Mapping[str, Any], quantization: str = "q4f16_1") -> dict[str, bytes]:
    """Every file of the packed weights, by name."""
    (folder / "model").mkdir(parents=True)
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(config))
    resolved = architecture.resolve(llama.architecture(config["model_type"]), config, {"context_window_size": 64})
    fields = {"structure": resolved.to_json(), "quantization": quantization_json(STOCK[quantization])}
    job = local_job({"checkpoint": folder / "model"}, {"structure": resolved.to_json()}, folder / "convert")
    convert.run(job)
    packing = local_job({"convert": job.output, "checkpoint": folder / "model"}, fields, folder / "quantize")
    quantize.run(packing)
    return {path.name: path.read_bytes() for path in packing.output.iterdir()}


def plain() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (48, 128), "model.norm.weight": (128,), "lm_head.weight": (48, 128)}
    shapes |= {f"model.layers.0.{name}.weight": (128,) for name in ("input_layernorm", "post_attention_layernorm")}
    generator = torch.Generator().manual_seed(1)
    return {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["blocks", "blocks of powers of two", "rows", "one", "e5m2"])
def test_fp8(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    stored, meant = plain(), plain()
    dtype = torch.float8_e5m2 if kind == "e5m2" else torch.float8_e4m3fn
    for name, (n, k) in LINEAR.items():
        at = f"model.layers.0.{name}"
        words = (torch.randn((n, k), generator=generator) * 60).to(dtype)
        words[0, :8] = torch.tensor([0.0, -0.0, 2**-9, -3 * 2**-9, 2**-6, 448.0, -448.0, 1.0]).to(dtype)
        blocks = kind.startswith("blocks")
        shape = (-(-n // 48), -(-k // 32)) if blocks else (n, 1) if kind == "rows" else (1,)
        scale = torch.rand(shape, generator=generator) * 0.001 + 1e-5
        wide = scale.float()
        if kind == "blocks of powers of two":
            scale = scale.to(torch.float8_e8m0fnu)
            wide = scale.float()
        if kind == "rows":
            scale = scale.bfloat16()
            wide = scale.float()
        if blocks:
            wide = wide.repeat_interleave(48, 0)[:n].repeat_interleave(32, 1)[:, :k]
        meant[f"{at}.weight"] = words.float() * wide
        stored |= {f"{at}.weight": words, f"{at}.{'weight_scale_inv' if blocks else 'weight_scale'}": scale}
        stored[f"{at}.input_scale"] = torch.ones(1)
    config = {**CONFIG, "quantization_config": FP8 if kind != "rows" else CHANNELS}
    assert made(tmp_path / "stored", stored, config) == made(tmp_path / "meant", meant, CONFIG)
    notes = json.loads((tmp_path / "stored" / "convert" / "output" / "parameters.json").read_text())["notes"]
    assert notes == ["7 matrices that FP8 quantized to 8 bits are dequantized; what was lost then stays lost"]


def test_mxfp4_as_gpt_oss_has_it(tmp_path: Path) -> None:
    """The floats are those of transformers' own reader."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    config = AutoConfig.for_model(
        "gpt_oss", **sizes, num_key_value_heads=2, vocab_size=48, num_local_experts=3, num_experts_per_tok=2
    )
    meant = dict(AutoModelForCausalLM.from_config(config).bfloat16().state_dict())
    stored, generator = dict(meant), torch.Generator().manual_seed(3)
    for name in [name for name in meant if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = meant[name].shape
        words = torch.randint(0, 256, (experts, n, k // 32, 16), generator=generator, dtype=torch.uint8)
        powers = torch.randint(110, 127, (experts, n, k // 32), generator=generator, dtype=torch.uint8)
        meant[name] = _convert_moe_packed_tensors(words, powers, dtype=torch.bfloat16)
        del stored[name]
        stored |= {f"{name}_blocks": words, f"{name}_scales": powers}
    document = config.to_dict()
    packed = {**document, "quantization_config": {"quant_method": "mxfp4"}}
    assert made(tmp_path / "stored", stored, packed) == made(tmp_path / "meant", meant, document)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    def problem(folder: str, config: Mapping[str, Any], **tensors: torch.Tensor) -> str:
        every = {**plain(), **{f"model.layers.0.mlp.{name.replace('__', '.')}": each for name, each in tensors.items()}}
        with pytest.raises(CheckpointError) as error:
            made(tmp_path / folder, every, {**CONFIG, "quantization_config": config})
        return str(error.value)

    words = torch.ones((256, 128)).to(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.up_proj.weight"
    where = "model.safetensors: tensor "
    assert problem("1", FP8, up_proj__weight=words) == (
        f"{where}{name}: there is no {name}_scale_inv or {name}_scale beside it"
    )
    assert problem("2", FP8, up_proj__weight=words, up_proj__weight_scale_inv=torch.ones((2, 4))) == (
        f"{where}{name}_scale_inv: shape [2, 4], but [256, 128] of {name} want one scale, one for each row, or "
        "blocks of [48, 32]"
    )
    assert problem("3", FP8) == (
        "config.json says that the checkpoint was quantized by fp8, but it has no tensor of dtype F8_E4M3 or F8_E5M2"
    )
    integers = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert problem("4", integers) == (
        "config.json: quantization_config: compressed-tensors has 'pack-quantized': only floats of 8 bits, and "
        "whole numbers of up to 8, are read; use the model's unquantized checkpoint"
    )
    four = {"quant_method": "mxfp4"}
    assert problem("5", four, x_blocks=torch.zeros((2, 3, 1, 16), dtype=torch.uint8)) == (
        f"{where}model.layers.0.mlp.x_blocks: there is no model.layers.0.mlp.x_scales beside it"
    )


def test_a_number_that_is_none_is_damage(tmp_path: Path) -> None:
    tensors = plain()
    for name, shape in LINEAR.items():
        tensors[f"model.layers.0.{name}.weight"] = torch.ones(shape).to(torch.float8_e4m3fn)
        tensors[f"model.layers.0.{name}.weight_scale"] = torch.ones(())
    damage = r"up_proj\.weight: numbers that are none or infinite; it is damaged"
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=damage):
        made(tmp_path / "nan", tensors, {**CONFIG, "quantization_config": FP8})
    infinite = torch.ones(LINEAR["mlp.up_proj"])
    infinite[3, 4] = -np.inf
    tensors["model.layers.0.mlp.up_proj.weight"] = infinite.to(torch.float8_e5m2)
    with pytest.raises(CheckpointError, match=damage):
        made(tmp_path / "infinite", tensors, {**CONFIG, "quantization_config": FP8})


def test_a_power_of_mxfp4_that_is_none_is_damage(tmp_path: Path) -> None:
    """Also where all values of its block are 0."""
    path = tmp_path / "x.safetensors"
    scales = torch.tensor([[[127], [255]]], dtype=torch.uint8)
    save_file({"x_blocks": torch.zeros((1, 2, 1, 16), dtype=torch.uint8), "x_scales": scales}, path)
    table = {ref.name: ref for ref in read_header(path, path.name)}
    (found,) = low_floats.plan(table, Scheme("mxfp4", 4, 32, 0))[1]
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor x_scales: not finite; the checkpoint is"):
        list(found.pieces())
