"""Going through a model layer by layer gives the numbers of the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.parameters import parameters
from mlcbuild.verify import evaluate, layers
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Pieces
from tests.support import llama
from tests.verify.conftest import WINDOWS, Case


def compared(case: Case, quantization: str, folder: Path | None = None) -> layers.Layers:
    known = parameters(case.structure)
    packed = Packed(folder or case.package(quantization), known, llama.QUANTIZATIONS[quantization])
    return layers.compare(
        case.structure, (case.blocks("q0f32"), case.checkpoint), (case.blocks(quantization), packed), WINDOWS
    )


def transformers_figures(case: Case, quantization: str) -> evaluate.Figures:
    """Both sides by transformers, ours with the weights that the formulas make of the model's."""
    dtype = "float16" if "f16" in quantization else "float32"
    values = llama.mlc_parameters(case.model)
    if quantization.startswith("q4"):
        values = {name: llama.pack(v, dtype)[2] if v.ndim == 2 else v for name, v in values.items()}
    ours = llama.with_parameters(llama.transformers_llama(**case.model.config.to_dict()), values)

    def logits(model: Any) -> Any:
        def of(ids: Sequence[int]) -> Iterator[Any]:
            yield llama.reference_logits(model, list(ids))

        return of

    return evaluate.compare(logits(ours), logits(case.model), WINDOWS)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f32_1", "q4f16_1"])
def test_the_figures_are_those_of_the_whole_model(case: Case, quantization: str) -> None:
    ours, theirs = compared(case, quantization).figures, transformers_figures(case, quantization)
    assert ours.tokens == theirs.tokens
    tolerance = 1e-3 if quantization == "q4f16_1" else 1e-5
    assert ours.kl == pytest.approx(theirs.kl, rel=10 * tolerance, abs=1e-9)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=tolerance)
    assert ours.reference_perplexity == pytest.approx(theirs.reference_perplexity, rel=1e-5)
    assert ours.top1_agreement == pytest.approx(theirs.top1_agreement, abs=0.01)
    assert quantization == "q0f32" or theirs.kl > 1e-4


def test_the_error_of_each_matrix(case: Case) -> None:
    found = compared(case, "q4f16_1").tensors
    values = {name: v for name, v in llama.mlc_parameters(case.model).items() if v.ndim == 2}
    assert found.keys() == values.keys()
    for name, value in values.items():
        packed = llama.pack(value, "float16")[2]
        assert found[name] == pytest.approx(np.linalg.norm(packed - value) / np.linalg.norm(value), rel=1e-3), name


def test_errors_grow_from_block_to_block(case: Case) -> None:
    found = compared(case, "q4f16_1").blocks
    assert list(found) == ["embedding", "layer 0", "layer 1", "layer 2", "final norm"]
    assert 0.03 < found["embedding"] < found["layer 2"] < 1
    assert max(compared(case, "q0f32").blocks.values()) == 0


def test_a_large_head_comes_in_slices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(case, "q4f16_1")
    monkeypatch.setattr(layers, "_SLICE", 64 * 40)
    sliced = compared(case, "q4f16_1")
    assert sliced.figures == whole.figures
    assert sliced.tensors == pytest.approx(whole.tensors, rel=1e-12)


def test_hidden_states_that_are_not_finite(case: Case, tmp_path: Path) -> None:
    """Found after the layer that made them, not at the end."""
    name = "model.layers.1.mlp.down_proj.weight"
    (entry,) = (e for e in case.document["parameters"] if e["name"] == name)
    (blob,) = case.blobs.values()
    data = bytearray(blob.read_bytes())
    offset = entry["parts"][0]["offset"]
    data[offset : offset + 4] = np.float32(np.nan).tobytes()
    copy = tmp_path / "damaged.bin"
    copy.write_bytes(data)
    broken = Case(case.model, case.structure, case.document, dict.fromkeys(case.blobs, copy), case.folder)
    with pytest.raises(MlcBuildError, match="the reference's hidden states are NaN or Inf after layer 1"):
        compared(broken, "q4f32_1", folder=case.package("q4f32_1"))


def test_weights_of_another_model(case: Case, tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"does not fit .*: the library wants model\.embed_tokens\.q_weight"):
        compared(case, "q4f16_1", folder=case.package("q0f32"))


def test_a_library_of_a_whole_model_is_refused(case: Case, tmp_path: Path) -> None:
    path = llama.build_library(case.structure, "q0f32", tmp_path)
    with pytest.raises(MlcBuildError, match="a library of a whole model, expected one of a model's pieces"):
        Pieces(path)
