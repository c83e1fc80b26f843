"""Checkpoints that AutoAWQ or GPTQ packed: their numbers, their words as MLC takes them, and what is wrong with them.

The words are packed here from codes, and the numbers worked out from the same codes, by the tools' own definitions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from mlcbuild.checkpoints import computed
from mlcbuild.engine.job import Job, local_job
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.merging import prequantized
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import group
from mlcbuild.quantization.awq import dequantize_awq
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.quantization.tensor_cache import read_tensors
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Quantization, quantization_json
from mlcbuild.smoke.checkpoint import make
from mlcbuild.steps import convert, quantize
from tests.checkpoints.files import write
from tests.checkpoints.test_convert_and_quantize import structure
from tests.models.test_odd_configs import DEEPSEEK
from tests.quantization.formulas import pack_awq
from tests.support import llama

Array = npt.NDArray[Any]
STOCK = load(Path(__file__).parents[2]).quantizations
CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
LINEAR = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
RNG = np.random.default_rng(4)


def plain() -> dict[str, Array]:
    made = {"model.embed_tokens.weight": (48, 128), "model.norm.weight": (128,), "lm_head.weight": (48, 128)}
    made |= {f"model.layers.0.{name}.weight": (128,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: (RNG.standard_normal(shape) * 0.05).astype(np.float16) for name, shape in made.items()}


def codes(shape: tuple[int, ...], bits: int = 4) -> npt.NDArray[np.int64]:
    return RNG.integers(0, 2**bits, shape)


def awq(group_size: int = 128) -> tuple[dict[str, Array], dict[str, Array]]:
    """The checkpoint's tensors, and the weights [N, K] that they stand for, by name."""
    tensors, weights = plain(), {}
    for name, (n, k) in LINEAR.items():
        q, z = codes((k, n)), codes((k // group_size, n))
        scales = RNG.uniform(0.001, 0.02, (k // group_size, n)).astype(np.float16)
        prefix = f"model.layers.0.{name}"
        tensors |= {f"{prefix}.qweight": pack_awq(q).view(np.int32), f"{prefix}.qzeros": pack_awq(z).view(np.int32)}
        tensors[f"{prefix}.scales"] = scales
        w = np.empty((n, k), np.float16)
        for column in range(k):
            g = column // group_size
            w[:, column] = (q[column] - z[g]).astype(np.float16) * scales[g]
        weights[f"{prefix}.weight"] = w
    return tensors, weights


def pack_along_rows(values: npt.NDArray[np.int64], bits: int) -> Array:
    """[r, c] as [r * bits / 32, c] int32: neighbours in a column, the first lowest."""
    per_word = 32 // bits
    words = np.zeros((len(values) // per_word, values.shape[1]), np.uint32)
    for position in range(per_word):
        words |= values[position::per_word].astype(np.uint32) << np.uint32(position * bits)
    return words.view(np.int32)


def gptq(bits: int, stored_zero: int, ordered: bool) -> tuple[dict[str, Array], dict[str, Array]]:
    tensors, weights = plain(), {}
    for name, (n, k) in LINEAR.items():
        groups = k // 64
        q, z = codes((k, n), bits), RNG.integers(1, 2**bits, (groups, n))
        scales = RNG.uniform(0.001, 0.02, (groups, n)).astype(np.float16)
        g_idx = np.arange(k) // 64 if ordered else RNG.integers(0, groups, k)
        prefix = f"model.layers.0.{name}"
        tensors[f"{prefix}.qweight"] = pack_along_rows(q, bits)
        tensors[f"{prefix}.qzeros"] = np.ascontiguousarray(pack_along_rows((z - stored_zero).T, bits).T)
        tensors[f"{prefix}.scales"] = scales
        if not ordered:
            tensors[f"{prefix}.g_idx"] = g_idx.astype(np.int32)
        w = np.empty((n, k), np.float16)
        for column in range(k):
            g = g_idx[column]
            w[:, column] = ((q[column] - z[g]).astype(np.float32) * scales[g].astype(np.float32)).astype(np.float16)
        weights[f"{prefix}.weight"] = w
    return tensors, weights


def checkpoint(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> Structure:
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": config}))
    return structure(folder)


def converted(folder: Path, model: Structure) -> Job:
    job = local_job({"checkpoint": folder / "model"}, {"structure": model.to_json()}, folder / "convert")
    convert.run(job)
    return job


def quantized(folder: Path, job: Job, model: Structure, quantization: Quantization) -> dict[str, Array]:
    fields = {"structure": model.to_json(), "quantization": quantization_json(quantization)}
    made = local_job({"convert": job.output}, fields, folder / "quantize")
    made.materials = {**job.materials, **made.materials}
    quantize.run(made)
    return dict(read_tensors(made.output))


def joined(model: Structure, tensors: Mapping[str, Array], weights: Mapping[str, Array]) -> dict[str, Array]:
    every = {**tensors, **weights}
    return {each.name: np.concatenate([every[source] for source in each.sources]) for each in parameters(model)}


def test_awq_numbers_are_those_of_its_formula(tmp_path: Path) -> None:
    tensors, weights = awq()
    model = checkpoint(tmp_path / "model", tensors, AWQ)
    job = converted(tmp_path, model)
    assert sorted(path.name for path in job.output.iterdir()) == ["parameters.json", "tensors-0.bin"]
    read = quantized(tmp_path, job, model, STOCK["q0f16"])
    for name, values in joined(model, tensors, weights).items():
        assert np.array_equal(read[name], values), name


def test_awq_into_another_format_is_requantized(tmp_path: Path) -> None:
    tensors, weights = awq(64)
    model = checkpoint(tmp_path / "model", tensors, AWQ | {"group_size": 64})
    read = quantized(tmp_path, converted(tmp_path, model), model, STOCK["q4f16_1"])
    name = "model.layers.0.mlp.down_proj"
    packed = group.encode(weights[f"{name}.weight"], "float16", STOCK["q4f16_1"].weights or pytest.fail(), "float16")
    assert np.array_equal(read[f"{name}.q_weight"], packed.words)


def test_awq_words_become_mlcs_parameters(tmp_path: Path) -> None:
    tensors, weights = awq()
    model = checkpoint(tmp_path / "model", tensors, AWQ)
    read = quantized(tmp_path, converted(tmp_path, model), model, STOCK["q4f16_autoawq"])
    layer = "model.layers.0"
    assert list(read)[:4] == ["model.embed_tokens.weight", *(f"{layer}.self_attn.qkv_proj.{form}" for form in
                                                             ("qweight", "qzeros", "scales"))]  # fmt: skip
    for name, sources in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.o_proj", ("self_attn.o_proj",)),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.down_proj", ("mlp.down_proj",)),
    ):
        for form in ("qweight", "qzeros", "scales"):
            wanted = np.concatenate([tensors[f"{layer}.{source}.{form}"] for source in sources], axis=1)
            assert np.array_equal(read[f"{layer}.{name}.{form}"], wanted if form == "scales" else wanted.view("u4"))
    numbers = dict(dequantized(tmp_path / "quantize" / "output", parameters(model), STOCK["q4f16_autoawq"]))
    for name, values in joined(model, tensors, weights).items():
        assert np.array_equal(numbers[name], values), name


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "g_idx"])
@pytest.mark.parametrize("checkpoint_format", [None, "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(tmp_path: Path, bits: int, checkpoint_format: str | None, ordered: bool) -> None:
    tensors, weights = gptq(bits, 0 if checkpoint_format else 1, ordered)
    config = GPTQ | {"bits": bits} | ({"checkpoint_format": checkpoint_format} if checkpoint_format else {})
    model = checkpoint(tmp_path / "model", tensors, config)
    read = quantized(tmp_path, converted(tmp_path, model), model, STOCK["q0f16"])
    for name, values in joined(model, tensors, weights).items():
        assert np.array_equal(read[name], values), name


def test_the_pieces_of_a_matrix_and_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weights = awq()
    model = checkpoint(tmp_path / "model", tensors, AWQ)
    monkeypatch.setattr(prequantized, "_PIECE", 128 * 24)
    monkeypatch.setattr(computed, "FILE_BYTES", 50_000)
    job = converted(tmp_path, model)
    assert len(list(job.output.glob("tensors-*.bin"))) > 3
    read = quantized(tmp_path, job, model, STOCK["q0f16"])
    for name, values in joined(model, tensors, weights).items():
        assert np.array_equal(read[name], values), name


def problem(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] = AWQ) -> str:
    model = checkpoint(folder / "model", tensors, config)
    with pytest.raises(CheckpointError) as error:
        converted(folder, model)
    assert not list((folder / "convert" / "output").iterdir()) or "damaged" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"quant_method": "quanto"},
            "quant_method is 'quanto': only awq, gptq, fp8, mxfp4, bitnet, compressed-tensors, bitsandbytes and "
            "MLX checkpoints are read; use the model's unquantized checkpoint",
        ),
        ({"bits": 3}, "bits is 3: awq checkpoints are read with 4 bits"),
        ({"group_size": "x"}, "group_size is 'x': expected a positive number, or -1"),
        ({"version": "GEMV_fast"}, "version is 'gemv_fast': only AutoAWQ's gemm and gemv packings are read"),
    ],
)
def test_a_quantization_that_is_not_read(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    assert problem(tmp_path, awq()[0], AWQ | change) == f"config.json: quantization_config.{text}"


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors, _ = awq()
    name = "model.layers.0.mlp.up_proj"
    one = {key: value for key, value in tensors.items() if key != f"{name}.scales"}
    assert problem(tmp_path / "1", one) == (
        f"model.safetensors: tensor {name}.qweight: there is no {name}.scales beside it"
    )
    two = tensors | {f"{name}.scales": np.ones((2, 256), np.float16)}
    assert problem(tmp_path / "2", two) == (
        f"model.safetensors: tensor {name}.scales: shape [2, 256], but [128, 32] of its qweight in groups of 128 "
        "make it [1, 256]"
    )
    three = tensors | {f"{name}.qweight": np.zeros((128, 32), np.float32)}
    assert problem(tmp_path / "3", three) == (f"model.safetensors: tensor {name}.qweight: dtype F32, expected I32")
    four = tensors | {f"{name}.scales": np.full((1, 256), np.nan, np.float16)}
    assert problem(tmp_path / "4", four) == (
        f"model.safetensors: tensor {name}.scales: not finite; the checkpoint is damaged"
    )
    assert problem(tmp_path / "5", plain()) == (
        "config.json says that the checkpoint was quantized by awq, but it has no tensor .qweight"
    )
    six = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
    assert problem(tmp_path / "6", six).startswith(f"tensor {name}.weight is missing from the checkpoint")


def test_a_config_that_does_not_say_so(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", awq()[0], AWQ)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"qweight: the checkpoint is quantized, but config\.json has no quant"):
        converted(tmp_path, model)


def test_what_was_lost_is_told(tmp_path: Path) -> None:
    """The verification report repeats it."""
    model = checkpoint(tmp_path / "model", awq()[0], AWQ)
    document = json.loads((converted(tmp_path, model).output / "parameters.json").read_text())
    assert document["notes"] == [
        "7 matrices that AWQ quantized to 4 bits are dequantized; what was lost then stays lost"
    ]


def test_gptq_groups_that_are_not_there(tmp_path: Path) -> None:
    tensors, _ = gptq(4, 1, False)
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = np.full(128, 2, np.int32)
    assert problem(tmp_path, tensors, GPTQ) == (
        f"model.safetensors: tensor {name}: names a group outside 0 to 1; the checkpoint is damaged"
    )


def test_halves_of_latent_attentions_matrix_are_numbers_again(tmp_path: Path) -> None:
    """AutoAWQ's words hold rows of both halves, one of which is wanted transposed: they are cast, as MLC has them."""
    size, rank = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 128), 128
    config = {**DEEPSEEK, **size, **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), rank), "first_k_dense_replace": 9}
    config |= {"qk_nope_head_dim": 40, "v_head_dim": 32, "quantization_config": AWQ, "num_hidden_layers": 1}
    known = llama.architecture("deepseek_v3")
    made = make(tmp_path / "made", config, known, [])
    made.rename(tmp_path / "model")
    model = resolve(known, config, {})
    read = quantized(tmp_path, converted(tmp_path, model), model, STOCK["q4f16_autoawq"])
    layer, forms = "model.layers.0.self_attn", ("qweight", "qzeros", "scales")
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "kv_b_proj" in name}  # noqa: SIM118
    rows = dequantize_awq(*(tensors[f"{layer}.kv_b_proj.{form}"] for form in forms)).reshape(4, 72, rank)
    np.testing.assert_allclose(read[f"{layer}.w_uk.weight"], rows[:, :40].swapaxes(1, 2), rtol=1e-3)
    np.testing.assert_allclose(read[f"{layer}.w_uv.weight"], rows[:, 40:], rtol=1e-3)
    assert f"{layer}.o_proj.qweight" in read


def test_autoawq_takes_nothing_else(tmp_path: Path) -> None:
    def refused(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> str:
        model = checkpoint(folder / "model", tensors, config)
        with pytest.raises(MlcBuildError) as error:
            quantized(folder, converted(folder, model), model, STOCK["q4f16_autoawq"])
        return str(error.value)

    where = "parameter model.layers.0.self_attn.qkv_proj.weight: this quantization"
    assert refused(tmp_path / "gptq", gptq(4, 1, True)[0], GPTQ) == (
        f"{where} takes weights as AutoAWQ packed them, and the checkpoint's are not; choose another quantization"
    )
    assert refused(tmp_path / "64", awq(64)[0], AWQ | {"group_size": 64}) == (
        f"{where} has group_size 128, the checkpoint was packed with 64; make a quantization with that group_size"
    )


def test_a_group_size_of_its_own(tmp_path: Path) -> None:
    tensors, weights = awq(32)
    model = checkpoint(tmp_path / "model", tensors, AWQ | {"group_size": 32})
    stock = STOCK["q4f16_autoawq"]
    assert stock.weights is not None
    own = dataclasses.replace(stock, weights=dataclasses.replace(stock.weights, group_size=32))
    quantized(tmp_path, converted(tmp_path, model), model, own)
    read = dict(dequantized(tmp_path / "quantize" / "output", parameters(model), own))
    for name, values in joined(model, tensors, weights).items():
        assert np.array_equal(read[name], values), name
