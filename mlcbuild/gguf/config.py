"""The config.json that a GGUF file stands for, by the table architectures.yaml."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.errors import CheckpointError
from mlcbuild.gguf.header import Bytes, Header, numbers
from mlcbuild.models.config import is_above
from mlcbuild.models.fields import evaluate
from mlcbuild.models.fields import read as read_fields
from mlcbuild.models.unknown import close_to

# Tensors that belong to the configuration: they are factors of rope's frequencies.
LLAMA3, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_FIRST = "blk.0."


@functools.cache
def known() -> Mapping[str, Any]:
    """The table's architectures."""
    import yaml

    text = (Path(__file__).parent / "architectures.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, yaml.CSafeLoader)["architectures"]
    return table


def rules(header: Header) -> Mapping[str, Any]:
    """What the table says of the file's architecture. Raises CheckpointError where it does not know it."""
    name = header.architecture
    if name not in known():
        raise CheckpointError(
            f"{header.file}: general.architecture `{name:.60}` is not one whose config.json can be made of a GGUF "
            f"file{close_to(name, known())}; they are {', '.join(sorted(known()))}. Name the checkpoint that it was "
            "made from"
        )
    return known()[name]  # type: ignore[no-any-return]


def config(header: Header, read: Bytes) -> dict[str, Any]:
    """The content of config.json.

    Raises CheckpointError for an unknown architecture, for a fact that is missing, and for factors of rope that are no
    scaling that is known.
    """
    table, name = rules(header), header.architecture
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.file}: no tensor token_embd.weight [tokens, size]: it is no language model")
    queries = header.tensors.get(f"{_FIRST}attn_q.weight", embedding)
    given = {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "tensors": tuple(each.removeprefix(_FIRST) for each in header.tensors if each.startswith(_FIRST)),
        "query_rows": embedding.shape[1] if queries is embedding else next(iter(queries.shape), 0),
    }
    facts = _mapping(_nested(header.facts).get(name))
    values, problems = read_fields(table["config"], facts, given)
    if problems:
        told = "; ".join(problem.removeprefix("config.json: ") for problem in problems)
        raise CheckpointError(f"{header.file}: of the facts about `{name}`: {told:.2000}")
    made = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if key[0] != "_" and v is not None}
    del made["tensors"], made["query_rows"]
    kind = evaluate(table.get("model_type", repr(name)), given)
    scaling = _scaling(header, facts, made, read)
    return {
        "model_type": kind,
        **made,
        **({"rope_scaling": scaling} if scaling else {}),
        "quantization_config": {"quant_method": "gguf"},
    }


def _nested(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`a.b: 1` as {a: {b: 1}}, without what stands beside such a mapping under its name."""
    made: dict[str, Any] = {}
    for key, value in facts.items():
        *outer, last = key.split(".")
        inner = made
        for part in outer:
            found = inner.setdefault(part, {})
            if not isinstance(found, dict):
                found = inner[part] = {}
            inner = found
        if not isinstance(inner.get(last), dict):
            inner[last] = value
    return made


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _scaling(header: Header, facts: Mapping[str, Any], made: Mapping[str, Any], read: Bytes) -> dict[str, Any] | None:
    """`rope_scaling`, by the facts of `rope.scaling` or by factors that are tensors."""
    rope = _mapping(facts.get("rope"))
    found = _mapping(rope.get("scaling"))
    original = found.get("original_context_length")
    short, long = (numbers(header, name, read) for name in (SHORT, LONG))
    if short is not None and long is not None:
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    factors = numbers(header, LLAMA3, read)
    if factors is not None:
        return _llama3(header, factors, made["rope_theta"])
    kind, factor = found.get("type", "none"), found.get("factor")
    if kind == "none" or factor is None:
        factor = rope.get("scale_linear") if factor is None else factor
        return {"rope_type": "linear", "factor": factor} if factor not in (None, 1.0) and kind != "none" else None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        more = {"beta_fast": found.get("yarn_beta_fast"), "beta_slow": found.get("yarn_beta_slow"),
                "attention_factor": found.get("yarn_attn_factor")}  # fmt: skip
        given = {key: value for key, value in more.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}
    raise CheckpointError(f"{header.file}: rope.scaling.type `{kind!s:.60}` without its factors is not read")


def _llama3(header: Header, factors: list[float], theta: float) -> dict[str, Any]:
    """The scaling `llama3` whose factors these are (transformers modeling_rope_utils.py)."""
    sound = is_above(1, theta) and all(is_above(0, each) for each in factors)
    for length in (8192, 4096, 16384, 32768) if sound and factors else ():
        scaling = {"rope_type": "llama3", "factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": length}  # fmt: skip
        expected = list(_factors(max(factors), length, theta, len(factors)))
        if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(factors, expected, strict=True)):
            return scaling
    raise CheckpointError(
        f"{header.file}: the factors in {LLAMA3} are not those of Llama 3's scaling: name the checkpoint that it was "
        "made from"
    )


def _factors(factor: float, length: int, theta: float, count: int) -> Iterator[float]:
    for pair in range(count):
        turns = length / (2 * math.pi * theta ** (pair / count))  # in the original context
        smooth = min(1.0, max(0.0, (turns - 1) / 3))
        yield 1 / ((1 - smooth) / factor + smooth)
