"""Decoding's attention on CUDA devices, its keys in parts that are joined, against NumPy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.compiler.gpu import cuda_attention, sources
from mlcbuild.compiler.script import quick
from mlcbuild.models.structure import Structure
from tests.support import device_code, llama, sass
from tests.support.gpus import DEVICES
from tests.support.llama import Array

CUDA = DEVICES[0]
PAGE = 16
LENGTHS = (420, 3, 129, 16)  # of sequences, their first cached tokens at these positions
OFFSETS = (30, 0, 7, 0)
SHAPES: dict[str, dict[str, Any]] = {
    "32": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2},
    "40": {"head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    "64-window": {"head_dim": 64, "num_attention_heads": 10, "num_key_value_heads": 1, "sliding_window_size": 37},
    "80-biases": {"head_dim": 80, "num_attention_heads": 12, "num_key_value_heads": 12, "alibi_bias_max": 8.0},
    "96-chunks": {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window_size": 64},
    "128": {"head_dim": 128, "num_attention_heads": 28, "num_key_value_heads": 4},
    "256-cap": {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 0.7},
}


def structure(name: str) -> Structure:
    given = dict(SHAPES[name])
    model = llama.structure_of(llama.transformers_llama(head_dim=given["head_dim"]))
    return dataclasses.replace(model, **given, chunked=name.endswith("chunks"))


def expected(s: Structure, arrays: dict[str, Array], b: int, head: int, scale: float) -> tuple[Array, float]:
    """The mean of values that a sequence's new token sees, and the logarithm to base 2 of the sum of exponentials."""
    pages, numbers = arrays["pages"].astype(np.float64), arrays["page_table_values"]
    own = numbers[arrays["page_table_indptr"][b] : arrays["page_table_indptr"][b + 1]]
    kv = head * s.num_key_value_heads // s.num_attention_heads
    k, v = (np.concatenate([pages[n, side, kv] for n in own])[: LENGTHS[b]] for side in (0, 1))
    position, at = int(arrays["q_rope_position"][b]), OFFSETS[b] + np.arange(LENGTHS[b])
    scores = k @ arrays["Q"][b, head].astype(np.float64) * abs(scale)
    if s.attn_logit_softcapping:
        scores = s.attn_logit_softcapping * np.tanh(scores / s.attn_logit_softcapping)
    if s.alibi_bias_max:  # twelve heads: the eight of the power of two, and four between them
        slopes = [2.0 ** -(i + 1) for i in range(8)] + [2.0 ** -(i + 0.5) for i in range(4)]
        scores = scores - slopes[head] * (position - at)
    if scale < 0:
        window = s.sliding_window_size or 0
        scores[position - at >= (position % window + 1 if s.chunked else window)] = -np.inf
    most = scores.max()
    shares = np.exp(scores - most)
    return shares @ v / shares.sum(), float((most + np.log(shares.sum())) / np.log(2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_parts_of_keys(name: str, dtype: str) -> None:
    import ml_dtypes

    kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    s, random, n = structure(name), np.random.default_rng(1), len(LENGTHS)
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    counts = [-(-length // PAGE) for length in LENGTHS]
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    numbers = random.permutation(indptr[-1] + 3)[: indptr[-1]].astype(np.int32)
    pages = random.standard_normal((indptr[-1] + 3, 2, kv_heads, PAGE, dim)).astype(kind)
    for b, length in enumerate(LENGTHS):  # what no sequence has written may be anything
        pages[numbers[indptr[b + 1] - 1], :, :, (length - 1) % PAGE + 1 :] = np.nan
    arrays: dict[str, Any] = {
        "Q": random.standard_normal((n, heads, dim)).astype(kind),
        "pages": pages,
        "page_table_indptr": indptr,
        "page_table_values": numbers,
        "length_info": np.array([(length - 1) % PAGE + 1 for length in LENGTHS], np.int32),
        "k_rope_pos_offset": np.array(OFFSETS, np.int32),
        "q_rope_position": np.array([a + b - 1 for a, b in zip(LENGTHS, OFFSETS, strict=True)], np.int32),
    }
    with quick():
        function = cuda_attention.decode(s, dtype)
    sizes = {"B": n, "nnz_pages": int(indptr[-1]), "max_num_pages": len(pages)}
    splits = int(indptr[-1]) // (2 * cuda_attention.WARPS)
    assert splits > 3
    for scale in (dim**-0.5, *([-(dim**-0.5)] if s.sliding_window_size else [])):
        moved = {f"{key}_elem_offset": 0 for key in (*arrays, "page_indptr", "page_values")}
        scalars = {"sm_scale": scale, **sizes, **moved}
        made = {**arrays, "output": np.zeros((n, heads, dim), kind), "lse": np.zeros((n, heads), np.float32)}
        made["parts"] = np.full(n * splits * heads * dim, np.nan, np.float32)
        made["sums"] = np.full(n * splits * heads * 2, np.nan, np.float32)
        for which in range(2):
            made |= CUDA.launch(function, which, made, scalars)
        for b in range(n):
            for head in range(heads):
                value, lse = expected(s, arrays, b, head, scale)
                error = np.abs(made["output"][b, head].astype(np.float64) - value).max()
                assert error < (2e-3 if dtype == "float16" else 1.6e-2), (b, head, scale)
                assert abs(made["lse"][b, head] - lse) < 1e-3, (b, head, scale)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_what_is_on_its_way_from_the_cache(architecture: str, tmp_path: Path) -> None:
    """Of keys and values of heads of 128, those of Llama 3.1 8B: loads of 16 bytes, and 16 KB of a multiprocessor's."""
    given = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    with quick():
        made = cuda_attention.decode(dataclasses.replace(structure("128"), **given), "float16")
    code, blocks = device_code.source(made, CUDA.TARGET)
    found = sass.kernels(sources.complete(code), architecture, tmp_path)
    assert {name: kernel.spilled for name, kernel in found.items()} == dict.fromkeys(blocks, 0)
    attend = found[next(iter(blocks))]
    loads = [name for name in attend.instructions if name.startswith("LDG") and ".128" in name]
    keys = values = 8  # loads of a lane for a page
    assert len(loads) == 4 + 2 * keys + values  # the query; keys of the first page, and of the next ones
    blocks_that_fit = 65536 // (32 * cuda_attention.WARPS * -(-attend.registers // 8) * 8)
    assert blocks_that_fit * cuda_attention.WARPS * 32 * 16 * (keys + values) >= 64 * 1024
