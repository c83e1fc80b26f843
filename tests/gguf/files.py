"""A tiny llama as a GGUF file, written by llama.cpp's own `gguf`, each matrix in another type."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

Array = npt.NDArray[Any]
HIDDEN, INNER, HEADS, GROUPS, LAYERS = 256, 512, 4, 2, 3  # rows of whole blocks of 256
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab", "<|end|>"]
TYPES = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1, 3]
FACTS: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": GROUPS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HIDDEN // HEADS,
    "llama.rope.freq_base": 50000.0,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))],
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": len(TOKENS) - 1,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
}
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
# Most of the types that `gguf` computes floats of: all ways in which it stores blocks.
KINDS = tuple(
    gguf.GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
                 "IQ4_NL", "IQ4_XS", "MXFP4", "IQ2_XXS", "IQ3_S", "IQ1_M", "TQ1_0", "TQ2_0")
)  # fmt: skip


def write(
    path: Path, facts: Mapping[str, Any] = {}, kinds: Sequence[Any] = KINDS, split: int = 0, without: str = ""
) -> None:
    """The model, its matrices in these types in turn; in parts of `split` tensors each, and without one tensor."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    for key, value in {**FACTS, **facts}.items():
        if value is not None:
            _add(writer, key, value)
    random = np.random.default_rng(0)
    turn = itertools.cycle(kinds)
    shapes = {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "output": (len(TOKENS), HIDDEN)}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else next(turn)
        data = _random(random, shape, kind)
        if f"{name}.weight" != without:
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)


def _random(random: np.random.Generator, shape: tuple[int, ...], kind: Any) -> Array:
    """Numbers in this type; where `gguf` only reads it, random bytes that are finite numbers."""
    values = random.normal(0, 0.05, shape).astype(np.float32)
    if kind == gguf.GGMLQuantizationType.F32:
        return values + np.float32(len(shape) == 1)
    try:
        made: Array = quantize(values, kind)
        return made
    except NotImplementedError:
        pass
    block, size = GGML_QUANT_SIZES[kind]
    words = random.integers(0, 256, (values.size // block, size), np.uint8)
    while True:
        with np.errstate(all="ignore"):
            bad = ~np.isfinite(dequantize(words, kind)).all(axis=1)
        if not bad.any():
            return words.reshape(*shape[:-1], -1)
        words[bad] = random.integers(0, 256, (int(bad.sum()), size), np.uint8)
