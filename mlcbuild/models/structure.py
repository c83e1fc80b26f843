"""The part of a model that its compiled library depends on, as plain data.

A `Structure` is what `config.json`, the architecture file and the recipe's overrides say together. Two models with
equal `library_json()` share one library: the vocabulary's size stays symbolic there, and checkpoint tensor names
matter to conversion only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT_WINDOW, TEXT_CHUNK = 1024, 256  # tokens of a sequence and of one call, where a text is evaluated


@dataclass(frozen=True)
class ParameterRule:
    """One line of an architecture's parameter list; `{i}` in a name stands for the layer's number."""

    role: str
    name: str
    sources: tuple[str, ...]  # checkpoint tensors, joined along their first axis

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.name


@dataclass(frozen=True)
class Structure:
    """A decoder's dimensions and choices. Field names are those of Hugging Face configs where one exists."""

    architecture: str
    model_type: str
    # dimensions
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    # choices
    norm: str
    mlp: str
    activation: str
    rope: str
    # parameters
    rules: tuple[ParameterRule, ...]
    ignored: tuple[str, ...]
    # limits
    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int
    tensor_parallel_shards: int = 1
    pipeline_parallel_stages: int = 1
    disaggregation: bool = False

    def to_json(self) -> dict[str, Any]:
        """Every field, JSON-able, such that `from_json` gives an equal structure."""
        return dataclasses.asdict(self)

    def library_json(self) -> dict[str, Any]:
        """The fields that a compiled library depends on."""
        fields = self.to_json()
        for name in ("architecture", "vocab_size", "ignored"):
            del fields[name]
        fields["rules"] = [[rule.role, rule.name] for rule in self.rules]
        return fields

    @property
    def one_layer(self) -> Structure:
        """The structure of a library that computes one layer at a time, over texts (mlcbuild.models.blocks).

        It has a single layer and limits that suit whoever goes through a text, so that models which differ in these
        only share it.
        """
        return dataclasses.replace(
            self,
            num_hidden_layers=1,
            context_window_size=TEXT_WINDOW,
            prefill_chunk_size=TEXT_CHUNK,
            max_batch_size=1,
        )

    @property
    def digest(self) -> str:
        """sha256 (hex) of `library_json()`."""
        return hashlib.sha256(json.dumps(self.library_json(), sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        """A short name for task names and symbol prefixes: `llama-1f0c93aa`."""
        return f"{self.model_type}-{self.digest[:8]}"


def from_json(data: Mapping[str, Any]) -> Structure:
    """The inverse of `Structure.to_json`."""
    fields = dict(data)
    fields["rules"] = tuple(
        ParameterRule(rule["role"], rule["name"], tuple(rule["sources"])) for rule in fields["rules"]
    )
    fields["ignored"] = tuple(fields["ignored"])
    return Structure(**fields)


def from_library_json(data: Mapping[str, Any]) -> Structure:
    """A structure with the given `library_json()`; what libraries do not depend on is left empty."""
    rules = [{"role": role, "name": name, "sources": ()} for role, name in data["rules"]]
    return from_json({"architecture": "", "vocab_size": 1, "ignored": (), **data, "rules": rules})
