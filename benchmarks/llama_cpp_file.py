"""A random llama as a GGUF file, to run llama.cpp beside our libraries (format: ggml-org/ggml docs/gguf.md)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_U32, _F32, _STRING = 4, 6, 8
_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
_BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}  # 32 weights: a float16 scale and the codes
_FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}
_ALIGNMENT = 32


def write(path: Path, kind: str, config: dict[str, Any]) -> None:
    """`kind` is Q4_0, Q8_0 or F16; norms are float32, and there is no vocabulary but its size."""
    c = config
    facts: list[tuple[str, int, Any]] = [
        ("general.architecture", _STRING, "llama"),
        ("general.file_type", _U32, _FILE_TYPES[kind]),
        ("llama.block_count", _U32, c["num_hidden_layers"]),
        ("llama.context_length", _U32, c["max_position_embeddings"]),
        ("llama.embedding_length", _U32, c["hidden_size"]),
        ("llama.feed_forward_length", _U32, c["intermediate_size"]),
        ("llama.attention.head_count", _U32, c["num_attention_heads"]),
        ("llama.attention.head_count_kv", _U32, c["num_key_value_heads"]),
        ("llama.attention.layer_norm_rms_epsilon", _F32, c["rms_norm_eps"]),
        ("llama.rope.dimension_count", _U32, c["head_dim"]),
        ("llama.vocab_size", _U32, c["vocab_size"]),
        ("tokenizer.ggml.model", _STRING, "no_vocab"),
    ]
    tensors = list(_tensors(kind, config))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(facts)) + b"".join(_fact(*fact) for fact in facts)
    offset = 0
    for name, shape, dtype in tensors:
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", _TYPES[dtype], offset)
        offset += _padded(_nbytes(shape, dtype))
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        for _, shape, dtype in tensors:
            file.write(_data(random, shape, dtype).tobytes().ljust(_padded(_nbytes(shape, dtype)), b"\0"))


def bytes_of_a_token(kind: str, config: dict[str, Any]) -> int:
    """All weights but the embedding."""
    return sum(_nbytes(shape, dtype) for name, shape, dtype in _tensors(kind, config) if name != "token_embd.weight")


def _tensors(kind: str, c: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    query, key = (c[f"num_{name}_heads"] * c["head_dim"] for name in ("attention", "key_value"))
    layer: list[tuple[str, tuple[int, ...]]] = [
        ("attn_norm", (hidden,)),
        ("ffn_norm", (hidden,)),
        ("attn_q", (query, hidden)),
        ("attn_k", (key, hidden)),
        ("attn_v", (key, hidden)),
        ("attn_output", (hidden, query)),
        ("ffn_gate", (inner, hidden)),
        ("ffn_up", (inner, hidden)),
        ("ffn_down", (hidden, inner)),
    ]
    named = [("token_embd", (vocab, hidden)), ("output", (vocab, hidden)), ("output_norm", (hidden,))]
    named += [(f"blk.{i}.{name}", shape) for i in range(c["num_hidden_layers"]) for name, shape in layer]
    return [(f"{name}.weight", shape, kind if len(shape) == 2 else "F32") for name, shape in named]


def _data(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    count = int(np.prod(shape))
    if dtype in ("F32", "F16"):
        values = np.resize(random.standard_normal(1 << 16, np.float32) * (0.02 if dtype == "F16" else 1.0), count)
        return values.astype(np.float16) if dtype == "F16" else values
    blocks = np.resize(
        random.integers(0, 256, (1 << 12, _BLOCK_BYTES[dtype]), np.uint8), (count // 32, _BLOCK_BYTES[dtype])
    )
    blocks[:, :2] = np.array([0.003 if dtype == "Q4_0" else 0.0002], np.float16).view(np.uint8)
    return blocks


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    count = int(np.prod(shape))
    return count // 32 * _BLOCK_BYTES[dtype] if dtype in _BLOCK_BYTES else count * (4 if dtype == "F32" else 2)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _fact(key: str, kind: int, value: Any) -> bytes:
    data = _string(value) if kind == _STRING else struct.pack("<f" if kind == _F32 else "<I", value)
    return _string(key) + struct.pack("<I", kind) + data
