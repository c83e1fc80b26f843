"""GPU attention by head_dim, with windows, caps, linear biases and sinks, on every device there is, against NumPy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm import target, tirx
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlcbuild.compiler.gpu import attention, lower
from mlcbuild.compiler.script import quick
from mlcbuild.models.architecture import resolve
from tests.architectures.cases import CASES
from tests.support import llama, wgsl
from tests.support.gpus import Gpu
from tests.support.llama import Array

pytestmark = pytest.mark.slow

PAGE = 16
HOST = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
SCALARS = {"causal": 0, "rotary_mode": 0, "rope_scale": 1, "rope_theta": 1}
OFFSETS = (
    "q_indptr",
    "kv_indptr",
    "page_indptr",
    "page_values",
    "k_rope_pos_offset",
    "q_rope_position",
    "length_info",
    "pages",
)


@dataclass(frozen=True)
class Shape:
    """window and cap as a structure has them; scales below zero are those of layers that slide."""

    dim: int
    heads: int
    kv_heads: int
    dtype: str = "float16"
    window: int | None = None
    cap: float | None = None
    bias: float | None = None  # ALiBi's largest
    sinks: bool = False
    rank: int = 0  # of rows of latents: the numbers of their value

    def __str__(self) -> str:
        return f"{self.dim}-{self.dtype}{'-latents' if self.rank else ''}"

    @property
    def cached(self) -> tuple[int, int]:
        """Heads of queries, and width of heads in the cache, which has halves of rows."""
        return (2 * self.heads, self.dim // 2) if self.rank else (self.heads, self.dim)

    def whole(self, halves: Array) -> Array:
        """Queries or results by the model's heads."""
        return halves.reshape(len(halves), self.heads, -1)

    def joined(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values [n, kv_heads, dim], of halves of rows of latents, too."""
        row = np.concatenate([k, v], axis=-1)
        return (row, row[..., : self.rank]) if self.rank else (k, v)

    @property
    def scales(self) -> tuple[float, ...]:
        return (self.dim**-0.5,) if self.window is None else (self.dim**-0.5, -(self.dim**-0.5))

    @property
    def bound(self) -> float:
        return 1e-5 if self.dtype == "float32" else 3e-3

    def numbers(self, seed: int, *shape: int) -> Array:
        return np.random.default_rng(seed).standard_normal(shape).astype(self.dtype)

    def row(self, q: Array, k: Array, v: Array, scale: float, head: int, own: bool = True) -> tuple[Array, float]:
        """q [dim] over k and v [n, dim], neighbours in a text, in float64; and the logarithm of base 2 of the sum.

        `own`: the row's key is among these, and a sink's share with it, whose logit is the query's last number.
        """
        scores = k.astype(np.float64) @ q.astype(np.float64) * scale
        if self.bias is not None:
            scores = scores - self.slope(head) * np.arange(len(k))[::-1]
        scores = scores if self.cap is None else self.cap * np.tanh(scores / self.cap)
        most = scores.max()
        weights = np.exp(scores - most)
        total = weights.sum() + (np.exp(float(q[-1]) - most) if self.sinks and own else 0)
        return weights @ v.astype(np.float64) / total, float((most + np.log(total)) / np.log(2))

    def slope(self, head: int) -> float:
        """Press et al., arXiv 2108.12409: of twelve heads, eight as of eight, and every second one of sixteen."""
        power = 1 << (self.heads.bit_length() - 1)
        exponent = (head + 1) / power if head < power else (2 * (head - power) + 1) / (2 * power)
        return float(2.0 ** -((self.bias or 0.0) * exponent))


SHAPES = (
    Shape(32, 4, 2, "float32", 12, 0.5, sinks=True),
    Shape(64, 6, 2),
    Shape(80, 4, 4, "float32", sinks=True),
    Shape(96, 3, 1, window=12),
    Shape(128, 4, 1, cap=0.5, sinks=True),
    Shape(256, 2, 1, "float32"),
    Shape(256, 2, 1),
    Shape(40, 12, 4, "float32", bias=8.0),
    Shape(512, 3, 1),
    Shape(512, 2, 2, "float32", bias=8.0),
    Shape(64, 3, 1, "float32", 12, rank=28),
    Shape(288, 5, 1, cap=0.5, rank=256),
    Shape(576, 4, 1, rank=512),
)
TWICE = (("256-float32", "spirv"), ("512-float16", "wgsl"), ("512-float32", "spirv"))


class Attention:
    """The kernels of a shape on a device."""

    def __init__(self, gpu: Gpu, shape: Shape) -> None:
        self.gpu, self.shape = gpu, shape
        structure = llama.structure_of(llama.transformers_llama(head_dim=shape.dim))
        sinks = [dataclasses.replace(structure.rules[0], role="sinks")] if shape.sinks else []
        structure = dataclasses.replace(
            structure,
            rules=(*structure.rules, *sinks),
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            sliding_window_size=shape.window,
            attn_logit_softcapping=shape.cap,
            alibi_bias_max=shape.bias,
            kv_lora_rank=shape.rank,
            rotary_dim=shape.dim - shape.rank if shape.rank else None,
        )
        device = target.Target(dict(gpu.TARGET))
        with quick(), device:
            self.ragged, self.prefill, self.decode = attention.kernels(structure, shape.dtype, device)

    def run(self, function: Any, arrays: dict[str, Array], scalars: dict[str, Any]) -> tuple[Array, Array]:
        offsets = {f"{name}_elem_offset": 0 for name in OFFSETS}
        given = {name: array for name, array in arrays.items() if name not in ("output", "lse")}
        if "Q" in given and "Q" not in [str(param.name) for param in function.params]:  # TVM's prefill, made to decode
            names = {"Q": "q", "page_table_indptr": "page_indptr", "page_table_values": "page_values"}
            given = {names.get(name, name): array for name, array in given.items()}
            scalars = {**scalars, "batch_size": scalars["B"], "total_len": scalars["B"]}
        rows = (arrays["q"] if "q" in arrays else arrays["Q"]).shape
        empty: dict[str, Array] = {"output": np.zeros(rows, self.shape.dtype), "lse": np.zeros(rows[:2], np.float32)}
        empty |= {"parts": np.zeros(1, np.float32), "sums": np.zeros(1, np.float32)}  # there is one part
        scalars = {**SCALARS, **offsets, **scalars}
        found = self.gpu.launch(function, 0, {**given, **empty}, scalars)
        return found["output"], found["lse"]

    def run_in_parts(self, arrays: dict[str, Array], scalars: dict[str, Any], count: int) -> tuple[Array, Array]:
        """Decoding by two kernels, the second of which joins `count` parts."""
        scalars = {**SCALARS, **{f"{name}_elem_offset": 0 for name in OFFSETS}, **scalars}
        batch, heads, dim = arrays["Q"].shape
        empty: dict[str, Array] = {
            "output": np.zeros((batch, heads, dim), self.shape.dtype),
            "lse": np.zeros((batch, heads), np.float32),
            "parts": np.full(batch * count * heads * (dim + 4) + 4, np.nan, np.float32),
        }
        given = {**arrays, **empty}
        given["parts"] = self.gpu.launch(self.decode, 0, given, scalars)["parts"]
        found = self.gpu.launch(self.decode, 1, given, scalars)
        return found["output"], found["lse"]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def attended(gpu: Gpu, request: pytest.FixtureRequest) -> Attention:
    shape: Shape = request.param
    if (str(shape), gpu.name) in TWICE:
        pytest.skip("the kernels of the other one, for the same device, which is slow to compile them")
    return Attention(gpu, shape)


def test_new_tokens(attended: Attention) -> None:
    shape, n = attended.shape, 40
    q = shape.numbers(0, n, *shape.cached)
    k, v = (shape.numbers(seed, n, shape.kv_heads, shape.cached[1]) for seed in (1, 2))
    indptr = np.array([0, 9, n], np.int32)
    arrays = {
        **{"q": q, "k": k, "v": v, "q_indptr": indptr, "kv_indptr": indptr},
        **{"q_rope_position": np.zeros(n, np.int32), "k_rope_pos_offset": np.zeros(2, np.int32)},
    }
    for scale in shape.scales:
        sizes = {"batch_size": 2, "qo_len": n, "kv_len": n, "causal": 1, "sm_scale": scale}
        got, lse = map(shape.whole, attended.run(attended.ragged, arrays, sizes))
        keys, values = shape.joined(k, v)
        for i in range(n):
            start = 0 if i < 9 else 9
            seen = slice(max(start, i + 1 - (shape.window or n)) if scale < 0 else start, i + 1)
            for head in range(shape.heads):
                kv = head * shape.kv_heads // shape.heads
                expected, total = shape.row(shape.whole(q)[i, head], keys[seen, kv], values[seen, kv], abs(scale), head)
                assert np.abs(got[i, head, : len(expected)] - expected).max() < shape.bound
                assert shape.bias is not None or np.abs(lse[i, head] - total).max() < 1e-3


def cache(shape: Shape) -> dict[str, Array]:
    """Two sequences: 45 tokens from position 30 on, and 3 from 0 on."""
    return {
        "pages": shape.numbers(3, 6, 2, shape.kv_heads, PAGE, shape.cached[1]),
        "page_indptr": np.array([0, 3, 4], np.int32),
        "page_values": np.array([4, 1, 5, 2], np.int32),
        "length_info": np.array([13, 3], np.int32),
        "k_rope_pos_offset": np.array([30, 0], np.int32),
    }


def visible(shape: Shape, arrays: dict[str, Array], b: int, position: int, scale: float) -> tuple[Array, Array] | None:
    """Keys and values [n, kv_heads, dim] that a row at `position` sees."""
    values = arrays["page_values"][arrays["page_indptr"][b] : arrays["page_indptr"][b + 1]]
    length, start = (45, 3)[b], int(arrays["k_rope_pos_offset"][b])
    first = max(0, position - (shape.window or 0) + 1 - start) if scale < 0 else 0
    if first >= length:
        return None
    slots = [(values[p // PAGE], p % PAGE) for p in range(first, length)]
    k, v = (np.stack([arrays["pages"][page, side, :, slot] for page, slot in slots]) for side in (0, 1))
    return k, v


def check_cached(shape: Shape, arrays: dict[str, Array], rows: list[tuple[int, int]], scale: float, got: Any) -> None:
    """rows: of which sequence each row is, and its position."""
    output, lse = map(shape.whole, got)
    q = shape.whole(arrays["q"] if "q" in arrays else arrays["Q"])
    for i, (b, position) in enumerate(rows):
        seen = visible(shape, arrays, b, position, scale)
        for head in range(shape.heads):
            if seen is None:
                assert lse[i, head].max() < -4e4  # counts for nothing where both attentions are merged
                continue
            kv = head * shape.kv_heads // shape.heads
            own = position - int(arrays["k_rope_pos_offset"][b]) < (45, 3)[b]
            keys, values = shape.joined(seen[0][:, kv], seen[1][:, kv])
            expected, total = shape.row(q[i, head], keys, values, abs(scale), head, own)
            assert np.abs(output[i, head, : len(expected)] - expected).max() < shape.bound
            assert shape.bias is not None or np.abs(lse[i, head] - total).max() < 1e-3


def test_new_tokens_over_cached_pages(attended: Attention) -> None:
    shape, n = attended.shape, 20
    positions = [*range(71, 86), *range(2, 7)]  # of the first five, the own key is in the cache: others share a prefix
    arrays = cache(shape) | {
        "q": shape.numbers(4, n, *shape.cached),
        "q_indptr": np.array([0, 15, n], np.int32),
        "q_rope_position": np.array(positions, np.int32),
    }
    for scale in shape.scales:
        sizes = {"batch_size": 2, "total_len": n, "nnz_pages": 4, "max_num_pages": 6, "sm_scale": scale}
        got = attended.run(attended.prefill, arrays, sizes)
        rows = [(int(i >= 15), position) for i, position in enumerate(positions)]
        check_cached(shape, arrays, rows, scale, got)


def test_one_token_over_cached_pages(attended: Attention) -> None:
    shape, made = attended.shape, cache(attended.shape)
    positions = np.array([74, 2], np.int32)  # their own keys are in the cache
    arrays = made | {"Q": shape.numbers(5, 2, *shape.cached), "q_rope_position": positions}
    arrays |= {"page_table_indptr": made["page_indptr"], "page_table_values": made["page_values"]}
    for scale in shape.scales:
        sizes = {"B": 2, "nnz_pages": 4, "max_num_pages": 6, "sm_scale": scale}
        got = attended.run(attended.decode, arrays, sizes)
        check_cached(shape, arrays, [*enumerate(map(int, positions))], scale, got)


PARTS = (
    Shape(64, 6, 2, window=100),
    Shape(128, 9, 1, cap=0.5, sinks=True),
    Shape(80, 2, 1, "float32", bias=8.0),
    Shape(256, 2, 2),
)


@pytest.mark.parametrize("shape", PARTS, ids=str)
def test_one_token_over_keys_in_parts(gpu: Gpu, shape: Shape) -> None:
    """Two sequences with 600 and 40 keys: three parts, of which the second one fills one only."""
    if gpu.kind == "cuda":
        pytest.skip("joins parts in the block that ends last: tests/emulation")
    lengths, pages = (600, 40), (38, 3)
    numbers = np.random.default_rng(2).permutation(66)[: sum(pages)].astype(np.int32)
    arrays = {
        "Q": shape.numbers(5, 2, shape.heads, shape.dim),
        "pages": shape.numbers(3, 66, 2, shape.kv_heads, PAGE, shape.dim),
        "page_table_indptr": np.array([0, pages[0], sum(pages)], np.int32),
        "page_table_values": numbers,
        "length_info": np.array(
            [length - (count - 1) * PAGE for length, count in zip(lengths, pages, strict=True)], np.int32
        ),
        "k_rope_pos_offset": np.array([30, 0], np.int32),
        "q_rope_position": np.array([629, 39], np.int32),
    }
    attended = Attention(gpu, shape)
    for scale in shape.scales:
        # The number of pages is only what decides how many parts there are.
        sizes = {"B": 2, "nnz_pages": 3 * 32, "max_num_pages": 66, "sm_scale": scale}
        arrays["page_table_values"] = np.resize(numbers, 3 * 32)
        output, lse = attended.run_in_parts(arrays, sizes, 3)
        for b in range(2):
            first = max(0, lengths[b] - (shape.window or 0)) if scale < 0 else 0
            slots = [(numbers[b * pages[0] + p // PAGE], p % PAGE) for p in range(first, lengths[b])]
            k, v = (np.stack([arrays["pages"][page, side, :, slot] for page, slot in slots]) for side in (0, 1))
            for head in range(shape.heads):
                kv = head * shape.kv_heads // shape.heads
                expected, total = shape.row(arrays["Q"][b, head], k[:, kv], v[:, kv], abs(scale), head)
                assert np.abs(output[b, head] - expected).max() < shape.bound
                assert shape.bias is not None or abs(lse[b, head] - total) < 1e-3


@pytest.mark.parametrize(
    ("dim", "heads", "dtype"),
    [
        *((32, 8, "float32"), (64, 25, "float16"), (80, 7, "float32")),
        *((96, 3, "float16"), (128, 28, "float16"), (512, 10, "float32")),
    ],
)
def test_a1_two_attentions_become_one_whatever_order_threads_run_in(gpu: Gpu, dim: int, heads: int, dtype: str) -> None:
    """Row A1: a subgroup that is narrower than the threads of a row, and numbers of heads that fill no block of them.

    lavapipe's subgroups have 4 or 8 threads, a row has dim / 4 of them.
    """
    random, n = np.random.default_rng(3), 9
    v, v_other = (random.standard_normal((n, heads, dim)).astype(dtype) for _ in range(2))
    s, s_other = (3 * random.standard_normal((n, heads)).astype(np.float32) for _ in range(2))
    s_other[4] = -5e4  # an attention over no keys
    function = attention.merge(heads, dim, dtype, 256)
    got = gpu.launch(function, 0, {"V": v, "S": s, "V_other": v_other, "S_other": s_other}, {"N": n})
    largest = np.maximum(s, s_other).astype(np.float64)
    a, b = np.exp2(s - largest), np.exp2(s_other - largest)
    expected = (v * a[..., None] + v_other * b[..., None]) / (a + b)[..., None]
    assert np.abs(got["V"] - expected).max() < (2e-3 if dtype == "float16" else 1e-6)
    assert np.abs(got["S"] - (np.log2(a + b) + largest)).max() < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "phi-norms", "stablelm-norms"])
def test_decoders_with_these_choices_become_gpu_libraries(name: str) -> None:
    """Caps of scores and logits, windows, a second theta, norms of heads in every form, biases of the head."""
    from transformers import AutoConfig

    given = {**CASES[name].config, "hidden_size": 128}  # heads of 32
    config = AutoConfig.for_model(given.pop("model_type"), **given).to_dict()
    limits = {"context_window_size": 64, "max_batch_size": 2}
    structure = resolve(llama.architecture(CASES[name].architecture), config, limits)
    module = lower.lower(structure, llama.QUANTIZATIONS["q4f16_1"], "q4f16_1", {**wgsl.TARGET, "host": HOST})
    names = {variable.name_hint for variable in module.get_global_vars()}
    assert {"create_tir_paged_kv_cache", "attention_prefill", "attention_decode"} <= names


@pytest.mark.parametrize(("dim", "kv_heads", "dtype"), [(32, 3, "float32"), (80, 2, "float16"), (512, 1, "float16")])
def test_what_the_cache_writes_and_copies(gpu: Gpu, dim: int, kv_heads: int, dtype: str) -> None:
    """TVM's kernels: new keys and values go to their places, the first tokens of a page into another, tokens closer."""
    device, size = target.Target(dict(gpu.TARGET)), tirx.Var("page_size", "int64")
    with quick(), device:
        append = tvm_kv_cache._kv_cache_transpose_append(kv_heads, dim, dtype)
        copy = tvm_kv_cache._copy_single_page(kv_heads, size, dim, dtype, device)
        compact = tvm_kv_cache._compact_kv_copy(kv_heads, dim, dtype, device)
    random = np.random.default_rng(6)
    pages = random.standard_normal((4, 2, kv_heads, PAGE, dim)).astype(dtype)
    k, v = (random.standard_normal((5, kv_heads, dim)).astype(dtype) for _ in range(2))
    moved = ("pages", "position_map", "copy_length_indptr", "copy_src_dst_pos")
    sizes = {**{f"{name}_elem_offset": 0 for name in moved}, "num_pages": 4, "page_size": PAGE}
    places = np.array([47, 17, -1, 0, 63], np.int32)  # one is not kept
    given = {"pages": pages, "k_data": k, "v_data": v, "position_map": places}
    expected = pages.copy()
    for token, place in enumerate(places):
        if place >= 0:
            expected[place // PAGE, :, :, place % PAGE] = k[token], v[token]
    counts = {"ntoken": 5, "num_tokens_excluding_cache": 5, **sizes}
    assert (gpu.launch(gpu.scheduled(append), 0, given, counts)["pages"] == expected).all()

    expected = pages.copy()
    expected[3, :, :, :9] = pages[1, :, :, :9]
    counts = {"src_page_id": 1, "tgt_page_id": 3, "copy_length": 9, **sizes}
    assert (gpu.launch(copy, 0, {"pages": pages}, counts)["pages"] == expected).all()

    moves = np.array([[5, 7, 40], [4, 5, 33]], np.int32)  # from, to: two of the first sequence, one of the second
    given = {"pages": pages, "copy_length_indptr": np.array([0, 2, 3], np.int32), "copy_src_dst_pos": moves}
    expected = pages.copy()
    for source, place in moves.T:
        expected[place // PAGE, :, :, place % PAGE] = expected[source // PAGE, :, :, source % PAGE]
    counts = {"batch_size": 2, "total_copy_length": 3, **sizes}
    assert (gpu.launch(compact, 0, given, counts)["pages"] == expected).all()
