"""Which parameters a quantization packs, and the list of tensors that a library declares."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization.schemes import check, packed_shapes, quantized_parameters
from mlcbuild.recipes import convert
from mlcbuild.recipes.files import stock
from mlcbuild.recipes.schemas import Schemas
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


def table(quantization: Quantization, model: Sequence[Parameter] = MODEL) -> list[tuple[str, tuple[int, ...], str]]:
    return [(made.name, made.shape, made.dtype) for made in quantized_parameters(model, quantization)]


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


ASYMMETRIC = replace(NK, symmetric=False, packed_scale_min="bf16x2")
OUTER = Weights(bits=8, group_size=0, storage_dtype="uint8", layout="KN", symmetric=False, scheme="minmax_outer")
AWQ = Weights(bits=4, group_size=64, storage_dtype="uint32", layout="KN", symmetric=False, scheme="awq")
LINEAR = tuple(parameter for parameter in MODEL if parameter.role in ("qkv_proj", "qkv_bias"))


def test_asymmetric_groups_have_scale_and_minimum_in_one_word() -> None:
    assert table(replace(Q4, model_dtype="float32", weights=ASYMMETRIC), LINEAR) == [
        ("model.layers.0.self_attn.qkv_proj.q_weight", (320, 24), "uint32"),
        ("model.layers.0.self_attn.qkv_proj.q_scale_min", (320, 6), "uint32"),
        ("model.layers.0.self_attn.qkv_proj.bias", (320,), "float32"),
    ]


def test_minmax_outer_has_ranges_of_rows_and_columns() -> None:
    assert table(replace(Q4, weights=OUTER), LINEAR)[:5] == [
        ("model.layers.0.self_attn.qkv_proj.q_weight", (192, 320), "uint8"),
        ("model.layers.0.self_attn.qkv_proj.q_scale_in", (192,), "float16"),
        ("model.layers.0.self_attn.qkv_proj.q_scale_out", (320,), "float16"),
        ("model.layers.0.self_attn.qkv_proj.q_min_in", (192,), "float16"),
        ("model.layers.0.self_attn.qkv_proj.q_min_out", (320,), "float16"),
    ]


def test_awq_has_mlcs_names() -> None:
    assert table(replace(Q4, weights=AWQ), LINEAR)[:3] == [
        ("model.layers.0.self_attn.qkv_proj.qweight", (192, 40), "uint32"),
        ("model.layers.0.self_attn.qkv_proj.qzeros", (3, 40), "uint32"),
        ("model.layers.0.self_attn.qkv_proj.scales", (3, 320), "float16"),
    ]


@pytest.mark.parametrize("weights", [NK, replace(NK, layout="KN"), OUTER], ids=["NK", "KN", "outer"])
def test_the_axis_of_rows(weights: Weights) -> None:
    """Where the vocabulary, which a library leaves open, is among a tensor's dimensions."""
    head = MODEL[-1:]
    made, more = (
        quantized_parameters([replace(head[0], shape=(n, 192))], replace(Q4, weights=weights)) for n in (512, 640)
    )
    for one, other in zip(made, more, strict=True):
        axes = [axis for axis, pair in enumerate(zip(one.shape, other.shape, strict=True)) if pair[0] != pair[1]]
        assert axes == ([] if one.rows_axis is None else [one.rows_axis]), one.name
        assert one.weights == weights


Q8 = replace(NK, bits=8)


@pytest.mark.parametrize(
    ("pattern", "packed_in_8_bits"),
    [
        ("lm_head", {"lm_head.weight"}),  # a role, and a name
        ("embedding", {"model.embed_tokens.weight"}),
        ("qkv_proj", {"model.layers.0.self_attn.qkv_proj.weight"}),
        ("model.layers.0.mlp.down_proj", {"model.layers.0.mlp.down_proj.weight"}),
        ("model.layers.0.mlp.down_proj.weight", {"model.layers.0.mlp.down_proj.weight"}),
        ("model.layers.?.*", {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.down_proj.weight"}),
        ("LM_HEAD", set()),
    ],
)
def test_overrides(pattern: str, packed_in_8_bits: set[str]) -> None:
    """They reach what can be packed, whatever else they match: not norms, biases or router gates."""
    quantization = replace(Q4, embedding="kept", lm_head="kept", overrides=((pattern, Q8),))
    made = quantized_parameters(MODEL, quantization)
    assert {each.source for each in made if each.weights == Q8} == packed_in_8_bits


def test_the_last_override_that_matches_counts() -> None:
    overrides = (("*", None), ("*_proj", Q8), ("model.layers.0.mlp.*", NK))
    made = {each.source: each.weights for each in quantized_parameters(MODEL, replace(Q4, overrides=overrides))}
    assert made["model.embed_tokens.weight"] is None and made["lm_head.weight"] is None
    assert made["model.layers.0.self_attn.qkv_proj.weight"] == Q8
    assert made["model.layers.0.mlp.down_proj.weight"] == NK


def test_an_overridden_embedding_is_not_transposed() -> None:
    made = quantized_parameters(MODEL[:1], replace(Q4, overrides=(("embedding", replace(Q8, layout="KN")),)))
    assert made[0].weights == Q8 and made[0].shape == (512, 48)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 9}, "bits 9: expected 2 to 8"),
        ({"bits": 1}, "bits 1: expected 2 to 8"),
        ({"storage_dtype": "int32"}, "storage_dtype 'int32': expected uint32, uint16 or uint8"),
        (
            {"group_size": 36},
            "group_size 36 is not a multiple of the 8 values of 4 bits that one uint32 word holds",
        ),
        ({"group_size": 0}, "group_size: missing; scheme group has groups"),
        ({"symmetric": False}, "symmetric: false: needs packed_scale_min bf16x2 and model_dtype float32"),
        ({"packed_scale_min": "bf16x2"}, "packed_scale_min: only asymmetric groups have one"),
        ({"symmetric": False, "scale_floor": 0.1}, "scale_floor: only symmetric groups have one"),
        (
            {"scheme": "minmax_outer"},
            "scheme minmax_outer: expected bits 8, storage_dtype uint8, no group_size, layout KN, symmetric false",
        ),
        ({"scheme": "awq"}, "scheme awq: expected bits 4, storage_dtype uint32, layout KN, symmetric false"),
    ],
)
def test_impossible_formats(changes: dict[str, Any], text: str) -> None:
    weights = replace(NK, **changes)
    for quantization, where in (
        (replace(Q4, weights=weights), ""),
        (replace(Q4, overrides=(("lm_head", weights),)), "override 'lm_head': "),
    ):
        with pytest.raises(MlcBuildError) as error:
            quantized_parameters(MODEL, quantization)
        assert str(error.value) == f"quantization q4f16_1: {where}{text}"


def test_impossible_roundings() -> None:
    other: Any = "up"
    with pytest.raises(MlcBuildError, match="rounding 'up': expected nearest, mse, calibrated or gptq"):
        quantized_parameters(MODEL, replace(Q4, rounding=other))
    with pytest.raises(MlcBuildError, match="rounding 'mse': only symmetric groups have a scale to search for"):
        quantized_parameters(MODEL, replace(Q4, weights=OUTER, embedding="kept", rounding="mse"))


@pytest.mark.parametrize(
    ("weights", "shape", "role", "text"),
    [
        (
            ASYMMETRIC,
            (8, 100),
            "o_proj",
            "parameter x.weight [8, 100]: q4 needs input columns in whole groups of 32, not 100; choose another "
            "quantization, or keep this parameter with `overrides`",
        ),
        (
            AWQ,
            (12, 128),
            "o_proj",
            "parameter x.weight [12, 128]: q4 needs output rows in whole words of 8, not 12; choose another "
            "quantization, or keep this parameter with `overrides`",
        ),
        (
            OUTER,
            (8, 64),
            "embedding",
            "parameter x.weight: an embedding is looked up by row, which scheme minmax_outer cannot do; say "
            "`embedding: kept`, or override it with another quantization",
        ),
    ],
)
def test_matrices_that_a_format_cannot_pack(weights: Weights, shape: tuple[int, int], role: str, text: str) -> None:
    dtype: Any = "float32" if weights == ASYMMETRIC else "float16"
    quantization = replace(Q4, name="q4", model_dtype=dtype, weights=weights)
    with pytest.raises(MlcBuildError) as error:
        quantized_parameters([Parameter("x.weight", shape, role, ("x.weight",))], quantization)
    assert str(error.value) == text


def test_the_schema_accepts_what_can_be_packed() -> None:
    """A file that `mlcbuild check` calls valid never fails in the step, and the other way round."""
    schemas = Schemas(stock().schema)
    seen = {True: 0, False: 0}
    for scheme, bits, group_size, storage, layout, symmetric, extra, dtype in itertools.product(
        ("group", "minmax_outer", "awq"),
        (1, 3, 4, 8),
        (0, 32, 40),
        ("uint32", "uint16", "uint8", "int8"),
        ("NK", "KN"),
        (True, False),
        ((), (("scale_floor", 1e-4),), (("packed_scale_min", "bf16x2"),)),
        ("float16", "float32"),
    ):
        fields: dict[str, Any] = {"bits": bits, "storage_dtype": storage, "layout": layout, "symmetric": symmetric}
        fields |= {"scheme": scheme} | dict(extra) | ({"group_size": group_size} if group_size else {})
        data = {"class": "q4", "model_dtype": dtype, "weights": fields}
        try:
            check(convert.quantization("q", data, {}))
        except MlcBuildError:
            possible = False
        else:
            possible = True
        assert (schemas.complaints("quantization", data) == []) == possible, data
        seen[possible] += 1
    assert seen[True] > 30 and seen[False] > 1000


def test_a_packed_parameter_must_be_called_weight() -> None:
    with pytest.raises(MlcBuildError, match=r"parameter a\.matrix: the name of a quantized parameter must end in"):
        quantized_parameters([Parameter("a.matrix", (4, 32), "o_proj", ("a.matrix",))], Q4)


def test_the_list_is_made_without_numpy() -> None:
    code = "import sys, mlcbuild.quantization.schemes; assert not {'numpy', 'tvm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
