"""Experts in a checkpoint, one by one or fused, in the steps convert and quantize: referred to, and packed alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.engine.job import Job, local_job
from mlcbuild.errors import CheckpointError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.structure import Structure
from mlcbuild.quantization.dequantize import unpack
from mlcbuild.quantization.tensor_cache import read_tensors
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import quantization_json
from mlcbuild.steps import convert, quantize
from tests.checkpoints.files import write
from tests.merging.test_prequantized import AWQ, codes
from tests.quantization.formulas import pack_awq
from tests.support.llama import Array, architecture

STOCK = load(Path(__file__).parents[2]).quantizations
EXPERTS = 3
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral as transformers saves it: `separate`, in the original form, and `fused`."""
    torch = pytest.importorskip("torch")
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixtral")
    model = MixtralForCausalLM(MixtralConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(folder / "separate")
    model.save_pretrained(folder / "fused", save_original_format=False)
    np.save(folder / "gate_up.npy", model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].float().numpy())
    return folder


def structure(folder: Path) -> Structure:
    return resolve(architecture("mixtral"), json.loads((folder / "config.json").read_text()), {})


def converted(checkpoint: Path, folder: Path, **others: Path) -> Job:
    fields = {"structure": structure(checkpoint).to_json()}
    job = local_job({"checkpoint": checkpoint, **others}, fields, folder / "convert")
    convert.run(job)
    return job


def quantized(job: Job, name: str, folder: Path) -> dict[str, Array]:
    fields = {"structure": job.fields["structure"], "quantization": quantization_json(STOCK[name])}
    made = local_job({"convert": job.output}, fields, folder / f"quantize-{name}")
    made.materials = {**job.materials, **made.materials}
    quantize.run(made)
    return dict(read_tensors(made.output))


def test_both_forms_are_referred_to_and_packed_alike(saved: Path, tmp_path: Path) -> None:
    jobs = {form: converted(saved / form, tmp_path / form) for form in ("separate", "fused")}
    for job in jobs.values():
        assert [path.name for path in job.output.iterdir()] == ["parameters.json"]  # nothing is copied
    for name in ("q0f32", "q4f16_1", "q4f16_0"):
        one, other = (quantized(job, name, tmp_path / form) for form, job in jobs.items())
        assert list(one) == list(other)
        assert all(np.array_equal(values, other[tensor]) for tensor, values in one.items())
        if name == "q0f32":
            assert np.array_equal(one["model.layers.1.moe.e1_e3.weight"], np.load(saved / "gate_up.npy"))
        else:
            assert one["model.layers.1.moe.e2.q_weight"].shape == (EXPERTS, 128, 32)
            assert one["model.layers.1.moe.e2.q_scale"].shape == (EXPERTS, 128, 8)
            assert one["model.layers.0.moe.gate.weight"].shape == (EXPERTS, 128)


def test_another_number_of_experts_than_the_config_says(saved: Path, tmp_path: Path) -> None:
    for form, text in (
        ("separate", r"tensor model.layers.0.block_sparse_moe.experts.3.w1.weight is missing from the checkpoint"),
        ("fused", r"gate_up_proj: shape \[3, 512, 128\], but config.json makes it \[4, 512, 128\]"),
    ):
        folder = tmp_path / form
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(saved / form / "model.safetensors")
        config = json.loads((saved / form / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 4}))
        with pytest.raises(CheckpointError, match=text):
            converted(folder, tmp_path / f"{form}-job")


def test_a_delta_is_added_expert_by_expert(saved: Path, tmp_path: Path) -> None:
    job = converted(saved / "separate", tmp_path, base=saved / "separate")
    twice = quantized(job, "q0f32", tmp_path)["model.layers.1.moe.e1_e3.weight"]
    assert np.array_equal(twice, 2 * np.load(saved / "gate_up.npy"))


def awq(folder: Path) -> dict[str, Array]:
    """A mixtral of one layer whose linear layers AutoAWQ has packed; the numbers they stand for, by name."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    weights: dict[str, Array] = {}
    norms = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    for name, shape in {
        **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (64, 128)),
        **dict.fromkeys([*norms, "model.norm.weight"], (128,)),
        "model.layers.0.block_sparse_moe.gate.weight": (EXPERTS, 128),
    }.items():
        tensors[name] = rng.standard_normal(shape).astype(np.float16)
    linear = {f"self_attn.{name}_proj": (rows, 128) for name, rows in (("q", 128), ("k", 64), ("v", 64), ("o", 128))}
    for expert in range(EXPERTS):
        at = f"block_sparse_moe.experts.{expert}"
        linear |= {f"{at}.w1": (256, 128), f"{at}.w3": (256, 128), f"{at}.w2": (128, 256)}
    for name, (n, k) in linear.items():
        q, z, scales = codes((k, n)), codes((k // 128, n)), rng.uniform(0.001, 0.02, (k // 128, n)).astype(np.float16)
        prefix = f"model.layers.0.{name}"
        tensors |= {f"{prefix}.qweight": pack_awq(q).view(np.int32), f"{prefix}.qzeros": pack_awq(z).view(np.int32)}
        tensors[f"{prefix}.scales"] = scales
        weights[name] = ((q - z.repeat(128, 0)).astype(np.float16) * scales.repeat(128, 0)).T
    folder.mkdir()
    write(folder / "model.safetensors", tensors)
    config = {
        "model_type": "mixtral",
        **CONFIG,
        "num_hidden_layers": 1,
        "quantization_config": AWQ,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def test_experts_that_autoawq_packed(tmp_path: Path) -> None:
    weights = awq(tmp_path / "checkpoint")
    job = converted(tmp_path / "checkpoint", tmp_path)
    gate_up = [[weights[f"block_sparse_moe.experts.{e}.{name}"] for name in ("w1", "w3")] for e in range(EXPERTS)]
    expected = np.stack([np.concatenate(pair) for pair in gate_up])
    assert np.array_equal(quantized(job, "q0f16", tmp_path)["model.layers.0.moe.e1_e3.weight"], expected)
    packed = quantized(job, "q4f16_autoawq", tmp_path)
    name = "model.layers.0.moe.e1_e3"
    assert packed[f"{name}.qweight"].shape == (EXPERTS, 128, 64) and packed[f"{name}.scales"].shape == (EXPERTS, 1, 512)
    weights_of = STOCK["q4f16_autoawq"].weights
    assert weights_of is not None
    tensors = {part: packed[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
    assert np.array_equal(unpack(tensors, (EXPERTS, 512, 128), weights_of, "float16"), expected.astype(np.float32))
