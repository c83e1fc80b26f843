"""Encoders layer by layer: hidden states are the whole model's, and rounding by them errs less than by each number."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.engine.job import Job, local_job
from mlcbuild.models.architecture import resolve
from mlcbuild.models.kinds import by_layer
from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.feedback import Kernels
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import packed
from mlcbuild.quantization.stream import quantize
from mlcbuild.runtime.model import Model
from mlcbuild.steps import convert
from mlcbuild.verify.importance import importance
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.rounding import Rounding
from mlcbuild.verify.tensors import Unquantized, by_piece, embedded, widened
from tests.architectures import test_encoder as encoders
from tests.architectures.agreement import network
from tests.support import llama
from tests.support.llama import Array
from tests.verify.conftest import build_blocks

pytestmark = pytest.mark.slow
IDS = encoders.IDS
# Norms behind sums; a narrow table, a matrix behind it; windows, two kinds of layers, norms before, positions turned.
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": encoders.SIZES,
    "electra": encoders.KIN["electra"],
    "modernbert": encoders.NEWER["modernbert"],
    "eurobert": encoders.NEWER["eurobert"],
}


class Case:
    """A checkpoint as convert describes it, and transformers' model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.reference = encoders.transformers_encoder(name, **CONFIGS[name])
        self.reference.save_pretrained(folder / "checkpoint")
        config = json.loads((folder / "checkpoint" / "config.json").read_text())
        self.structure = resolve(llama.architecture(name), config, {"max_batch_size": 1})
        fields = {"structure": self.structure.to_json()}
        job: Job = local_job({"checkpoint": folder / "checkpoint"}, fields, folder / "convert")
        convert.run(job)
        self.document = json.loads((job.output / "parameters.json").read_text())
        self.blobs = job.materials
        self.checkpoint = Unquantized(self.document, self.blobs)
        self.pieces = Pieces(build_blocks(self.structure, "q0f32", folder / "blocks"))


def last_layer(reference: Any, ids: list[int]) -> Array:
    """What comes out of transformers' last layer, before any norm."""
    import torch

    found: list[Any] = []
    layers = reference.encoder.layer if hasattr(reference, "encoder") else reference.layers
    handle = layers[-1].register_forward_hook(lambda *given: found.append(given[-1]))
    with torch.no_grad():
        reference(torch.tensor([ids]))
    handle.remove()
    out = found[0][0] if isinstance(found[0], tuple) else found[0]
    return out.reshape(len(ids), -1).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    model, windows = by_piece(case.structure), [IDS, IDS[:1], IDS[3:20]]
    assert model.head == []
    hidden = embedded(model, case.pieces, case.checkpoint, windows)
    for number in range(model.layers):
        given = widened(model.layer(number), case.checkpoint)
        hidden = [case.pieces.layer(window, given, model.kinds[number]) for window in hidden]
    for ids, got in zip(windows, hidden, strict=True):
        assert encoders.error(got, last_layer(case.reference, ids)) < 2e-5


def test_rounding_by_what_runs_through_the_layers(tmp_path: Path) -> None:
    """A model of vectors, whose words' table is none of its layers' and is rounded by itself."""
    case, form = Case("modernbert", tmp_path), llama.QUANTIZATIONS["q4f32_1"]
    known, gptq = parameters(case.structure), dataclasses.replace(form, rounding="gptq")
    windows, done = [IDS, IDS[::-1]], dict[str, Packed]()
    Rounding(case.structure, gptq, case.pieces, case.checkpoint, Kernels(tmp_path)).run(windows, done.__setitem__)
    assert done.keys() == {each.name for each in known if packed(each, gptq) is not None}
    assert importance(case.structure, case.pieces, case.checkpoint, windows).keys() == {
        each.name for each in known if each.layer is not None and each.is_matrix
    }
    library = llama.build_library(case.structure, form, tmp_path)
    errors = []
    for name, quantization, ready in (("nearest", form, None), ("gptq", gptq, done)):
        (weights := tmp_path / name).mkdir()
        quantize(case.document, case.blobs, known, quantization, weights, ready=ready)
        model = Model(network(library, weights, case.structure.vocab_size, False), {})
        off = model.hidden_states(IDS) - encoders.hidden_states(case.reference, IDS)
        errors.append(float(np.square(off).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_biases_that_all_layers_share_are_in_no_piece() -> None:
    model = encoders.transformers_encoder("mpnet", **encoders.SIZES)
    assert not by_layer(resolve(llama.architecture("mpnet"), model.config.to_dict(), {}))
