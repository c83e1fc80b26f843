"""Decoders in every quantization format against transformers on the weights that their tensors stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlcbuild.compiler.cpu.formats import format_of
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import Quantization
from tests.compiler.built import Built, error
from tests.support.llama import QUANTIZATIONS

pytestmark = pytest.mark.slow  # a library for each format

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 320, 130)]

# Largest and mean difference over the standard deviation of the logits. 16-bit formats hand embeddings and keys over in
# 16 bits: that much rounding is the format's own (bfloat16 has 8 bits where float16 has 11).
BOUNDS = {"float32": (1e-4, 1e-5), "float16": (5e-3, 1e-3), "bfloat16": (4e-2, 8e-3)}


def check(built: Built, quantization: Quantization) -> None:
    expected = built.expected(IDS)
    session = built.session(3)
    first, second, third = (session.add() for _ in range(3))
    got = np.concatenate(list(session.all_logits(first, IDS[:100])))
    got = np.concatenate([got, [session.decode(first, token) for token in IDS[100:]]])
    largest, mean = BOUNDS[quantization.model_dtype]
    assert error(got, expected) < largest
    assert np.abs(got - expected).mean() / expected.std() < mean
    rows = session.batch_prefill([second, third], [IDS[:7], IDS[:30]])
    assert error(rows, expected[[6, 29]]) < largest
    rows = session.batch_decode([second, third], [IDS[7], IDS[30]])
    assert error(rows, expected[[7, 30]]) < largest


# hidden_size and intermediate_size are no multiples of 40, so that 3-bit groups are partial; where groups must be whole
# (AWQ's of 128, asymmetric ones) they are.
ODD = {"hidden_size": 88, "num_attention_heads": 4, "head_dim": 22, "intermediate_size": 104, "initializer_range": 0.05}
WHOLE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "initializer_range": 0.05}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_decoder_computes_what_its_weights_stand_for(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    quantization = QUANTIZATIONS[name]
    weights = quantization.weights
    odd = weights is None or weights.symmetric or not weights.group_size
    check(Built(tmp_path_factory.mktemp(name), quantization, ODD if odd else WHOLE), quantization)


@pytest.mark.parametrize("name", ["q4f16_0", "q4f32_0", "q4bf16_1", "q3f16_0_2023"])
def test_tied_embeddings(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The embedding is looked up by rows and is the output projection too, whatever the other matrices' layout."""
    changes = {**WHOLE, "tie_word_embeddings": True}
    check(Built(tmp_path_factory.mktemp(name), name, changes), QUANTIZATIONS[name])


def test_each_parameter_has_its_own_format(tmp_path_factory: pytest.TempPathFactory) -> None:
    q4 = QUANTIZATIONS["q4f16_1"]
    overrides = (
        ("lm_head", QUANTIZATIONS["q8f16_1"].weights),
        ("down_proj", QUANTIZATIONS["q3f16_0"].weights),
        ("o_proj", None),
    )
    mixed = replace(q4, name="mixed", overrides=overrides)
    check(Built(tmp_path_factory.mktemp("mixed"), mixed, ODD), mixed)


def test_a_layer_may_have_its_own_formats(tmp_path_factory: pytest.TempPathFactory) -> None:
    q4 = QUANTIZATIONS["q4f16_1"]
    mixed = replace(q4, name="mixed", overrides=(("model.layers.1.mlp.down_proj", QUANTIZATIONS["q8f16_1"].weights),))
    check(Built(tmp_path_factory.mktemp("layers"), mixed, ODD), mixed)


def test_a_format_without_kernels_is_named() -> None:
    weights = QUANTIZATIONS["q8f16_0"].weights
    assert weights is not None
    with pytest.raises(MlcBuildError, match="minmax_outer: the CPU kernels take layout KN only"):
        format_of(replace(weights, layout="NK"))
