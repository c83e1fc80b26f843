"""Models whose output matrix is their embedding, and adapters that make them two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.models.parameters import Parameter

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")  # what an output matrix may be called


def tied_embedding(parameters: Sequence[Parameter]) -> str | None:
    """The name of the tensor that is embedding and output matrix in one; None where they are two."""
    roles = {parameter.role: parameter for parameter in parameters}
    embedding, own = roles.get("embedding"), roles.get("lm_head")
    if embedding is None or (own is not None and own.sources != embedding.sources):
        return None
    return embedding.sources[0]


def unties(adapter: Mapping[str, Any], embedding: str) -> bool:
    """Whether an adapter's configuration says that one of the two is trained as a whole, and the other not with it.

    `embedding` is the tensor that the base ties. PEFT then saves and merges them as two (`modules_to_save`, unless
    `ensure_weight_tying`; peft 0.21: utils/other.py, tuners/tuners_utils.py).
    """
    saved = adapter.get("modules_to_save")
    if not isinstance(saved, list) or adapter.get("ensure_weight_tying"):
        return False
    ends = [f".{name.removesuffix('.weight')}" for name in (embedding, *HEADS)]
    return any(end.endswith(f".{module}") for module in map(str, saved) for end in ends)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that `merge_and_unload` leaves of a base's, once the two are untied."""
    changed = {**config, "tie_word_embeddings": False}
    inner = config.get("text_config")
    return (
        {**changed, "text_config": {**inner, "tie_word_embeddings": False}} if isinstance(inner, Mapping) else changed
    )
