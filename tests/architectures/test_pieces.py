"""Layer by layer, every kind of decoder gives the figures of the whole model, and a calibration that quantize takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.schemes import packed
from mlcbuild.quantization.stream import quantize
from mlcbuild.verify import evaluate
from mlcbuild.verify.importance import importance
from mlcbuild.verify.layers import compare
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.tensors import Unquantized
from tests.architectures.agreement import IDS, Agreement, Array
from tests.architectures.cases import CASES as OWN
from tests.architectures.family_cases import CASES as FAMILIES
from tests.architectures.indexer_cases import CASES as INDEXERS
from tests.support.llama import QUANTIZATIONS
from tests.verify.conftest import build_blocks

CASES = {**OWN, **FAMILIES, **INDEXERS}
# Learned positions; a head's bias; norms without weights; norms of all heads; scales; windows, caps and norms after;
# latent attention; a matrix before the head; hyper-connections; chosen keys, of
# latents, of whole ones, and by another layer, where texts are too short for that.
NAMES = (
    *("gpt2", "phi", "olmo", "cohere-norms", "minicpm-tied", "gemma2", "minicpm3", "modernbert-decoder", "hy_v4"),
    *("deepseek_v32-choosing", "axk2-choosing", "glm_moe_dsa-long"),
)
WINDOWS = [IDS, IDS[::-1][:17]]


def in_one_piece(logits: Callable[[list[int]], Array]) -> Callable[[Sequence[int]], Iterator[Array]]:
    return lambda ids: iter([logits(list(ids))])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    agreement = Agreement(CASES[name], "q4f32_1", tmp_path, build=None)
    structure, form = agreement.structure, QUANTIZATIONS["q4f32_1"]
    reference, package = (Pieces(build_blocks(structure, q, tmp_path / q)) for q in ("q0f32", "q4f32_1"))
    checkpoint = Unquantized(agreement.document, agreement.blobs)
    ours = compare(
        structure,
        (reference, checkpoint),
        (package, Packed(agreement.weights, parameters(structure), form)),
        WINDOWS,
    )
    theirs = evaluate.compare(in_one_piece(agreement.expected), in_one_piece(agreement.unquantized), WINDOWS)
    assert ours.figures.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
    assert ours.figures.reference_perplexity == pytest.approx(theirs.reference_perplexity, rel=1e-4)
    assert ours.figures.kl == pytest.approx(theirs.kl, rel=1e-2)
    assert set(ours.tensors) == {each.name for each in parameters(structure) if each.is_matrix}
    _check_calibration(agreement, reference, checkpoint, tmp_path)


def _check_calibration(agreement: Agreement, blocks: Pieces, checkpoint: Any, folder: Path) -> None:
    structure, form = agreement.structure, replace(QUANTIZATIONS["q4f32_1"], rounding="calibrated")
    found = importance(structure, blocks, checkpoint, WINDOWS)
    known = parameters(structure)
    wanted = {each.name for each in known if packed(each, form) and each.role != "position_embedding"}
    assert found.keys() >= {each.name for each in known if each.layer is not None} & wanted
    (folder / "calibrated").mkdir()
    quantize(agreement.document, agreement.blobs, known, form, folder / "calibrated", importance=found)
