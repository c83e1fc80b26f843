"""Quantizations that are made of others: `format` and `overrides`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlcbuild.recipes.types import (
    Quantization,
    Weights,
    format_json,
    quantization_from_json,
    quantization_json,
)
from tests.recipes.conftest import Workspace

OWN = """\
class: q4
model_dtype: float16
weights: {bits: 4, group_size: 32, storage_dtype: uint32, layout: NK, symmetric: true}
embedding: quantized
lm_head: quantized
overrides: {"*_proj": q4f16_1, lm_head: q8f16_1, model.layers.0.*: q0f16}
"""


def loaded(workspace: Workspace, **files: str) -> dict[str, Quantization]:
    for name, text in files.items():
        workspace.write(f"quantizations/{name}.yaml", text)
    return dict(workspace.load().quantizations)


def test_another_rounding_of_a_format(workspace: Workspace) -> None:
    quantizations = loaded(workspace)
    base, mse = quantizations["q4f16_1"], quantizations["q4f16_1-mse"]
    assert (base.format, base.rounding) == ("q4f16_1", "nearest")
    assert (mse.name, mse.format, mse.rounding, mse.kind) == ("q4f16_1-mse", "q4f16_1", "mse", "q4")
    assert format_json(mse) == format_json(base)  # the same libraries
    assert quantization_json(mse) != quantization_json(base)  # other weights


def test_another_rounding_of_ones_own_format(workspace: Workspace) -> None:
    quantizations = loaded(workspace, own=OWN, better="format: own\nrounding: calibrated\n")
    assert quantizations["better"].overrides == quantizations["own"].overrides
    assert (quantizations["better"].format, quantizations["better"].rounding) == ("own", "calibrated")


def test_overrides_take_the_weights_of_others_in_order(workspace: Workspace) -> None:
    q4, q8 = (Weights(bits, 32, "uint32", "NK", True) for bits in (4, 8))
    quantization = loaded(workspace, own=OWN)["own"]
    assert quantization.overrides == (("*_proj", q4), ("lm_head", q8), ("model.layers.0.*", None))


def test_the_formats_of_2023_have_their_own_version(workspace: Workspace) -> None:
    quantizations = loaded(workspace)
    versions = {name: each.scheme_version for name, each in quantizations.items()}
    assert {name for name, version in versions.items() if version == 1} == {
        "q3f16_0_2023", "q4f16_0_2023", "q4f32_0", "q8f16_0",
    }  # fmt: skip


def test_json_and_back(workspace: Workspace) -> None:
    """What a step is given is what was written, whoever sorted its keys on the way."""
    for quantization in loaded(workspace, own=OWN).values():
        fields = json.loads(json.dumps(quantization_json(quantization), sort_keys=True))
        assert not {"name", "format", "kind"} & fields.keys()
        made = quantization_from_json(fields)
        assert quantization_json(made) == quantization_json(quantization)
        assert (made.weights, made.overrides) == (quantization.weights, quantization.overrides)
        assert quantization_from_json(json.loads(json.dumps(format_json(quantization)))).rounding == "nearest"


def test_a_format_of_a_damaged_file_is_one_problem(workspace: Workspace) -> None:
    workspace.write("quantizations/own.yaml", "class: q4\n")
    workspace.write("quantizations/better.yaml", "format: own\nrounding: mse\n")
    workspace.write("quantizations/mixed.yaml", OWN.replace("q8f16_1", "own"))
    assert [problem.partition(":")[0] for problem in workspace.problems()] == ["recipes/quantizations/own.yaml"] * 2


def test_overrides_of_overrides_are_refused(workspace: Workspace) -> None:
    workspace.write("quantizations/own.yaml", OWN)
    text = OWN.replace("lm_head: q8f16_1", "lm_head: own")
    assert workspace.problem("quantizations/bad.yaml", text) == (
        "6:41: `overrides.lm_head` is `own`, which has overrides itself; name one without"
    )


@pytest.mark.parametrize(
    ("name", "rounding", "expected"),
    [("q4f32_0", "mse", "`nearest` or `gptq`"), ("q8f16_0", "gptq", "`nearest`")],
)
def test_a_rounding_that_a_format_cannot_have(workspace: Workspace, name: str, rounding: str, expected: str) -> None:
    assert workspace.problem("quantizations/bad.yaml", f"format: {name}\nrounding: {rounding}\n") == (
        f"2:11: `rounding` is `{rounding}`, expected {expected} for the format `{name}`: "
        "there is no other scale to search for"
    )


BUDGET = """\
class: q4
model_dtype: float16
bits_per_weight: 4.6
formats: [q4f16_1, q8f16_1, q0f16]
rounding: gptq
"""


def test_a_budget_chooses_among_the_weights_of_others(workspace: Workspace) -> None:
    found = loaded(workspace, own=BUDGET, plain="format: own\nrounding: nearest\n")
    q4, q8 = (Weights(bits, 32, "uint32", "NK", True) for bits in (4, 8))
    own = found["own"]
    assert (own.bits_per_weight, own.formats) == (4.6, (("q4f16_1", q4), ("q8f16_1", q8), ("q0f16", None)))
    assert (own.weights, own.embedding, own.lm_head, own.overrides) == (q4, "quantized", "quantized", ())
    assert found["plain"] == replace(own, name="plain", rounding="nearest")
    assert quantization_json(replace(own, rounding="nearest")) == quantization_json(found["q4f16_1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            BUDGET.replace("q8f16_1", "q8f16_0"),
            "4:20: `formats[1]` is `q8f16_0`, whose weights are of scheme minmax_outer; a budget chooses among formats "
            "with groups, and q0 ones",
        ),
        (
            BUDGET.replace("q8f16_1", "q4f16_1-mse"),
            "4:20: `formats[1]` is `q4f16_1-mse`, which only rounds otherwise; name the format of its bytes",
        ),
        (
            BUDGET.replace("q8f16_1", "q5f16_auto"),
            "4:20: `formats[1]` is `q5f16_auto`, which is a budget itself; name a format",
        ),
        (
            BUDGET.replace("q8f16_1", "q8f32_1"),
            "4:20: `formats[1]` is `q8f32_1`, whose model_dtype is float32; expected one with float16, as here",
        ),
        (
            BUDGET.replace("bits_per_weight: 4.6\n", ""),
            "1:1: `bits_per_weight` is missing: a budget: bits that a number of the model may take on average, with "
            "scales and what is not quantized",
        ),
        (
            BUDGET + "embedding: kept\n",
            "1:1: expected no `weights`, `embedding`, `lm_head`, `overrides` or "
            "`scheme_version` in a budget: each matrix gets one of the `formats`",
        ),
        (
            BUDGET.replace("[q4f16_1, q8f16_1, q0f16]", "[q0f16, q4f16_1]"),
            "4:11: `formats[0]` is `q0f16`, in which nothing is lost; name one with groups first: what the model loses "
            "in that is measured",
        ),
        (
            BUDGET.replace("float16", "float32").replace("[q4f16_1, q8f16_1, q0f16]", "[q4f32_0, q8f32_1]")
            .replace("gptq", "mse"),
            "5:11: `rounding` is `mse`, expected `nearest` or `gptq` for the format `q4f32_0`: there is no other scale "
            "to search for",
        ),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be(workspace: Workspace, text: str, expected: str) -> None:
    assert workspace.problem("quantizations/bad.yaml", text) == expected
