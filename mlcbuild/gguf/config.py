"""The config.json that a GGUF file stands for, by the table architectures.yaml."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.errors import CheckpointError
from mlcbuild.gguf.header import Bytes, Header, numbers
from mlcbuild.models.config import is_above
from mlcbuild.models.fields import evaluate, keys
from mlcbuild.models.fields import read as read_fields
from mlcbuild.models.unknown import close_to

# Tensors that belong to the configuration: they are factors of rope's frequencies.
LLAMA3, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_FIRST, _ROUTER = "blk.0.", re.compile(r"blk\.(\d{1,6})\.ffn_gate_inp\.weight")
_PATTERN = "attention.sliding_window_pattern"
_SCALING = tuple(
    f"rope.{each}"
    for each in ("scale_linear", "scaling.type", "scaling.factor", "scaling.original_context_length",
                 "scaling.yarn_beta_fast", "scaling.yarn_beta_slow", "scaling.yarn_attn_factor",
                 "scaling.yarn_log_multiplier")
)  # fmt: skip
_OTHER = "name the checkpoint that it was made from"


@functools.cache
def _table() -> Mapping[str, Any]:
    import yaml

    text = (Path(__file__).parent / "architectures.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, yaml.CSafeLoader)
    return table


def known() -> Mapping[str, Any]:
    """The table's architectures."""
    return _table()["architectures"]  # type: ignore[no-any-return]


def rules(header: Header) -> Mapping[str, Any]:
    """What the table says of the file's architecture. Raises CheckpointError where it does not know it."""
    name = header.architecture
    if name not in known():
        raise CheckpointError(
            f"{header.file}: general.architecture `{name:.60}` is not one whose config.json can be made of a GGUF "
            f"file{close_to(name, known())}; they are {', '.join(sorted(known()))}. {_OTHER.capitalize()}"
        )
    return known()[name]  # type: ignore[no-any-return]


def config(header: Header, read: Bytes) -> dict[str, Any]:
    """The content of config.json.

    Raises CheckpointError for an unknown architecture, for a fact that is missing, for one that says what config.json
    would not, and for factors of rope that are no scaling that is known.
    """
    table, name = rules(header), header.architecture
    _check_layout(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.file}: no tensor token_embd.weight [tokens, size]: it is no language model")
    queries = header.tensors.get(f"{_FIRST}attn_q.weight", embedding)
    facts = _mapping(_nested(header.facts).get(name))
    given = {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "tensors": tuple(each.removeprefix(_FIRST) for each in header.tensors if each.startswith(_FIRST)),
        "routed": tuple(sorted(int(found[1]) for each in header.tensors if (found := _ROUTER.fullmatch(each)))),
        "query_rows": embedding.shape[1] if queries is embedding else next(iter(queries.shape), 0),
        "windows": _windows(facts),
    }
    values, problems = read_fields(table["config"], facts, given)
    problems += [] if problems else list(_unread(header, table, values))
    if problems:
        told = "; ".join(problem.removeprefix("config.json: ") for problem in problems)
        raise CheckpointError(f"{header.file}: of the facts about `{name}`: {told:.2000}")
    made = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if key[0] != "_" and v is not None}
    for key in given.keys() - {"vocab_size", "tie_word_embeddings"}:
        made.pop(key, None)
    kind = evaluate(table.get("model_type", repr(name)), values)
    scaling = _scaling(header, facts, made, read)
    return {
        "model_type": kind,
        **made,
        **({"rope_scaling": {**scaling, **table.get("scaling", {})}} if scaling else {}),
        "quantization_config": {"quant_method": "gguf"},
    }


def _check_layout(header: Header) -> None:
    """Raises CheckpointError for tensors that are laid out as no rule has them."""
    if f"{_FIRST}ffn_gate.0.weight" in header.tensors:
        raise CheckpointError(
            f"{header.file}: a tensor for each expert ({_FIRST}ffn_gate.0.weight), as llama.cpp wrote Mixtral before "
            f"April 2024: take a newer file, or {_OTHER}"
        )
    norm = header.tensors.get(f"{_FIRST}attn_q_norm.weight")
    if header.architecture == "stablelm" and norm is not None and len(norm.shape) > 1:
        raise CheckpointError(
            f"{header.file}: a norm for each head ({norm.name}), as StableLM 2 12B has: it is not built"
        )


def _windows(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """`layer_types`, where the file says layer by layer which of them have a window."""
    attention = _mapping(facts.get("attention"))
    pattern = attention.get(_PATTERN.partition(".")[2])
    if not isinstance(pattern, list):
        return None
    return tuple("sliding_attention" if each else "full_attention" for each in pattern)


def _unread(header: Header, table: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Facts about the architecture that would be passed over in silence, and are not what they are without a word."""
    harmless, begin = _table()["unread"], f"{header.architecture}."
    read = {*_SCALING, *(key for rule in table["config"].values() for key in keys(rule))}
    heads, size = (
        values.get(a, values.get(b)) for a, b in (("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
    )
    head = values.get("head_dim") or (size // heads if type(size) is type(heads) is int and heads else None)
    for key in sorted(each.removeprefix(begin) for each in header.facts if each.startswith(begin)):
        value, usual = header.facts[begin + key], harmless.get(key)
        expected = head if usual == "head" else usual
        if key in read or usual == "any" or value == expected or (not value and key not in harmless):
            continue
        yield f"`{key}` is {value!r:.100}, which config.json would not say: {_OTHER}"


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
    """`rope_scaling`, by the facts of `rope` or by factors that are tensors (llama.cpp src/llama-model.cpp)."""
    rope = _mapping(facts.get("rope"))
    found = _mapping(rope.get("scaling"))
    kind, factor = found.get("type", "linear"), found.get("factor", rope.get("scale_linear")) or 1.0
    short, long, factors = (numbers(header, name, read) for name in (SHORT, LONG, LLAMA3))
    if (short is None) != (long is None):
        raise CheckpointError(f"{header.file}: one of the tensors {SHORT} and {LONG}, without the other: get it again")
    if short is not None:
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{header.file}: rope.scaling.type `{kind!s:.60}` without its factors is not read: {_OTHER}"
        )
    plain = kind == "none" or factor == 1.0
    if factors is not None and not plain:
        raise CheckpointError(f"{header.file}: rope is scaled by {factor!r:.40} and by {LLAMA3}: {_OTHER}")
    if factors is not None:
        return _llama3(header, factors, made.get("rope_theta"))
    if plain:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    more = {"beta_fast": found.get("yarn_beta_fast"), "beta_slow": found.get("yarn_beta_slow"),
            "attention_factor": found.get("yarn_attn_factor")}  # fmt: skip
    if (factor_of_scale := found.get("yarn_log_multiplier")) is not None:  # DeepSeek's, both of one value
        more |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * factor_of_scale, 5))
    given = {key: value for key, value in more.items() if value is not None}
    original = found.get("original_context_length", facts.get("context_length"))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **given}


def _llama3(header: Header, factors: list[float], theta: Any) -> dict[str, Any]:
    """The scaling `llama3` whose factors these are (transformers modeling_rope_utils.py)."""
    sound = is_above(1, theta) and all(is_above(0, each) for each in factors)
    for length in (8192, 4096, 16384, 32768) if sound and factors else ():
        scaling = {"rope_type": "llama3", "factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": length}  # fmt: skip
        expected = list(_factors(max(factors), length, theta, len(factors)))
        if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(factors, expected, strict=True)):
            return scaling
    raise CheckpointError(f"{header.file}: the factors in {LLAMA3} are not those of Llama 3's scaling: {_OTHER}")


def _factors(factor: float, length: int, theta: float, count: int) -> Iterator[float]:
    for pair in range(count):
        turns = length / (2 * math.pi * theta ** (pair / count))  # in the original context
        smooth = min(1.0, max(0.0, (turns - 1) / 3))
        yield 1 / ((1 - smooth) / factor + smooth)
