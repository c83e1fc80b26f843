"""Which parameters a quantization packs, and the list of tensors that a library declares."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization.schemes import packed_shapes, quantized_parameters
from mlcbuild.recipes.types import Quantization, Weights

NK = Weights(bits=4, group_size=32, storage_dtype="uint32", layout="NK", symmetric=True)
Q4 = Quantization("q4f16_1", "q4", "float16", NK, embedding="quantized", lm_head="quantized")


MODEL = (
    Parameter("model.embed_tokens.weight", (512, 192), "embedding", ("model.embed_tokens.weight",)),
    Parameter(
        "model.layers.0.self_attn.qkv_proj.weight",
        (320, 192),
        "qkv_proj",
        ("model.layers.0.self_attn.qkv_proj.weight",),
    ),
    Parameter(
        "model.layers.0.self_attn.qkv_proj.bias", (320,), "qkv_bias", ("model.layers.0.self_attn.qkv_proj.bias",)
    ),
    Parameter("model.layers.0.mlp.gate.weight", (8, 192), "router", ("model.layers.0.mlp.gate.weight",)),
    Parameter("model.layers.0.mlp.down_proj.weight", (192, 500), "down_proj", ("model.layers.0.mlp.down_proj.weight",)),
    Parameter("model.norm.weight", (192,), "final_norm", ("model.norm.weight",)),
    Parameter("lm_head.weight", (512, 192), "lm_head", ("lm_head.weight",)),
)


def table(quantization: Quantization) -> list[tuple[str, tuple[int, ...], str]]:
    return [(made.name, made.shape, made.dtype) for made in quantized_parameters(MODEL, quantization)]


def test_q4f16_1() -> None:
    assert table(Q4) == [
        ("model.embed_tokens.q_weight", (512, 24), "uint32"),
        ("model.embed_tokens.q_scale", (512, 6), "float16"),
        ("model.layers.0.self_attn.qkv_proj.q_weight", (320, 24), "uint32"),
        ("model.layers.0.self_attn.qkv_proj.q_scale", (320, 6), "float16"),
        ("model.layers.0.self_attn.qkv_proj.bias", (320,), "float16"),
        ("model.layers.0.mlp.gate.weight", (8, 192), "float16"),
        ("model.layers.0.mlp.down_proj.q_weight", (192, 64), "uint32"),  # 500 columns: 16 groups, the last partial
        ("model.layers.0.mlp.down_proj.q_scale", (192, 16), "float16"),
        ("model.norm.weight", (192,), "float16"),
        ("lm_head.q_weight", (512, 24), "uint32"),
        ("lm_head.q_scale", (512, 6), "float16"),
    ]


def test_kn_transposes_all_but_the_embedding() -> None:
    made = {name: shape for name, shape, _ in table(replace(Q4, weights=replace(NK, layout="KN")))}
    assert made["model.embed_tokens.q_weight"] == (512, 24)
    assert made["model.layers.0.mlp.down_proj.q_weight"] == (64, 192)
    assert made["model.layers.0.mlp.down_proj.q_scale"] == (16, 192)
    assert made["lm_head.q_scale"] == (6, 512)


def test_kept_embedding_and_lm_head() -> None:
    made = table(replace(Q4, embedding="kept", lm_head="kept"))
    assert ("model.embed_tokens.weight", (512, 192), "float16") in made
    assert ("lm_head.weight", (512, 192), "float16") in made


def test_unquantized() -> None:
    assert table(Quantization("q0f32", "q0", "float32")) == [(p.name, p.shape, "float32") for p in MODEL]


def test_sources_and_forms() -> None:
    made = quantized_parameters(MODEL[:1], Q4)
    assert [(each.source, each.form) for each in made] == [
        ("model.embed_tokens.weight", "q_weight"),
        ("model.embed_tokens.weight", "q_scale"),
    ]


def test_shapes_take_a_symbolic_number_of_rows() -> None:
    assert packed_shapes("vocab_size", 192, NK) == (("vocab_size", 24), ("vocab_size", 6))
    assert packed_shapes(64, 64, replace(NK, bits=3, group_size=40)) == ((64, 8), (64, 2))


@pytest.mark.parametrize(
    ("weights", "rounding", "text"),
    [
        (replace(NK, bits=9), "nearest", "bits 9: expected 2 to 8"),
        (replace(NK, bits=1), "nearest", "bits 1: expected 2 to 8"),
        (replace(NK, storage_dtype="int32"), "nearest", "storage_dtype 'int32': expected uint32, uint16 or uint8"),
        (
            replace(NK, group_size=36),
            "nearest",
            "group_size 36 is not a multiple of the 8 values of 4 bits that one uint32 word holds",
        ),
        (replace(NK, symmetric=False), "nearest", "symmetric: false: asymmetric groups are not supported yet"),
        (NK, "mse", "rounding 'mse': only 'nearest' is supported yet"),
    ],
)
def test_impossible_formats(weights: Weights, rounding: str, text: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        quantized_parameters(MODEL, replace(Q4, weights=weights, rounding=rounding))
    assert str(error.value) == f"quantization q4f16_1: {text}"


def test_a_packed_parameter_must_be_called_weight() -> None:
    with pytest.raises(MlcBuildError, match=r"parameter a\.matrix: the name of a quantized parameter must end in"):
        quantized_parameters([Parameter("a.matrix", (4, 32), "o_proj", ("a.matrix",))], Q4)


def test_the_list_is_made_without_numpy() -> None:
    code = "import sys, mlcbuild.quantization.schemes; assert not {'numpy', 'tvm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
