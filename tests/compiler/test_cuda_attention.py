"""Attention on CUDA devices in 16-bit floats, at decode with keys in parts that are joined, against NumPy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import groupby
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
LENGTHS = (900, 3, 129, 16)  # of sequences, their first cached tokens at these positions
OFFSETS = (30, 0, 7, 0)
SHAPES: dict[str, dict[str, Any]] = {
    "32": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2},
    "40-sinks": {"head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    "64-window-sinks": {
        **{"head_dim": 64, "num_attention_heads": 10, "num_key_value_heads": 1, "sliding_window_size": 37}
    },
    "80-biases": {"head_dim": 80, "num_attention_heads": 12, "num_key_value_heads": 12, "alibi_bias_max": 8.0},
    "96-chunks": {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window_size": 64},
    "128": {"head_dim": 128, "num_attention_heads": 28, "num_key_value_heads": 4},
    "256-cap": {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": 0.7},
    "280-sinks": {"head_dim": 280, "num_attention_heads": 3, "num_key_value_heads": 1},
    "512-window": {"head_dim": 512, "num_attention_heads": 9, "num_key_value_heads": 1, "sliding_window_size": 50},
    # Rows of latents: DeepSeek's; MiniCPM 3's, whose halves end within a load; 36 numbers in 64, 28 of them the value.
    "576-latents": {"kv_lora_rank": 512, "rotary_dim": 64, "num_attention_heads": 20, "num_key_value_heads": 20},
    "288-latents-cap": {
        **{"kv_lora_rank": 256, "rotary_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 5},
        **{"attn_logit_softcapping": 0.7},
    },
    "36-latents-window": {
        **{"kv_lora_rank": 28, "rotary_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 3},
        **{"sliding_window_size": 37},
    },
}


def structure(name: str) -> Structure:
    given = dict(SHAPES[name])
    model = llama.structure_of(llama.transformers_llama(head_dim=given.get("head_dim", 32)))
    sinks = [dataclasses.replace(model.rules[0], role="sinks")] if name.endswith("sinks") else []
    return dataclasses.replace(model, **given, chunked=name.endswith("chunks"), rules=(*model.rules, *sinks))


def rows_of(s: Structure, halves: Array) -> Array:
    """Queries or results [n, heads of the cache, width] by the model's heads."""
    return halves.reshape(len(halves), s.num_attention_heads, -1)


def key_and_value(s: Structure, keys: Array, values: Array) -> tuple[Array, Array]:
    """Of [n, width], as the cache has them: of latents, the first half of rows and the second one."""
    row = np.concatenate([keys, values], axis=1)
    return (row, row[:, : s.kv_lora_rank]) if s.absorbed else (keys, values)


def expected(s: Structure, q: Array, k: Array, v: Array, head: int, scale: float, back: Array, position: int) -> Any:
    """The mean of values, which are `back` positions before their query, and the logarithm of base 2 of the sum.

    A sink, the query's last number, counts unless the query is behind all of the keys.
    """
    scores = k.astype(np.float64) @ q.astype(np.float64) * abs(scale)
    if s.attn_logit_softcapping:
        scores = s.attn_logit_softcapping * np.tanh(scores / s.attn_logit_softcapping)
    if s.alibi_bias_max:  # twelve heads: the eight of the power of two, and four between them
        slopes = [2.0 ** -(i + 1) for i in range(8)] + [2.0 ** -(i + 0.5) for i in range(4)]
        scores = scores - slopes[head] * back
    if scale < 0:
        window = s.sliding_window_size or 0
        scores[back >= (position % window + 1 if s.chunked else window)] = -np.inf
    if not len(scores) or scores.max() == -np.inf:
        return np.zeros(v.shape[-1]), -5e4
    most = scores.max()
    shares = np.exp(scores - most)
    total = shares.sum() + (np.exp(float(q[-1]) - most) if "sinks" in s.roles() and back.min() <= 0 else 0)
    return shares @ v.astype(np.float64) / total, float((most + np.log(total)) / np.log(2))


class Cached:
    """Sequences of LENGTHS tokens in pages, and what a call's rows of `rows` new tokens each are compared with."""

    def __init__(self, name: str, dtype: str, rows: Sequence[int], own: int) -> None:
        import ml_dtypes

        self.kind: Any = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        self.structure, self.rows, self.bound = structure(name), rows, 2e-3 if dtype == "float16" else 1.6e-2
        s, random = self.structure, np.random.default_rng(1)
        heads, *self.shape = s.cache_heads
        counts = [-(-length // PAGE) for length in LENGTHS]
        self.indptr = np.cumsum([0, *counts]).astype(np.int32)
        self.numbers = random.permutation(self.indptr[-1] + 3)[: self.indptr[-1]].astype(np.int32)
        pages = random.standard_normal((self.indptr[-1] + 3, 2, self.shape[0], PAGE, self.shape[1])).astype(self.kind)
        for b, length in enumerate(LENGTHS):  # what no sequence has written may be anything
            pages[self.numbers[self.indptr[b + 1] - 1], :, :, (length - 1) % PAGE + 1 :] = np.nan
        self.pages = pages
        self.query = random.standard_normal((sum(rows), heads, self.shape[1])).astype(self.kind)
        # A row's position: the last of them has the last key for its own, or is so many behind it.
        last = [a + b - 1 + own for a, b in zip(LENGTHS, OFFSETS, strict=True)]
        self.positions = np.concatenate([np.arange(end - n + 1, end + 1) for end, n in zip(last, rows, strict=True)])

    def arrays(self, names: str) -> dict[str, Any]:
        """By the names of a kernel's arguments, of which those of queries and pages are given."""
        query, indptr, numbers = names.split()
        lengths = [(length - 1) % PAGE + 1 for length in LENGTHS]
        return {
            **{query: self.query, "pages": self.pages, indptr: self.indptr, numbers: self.numbers},
            "length_info": np.array(lengths, np.int32),
            "k_rope_pos_offset": np.array(OFFSETS, np.int32),
            "q_rope_position": self.positions.astype(np.int32),
            "output": np.zeros(self.query.shape, self.kind),
            "lse": np.zeros(self.query.shape[:2], np.float32),
        }

    @property
    def scales(self) -> tuple[float, ...]:
        scale = self.shape[1] ** -0.5
        return (scale, -scale) if self.structure.sliding_window_size else (scale,)

    def run(self, function: Any, kernels: int, arrays: dict[str, Any], sizes: dict[str, int], scale: float) -> Any:
        moved = {f"{key}_elem_offset": 0 for key in (*arrays, "page_indptr", "page_values")}
        for which in range(kernels):
            arrays |= CUDA.launch(function, which, arrays, {"sm_scale": scale, **sizes, **moved})
        return arrays

    def check(self, made: dict[str, Any], scale: float) -> None:
        s, kv_heads = self.structure, self.shape[0]
        heads, queries, output = s.num_attention_heads, rows_of(s, self.query), rows_of(s, made["output"])
        row = 0
        for b, count in enumerate(self.rows):
            own = self.numbers[self.indptr[b] : self.indptr[b + 1]]
            for position in map(int, self.positions[row : row + count]):
                back = position - OFFSETS[b] - np.arange(LENGTHS[b])
                for head in range(heads):
                    kv = head * kv_heads // heads
                    sides = (np.concatenate([self.pages[n, side, kv] for n in own])[: LENGTHS[b]] for side in (0, 1))
                    k, v = key_and_value(s, *sides)
                    value, lse = expected(s, queries[row, head], k, v, head, scale, back, position)
                    where = (b, position, head, scale)
                    error = np.abs(output[row, head, : v.shape[1]].astype(np.float64) - value).max()
                    assert error < self.bound, where
                    assert np.abs(made["lse"][row].reshape(heads, -1)[head] - lse).max() < 1e-3, where
                row += 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_decoding_with_keys_in_parts(name: str, dtype: str) -> None:
    cached, n = Cached(name, dtype, [1] * len(LENGTHS), 0), len(LENGTHS)
    heads = cached.structure.num_attention_heads
    dim = -(-cached.structure.kv_lora_rank // 8) * 8 or cached.shape[1]
    with quick():
        function = cuda_attention.decode(cached.structure, dtype)
    pages = int(cached.indptr[-1])
    splits = pages // (2 * cuda_attention.WARPS * n)
    assert splits == 2
    sizes = {"B": n, "nnz_pages": pages, "max_num_pages": len(cached.pages)}
    for scale in cached.scales:
        arrays = cached.arrays("Q page_table_indptr page_table_values")
        arrays["parts"] = np.full(n * splits * heads * dim, np.nan, np.float32)
        arrays["sums"] = np.full(n * splits * heads * 2, np.nan, np.float32)
        cached.check(cached.run(function, 1, arrays, sizes, scale), scale)


@pytest.mark.slow
def test_more_parts_than_are_joined_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven, of one sequence; and nothing is counted once they are joined."""
    monkeypatch.setattr(f"{__name__}.LENGTHS", (1400,))
    monkeypatch.setattr(f"{__name__}.OFFSETS", (30,))
    cached = Cached("40-sinks", "float16", [1], 1)  # its own key is elsewhere, or it would be put into the cache first
    heads, dim = cached.query.shape[1:]
    with quick():
        function = cuda_attention.decode(cached.structure, "float16")
    sizes = {"B": 1, "nnz_pages": int(cached.indptr[-1]), "max_num_pages": len(cached.pages)}
    for _ in range(2):
        arrays = cached.arrays("Q page_table_indptr page_table_values")
        arrays["parts"] = np.full(11 * heads * dim, np.nan, np.float32)
        arrays["sums"] = np.full(11 * heads * 2, np.nan, np.float32)
        cached.check(cached.run(function, 1, arrays, sizes, 0.2), 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_new_tokens_over_cached_ones(name: str) -> None:
    rows = (9, 70, 0, 1)
    cached = Cached(name, "float16", rows, 12)
    cached.positions[5:9] -= 150  # sequences that share a prefix are one here, and their tokens begin anew
    cached.positions[40:60] += 41
    with quick():
        function = cuda_attention.prefill(cached.structure, "float16")
    sizes = {"batch_size": len(rows), "total_len": sum(rows), "causal": 0}
    sizes |= {"nnz_pages": int(cached.indptr[-1]), "max_num_pages": len(cached.pages)}
    for scale in cached.scales:
        arrays = cached.arrays("q page_indptr page_values")
        arrays["q_indptr"] = np.cumsum([0, *rows]).astype(np.int32)
        cached.check(cached.run(function, 1, arrays, sizes, scale), scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_new_tokens_over_each_other(name: str, dtype: str) -> None:
    counts = (1, 83, 0, 18)
    cached = Cached(name, dtype, counts, max(counts))
    s, (kv_heads, dim), n = cached.structure, cached.shape, sum(counts)
    random = np.random.default_rng(2)
    k, v = (random.standard_normal((n, kv_heads, dim)).astype(cached.kind) for _ in range(2))
    starts = np.cumsum([0, *counts]).astype(np.int32)
    with quick():
        function = cuda_attention.ragged(s, dtype)
    sizes = {"batch_size": len(counts), "qo_len": n, "kv_len": n, "causal": 1}
    for scale in cached.scales:
        arrays = {"q": cached.query, "q_indptr": starts, "k": k, "v": v, "kv_indptr": starts}
        arrays |= {name: cached.arrays("q i n")[name] for name in ("q_rope_position", "output", "lse")}
        made = cached.run(function, 1, arrays, {**sizes, "k_rope_pos_offset_elem_offset": 0}, scale)
        for row in range(n):
            start = int(starts[np.searchsorted(starts, row, "right") - 1])
            back, position = row - np.arange(start, row + 1), int(cached.positions[row])
            queries, output = rows_of(s, cached.query)[row], rows_of(s, made["output"])[row].astype(np.float64)
            for head in range(s.num_attention_heads):
                kv = head * kv_heads // s.num_attention_heads
                keys, values = key_and_value(s, k[start : row + 1, kv], v[start : row + 1, kv])
                value, lse = expected(s, queries[head], keys, values, head, scale, back, position)
                assert np.abs(output[head, : values.shape[1]] - value).max() < cached.bound, (row, head, scale)
                logs = made["lse"][row].reshape(s.num_attention_heads, -1)[head]
                assert np.abs(logs - lse).max() < 1e-3, (row, head, scale)


def test_what_these_kernels_do_not_take_is_left_to_others() -> None:
    made = structure("128")
    taken = [cuda_attention.takes(dataclasses.replace(made, head_dim=dim), "float16") for dim in (36, 512, 520)]
    assert taken == [False, True, False] and not cuda_attention.takes(made, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_what_is_on_its_way_from_the_cache(architecture: str, tmp_path: Path) -> None:
    """Of keys and values of heads of 128, those of Llama 3.1 8B: loads of 16 bytes, and 64 KB of a multiprocessor's."""
    made = machine_code(cuda_attention.decode, 128, architecture, tmp_path)
    (attend,) = made
    assert attend.spilled == 0
    loads = [name for name in attend.instructions[slice(*attend.loop)] if name.startswith("LDG")]
    keys = values = 8  # loads of a lane for a page; there is another of each for a page that is not full
    assert len(loads) == 2 * (keys + values) + 1 and sum(".128" in name for name in loads) == len(loads) - 1
    blocks_that_fit = 65536 // (32 * cuda_attention.WARPS * -(-attend.registers // 8) * 8)
    assert blocks_that_fit * cuda_attention.WARPS * 32 * 16 * (keys + values) >= 64 * 1024
    # What a block has written is there before it is counted, and those of others are read behind that.
    joining = [name for name in attend.instructions if re.match(r"STG|BAR|MEMBAR|ATOMG|LDG.*STRONG", name)]
    order = [name for name, _ in groupby(each.split(".")[0] for each in joining)]
    assert order[-8:] == ["STG", "BAR", "MEMBAR", "ATOMG", "MEMBAR", "BAR", "LDG", "STG"]


@pytest.mark.slow
def test_decoding_over_heads_of_512_spills_no_register(tmp_path: Path) -> None:
    (made,) = machine_code(cuda_attention.decode, 512, "sm_80", tmp_path)
    assert made.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_prompts_leave_half_of_the_issue_slots_to_tensor_cores(dim: int, tmp_path: Path) -> None:
    """A multiprocessor of sm_80 issues one instruction of each of four warps while a product of a tile takes eight."""
    for kernel in (cuda_attention.prefill, cuda_attention.ragged):
        (made,) = machine_code(kernel, dim, "sm_80", tmp_path)
        loop = made.instructions[slice(*made.loop)]
        products = sum(name.startswith("HMMA") for name in loop)
        assert made.spilled == 0 and products == (48 if dim == 512 else 32)  # half of its values, and all of its keys
        assert 8 * products >= 0.5 * len(loop)  # of which a step whose rows see all of it skips a third


def machine_code(kernel: Any, dim: int, architecture: str, folder: Path) -> list[sass.Kernel]:
    given: dict[str, Any] = {"head_dim": dim, "num_attention_heads": 32, "num_key_value_heads": 8}
    with quick():
        made = kernel(dataclasses.replace(structure("128"), **given), "float16")
    code, blocks = device_code.source(made, CUDA.TARGET)
    found = sass.kernels(sources.complete(code), architecture, folder)
    return [found[name] for name in blocks]
