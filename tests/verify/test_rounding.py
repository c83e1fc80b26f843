"""Layers rounded one after the other: everything that is packed is rounded, and the model errs least."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import Parameter, parameters
from mlcbuild.quantization.feedback import Kernels
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import packed
from mlcbuild.quantization.stream import quantize
from mlcbuild.verify import layers
from mlcbuild.verify.packed import Packed as Package
from mlcbuild.verify.rounding import Rounding
from tests.support import llama
from tests.verify.conftest import WINDOWS, Case

GPTQ = replace(llama.QUANTIZATIONS["q4f16_1"], rounding="gptq")


def done(case: Case, folder: Path, windows: list[list[int]] = WINDOWS) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    rounding = Rounding(case.structure, GPTQ, case.blocks("q0f32"), case.checkpoint, Kernels(folder))
    rounding.run(windows, found.__setitem__)
    return found


def divergence(case: Case, folder: Path) -> float:
    known = parameters(case.structure)
    package = case.blocks("q4f16_1"), Package(folder, known, llama.QUANTIZATIONS["q4f16_1"])
    return layers.compare(case.structure, (case.blocks("q0f32"), case.checkpoint), package, WINDOWS).figures.kl


@pytest.mark.slow
def test_the_model_errs_less_and_its_library_is_the_formats_own(case: Case, tmp_path: Path) -> None:
    found = done(case, tmp_path)
    known = parameters(case.structure)
    assert found.keys() == {each.name for each in known if packed(each, GPTQ) is not None}
    (weights := tmp_path / "weights").mkdir()
    quantize(case.document, case.blobs, known, GPTQ, weights, ready=found)
    assert divergence(case, weights) < 0.5 * divergence(case, case.package("q4f16_1"))


def test_a_text_with_nothing_in_it(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match="the text has no document of two tokens or more"):
        done(case, tmp_path, [])


def test_first_tokens_count_three_times_all_others(case: Case, tmp_path: Path) -> None:
    """Of a matrix, and of experts that have a row for each choice."""
    rounding = Rounding(case.structure, GPTQ, case.blocks("q0f32"), case.checkpoint, Kernels(tmp_path))
    for choices in (1, 2):
        chosen = [[], []] if choices == 1 else [[np.zeros((n, choices), np.float32)] for n in (5, 12)]
        rows = [np.ones((n * choices, 3), np.float32) for n in (5, 12)]
        rounding._first_counted([(mine, *more) for mine, more in zip(rows, chosen, strict=True)])
        first = sum(np.square(mine[:choices]).sum() for mine in rows)
        assert first == pytest.approx(3 * sum(np.square(mine[choices:]).sum() for mine in rows))
        assert all((mine[choices:] == 1).all() and np.ptp(mine[:choices]) == 0 for mine in rows)
    alone = [[np.ones((1, 3), np.float32)], [np.ones((1, 3), np.float32)]]
    assert all((mine == 1).all() for (mine,) in rounding._first_counted(alone))  # there are no others


def test_experts_are_rounded_by_their_own_tokens(case: Case, tmp_path: Path) -> None:
    """The last one by the tokens of all, since none chose it."""
    random = np.random.default_rng(0)
    experts = Parameter("x.weight", (3, 16, 64), "experts_down_proj", ())
    values = random.standard_normal(experts.shape).astype(np.float32)
    chosen = np.tile([[0], [1]], (300, 1))
    sizes = np.exp(random.standard_normal((2, 64)) * 2)
    rows = (random.standard_normal((600, 64)) * sizes[chosen[:, 0]]).astype(np.float32)
    weights = llama.QUANTIZATIONS["q4f16_1"].weights
    assert weights is not None
    rounding = Rounding(case.structure, GPTQ, case.blocks("q0f32"), case.checkpoint, Kernels(tmp_path))
    found, numbers = rounding._experts(
        experts, values, weights, [(rows[:301], chosen[:301]), (rows[301:], chosen[301:])]
    )
    assert found.words.shape == (48, 8) and found.scales.shape == (48, 2)
    off = numbers.astype(np.float64) - values
    errors = [[np.square(off[e] @ rows[chosen[:, 0] == of].T).sum() for e in (0, 1)] for of in (0, 1)]
    assert errors[0][0] < 0.5 * errors[0][1] and errors[1][1] < 0.5 * errors[1][0]
    assert np.square(off[2]).mean() < 0.02
