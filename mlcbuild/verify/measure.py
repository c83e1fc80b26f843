"""A package's weights measured against the unquantized model: figures, and nothing of what is thought of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.recipes.types import quantization_from_json
from mlcbuild.runtime import weights
from mlcbuild.runtime.embedding import pooling, text_limit, truncated
from mlcbuild.runtime.model import Model, network
from mlcbuild.runtime.tokenizer import Tokenizer, load_tokenizer
from mlcbuild.verify import embeddings, evaluate, layers
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.reference import load_reference
from mlcbuild.verify.tensors import Unquantized


@dataclass(frozen=True)
class Case:
    """What is measured.

    fields      those of the step measure
    weights     a folder with shards, their index and the tokenizer
    embedding   how a model of texts makes vectors (embedding_metadata); None for one that writes
    convert     parameters.json, whose parts are in `materials`: sha256 -> checkpoint file
    libraries   by name: `reference`, and `library`, or `blocks` for method layers
    scratch     an empty folder, for the reference's numbers
    progress    is told what is done, of how much, and the unit
    """

    fields: Mapping[str, Any]
    weights: Path
    embedding: Mapping[str, Any] | None
    convert: Mapping[str, Any]
    materials: Mapping[str, Path]
    libraries: Mapping[str, Path]
    text: str
    scratch: Path
    progress: Callable[[int, int, str], None]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.weights)

    def count(self, unit: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done, total, unit)


def measure(case: Case) -> dict[str, Any]:
    """The content of figures.json: rounded `figures`; `details` for quality.json; `notes`: what is true of the weights
    before this build touched them. Where a number is NaN or Inf, `not_finite` says which in place of figures.
    """
    notes = case.convert.get("notes", [])
    try:
        figures, details = METHODS[case.fields["method"]](case)
    except evaluate.NotFinite as error:
        return {"not_finite": str(error), "notes": notes}
    return {"figures": figures, "details": details, "notes": notes}


Measured = tuple[Mapping[str, float | int], Mapping[str, Any]]  # figures, details


def _whole(case: Case) -> Measured:
    """Both models in memory, one window of the text after the other."""
    model, reference = _models(case)
    texts = _windows(case, model.context_window_size, reference.context_window_size)
    found = evaluate.compare(model.logits_in_pieces, reference.logits_in_pieces, texts, case.count("tokens"))
    return evaluate.rounded(found), {}


def _layers(case: Case) -> Measured:
    """The text through one layer of both models after the other."""
    model = structure.from_json(case.fields["structure"])
    ours, theirs = (Pieces(case.libraries[name]) for name in ("blocks", "reference"))
    format_ = quantization_from_json(case.fields["quantization"])
    found = layers.compare(
        model,
        (theirs, Unquantized(case.convert, case.materials)),
        (ours, Packed(case.weights, parameters(model), format_)),
        _windows(case, case.fields["context_window_size"], theirs.window),
        case.count("layers"),
    )
    errors = {"tensors": found.tensors, "blocks": found.blocks}
    rounded = {kind: {name: float(f"{e:.1e}") for name, e in each.items()} for kind, each in errors.items()}
    return evaluate.rounded(found.figures), {"relative_error": rounded}


def _embeddings(case: Case) -> Measured:
    """Both models in memory, the vectors of one document after the other."""
    model, reference = _models(case)
    config = {"embedding_metadata": case.embedding}
    how = pooling(config, model.network.library)
    limit = text_limit(config, model.network.library)
    texts = [truncated(ids, limit) for ids in evaluate.documents(case.text, case.tokenizer)]
    found = embeddings.compare(model.hidden_states, reference.hidden_states, how, texts, case.count("tokens"))
    return embeddings.rounded(found), {"pooling": dataclasses.asdict(how)}


METHODS: Mapping[str, Callable[[Case], Measured]] = {"whole": _whole, "layers": _layers, "embeddings": _embeddings}


def _models(case: Case) -> tuple[Model, Model]:
    """The package's weights, on a library that runs here, and the unquantized model."""
    records = weights.read_index(case.weights)
    model = Model(network(case.libraries["library"], records, case.weights), {})
    return model, load_reference(case.libraries["reference"], case.convert, case.materials, case.scratch)


def _windows(case: Case, *limits: int) -> list[Sequence[int]]:
    """The evaluation text in windows that both libraries take; a limit of -1 is none."""
    documents = evaluate.documents(case.text, case.tokenizer)
    return list(evaluate.windows(documents, min([evaluate.WINDOW, *(limit for limit in limits if limit > 0)])))
