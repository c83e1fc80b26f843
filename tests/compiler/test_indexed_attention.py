"""Attention to the keys that an indexer chooses, on the CPU and every GPU: cached keys, new ones, and both merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import target

from mlcbuild.compiler.cpu.attention import shape_of
from mlcbuild.compiler.gpu import indexed_attention, indexed_choice
from mlcbuild.compiler.script import quick
from mlcbuild.models.architecture import resolve
from mlcbuild.models.indexer import DIGITS, indexer_of
from tests.compiler.kernels import LEVELS, Kernels
from tests.models.test_odd_configs import DEEPSEEK
from tests.support.gpus import Gpu
from tests.support.llama import Array, architecture

pytestmark = pytest.mark.slow

PAGE, KEYS = 16, 37
INDEX = {"index_topk": KEYS, "index_n_heads": 5, "index_head_dim": 12, "q_lora_rank": 24, "qk_rope_head_dim": 8}
SCALARS = {"causal": 0, "rotary_mode": 0, "rope_scale": 1, "rope_theta": 1}
OFFSETS = ("q_indptr", "kv_indptr", "positions", "offsets", "pages", "indptr", "numbers", "last")
# Of rows of latents, and of whole keys and values with sinks: Hunyuan 4's.
CASES = {"latents": ("deepseek_v32", "float16"), "whole": ("hy_v4", "float32")}
# Of three sequences. Rows of the first see more keys than are chosen, some of the second, and none of the third.
HELD, NEW = (150, 30, 2), (5, 20, 3)


class Attention:
    """A structure's kernels on a device, and random keys of three sequences."""

    def __init__(self, device: Gpu | Path, name: str, dtype: str) -> None:
        """On the CPU, `device` is a folder for its kernels."""
        config = {**DEEPSEEK, **INDEX, "rope_interleave": name != "hy_v4"}
        s = resolve(architecture(name), config, {"context_window_size": 256, "prefill_chunk_size": 64})
        self.it, self.dtype = indexer_of(s), dtype
        self.joined, self.rank, self.turned = s.absorbed, s.kv_lora_rank, s.rotary_dim or 0
        self.heads, (self.queries, self.stored, self.dim) = s.num_attention_heads, s.cache_heads
        self.sinks = "sinks" in s.roles()
        if isinstance(device, Gpu):
            self.gpu = device
            made = indexed_attention.ragged, indexed_attention.prefill, indexed_attention.decode, indexed_choice.merge
            with quick(), target.Target(dict(device.TARGET)):
                self.ragged, self.prefill, self.decode, self.merging = (each(s, dtype) for each in made)
        else:
            self.shape = shape_of(s, dtype)
            self.c = Kernels(LEVELS["native"], device, dtype)
        random = np.random.default_rng(0)
        self.keys = [self._numbers(random, held + new) for held, new in zip(HELD, NEW, strict=True)]
        self.keys[0][100:153] = self.keys[0][100]  # of equal scores in both sets, the first are chosen
        self.rows = [(b, HELD[b] + i) for b in range(len(HELD)) for i in range(NEW[b])]
        self.q = random.standard_normal((len(self.rows), self.queries, self.dim)).astype(dtype)

    def _numbers(self, random: Any, count: int) -> Array:
        """[tokens, 2, heads, width]: a key and a value."""
        made: Array = random.standard_normal((count, 2, self.stored, self.dim)).astype(self.dtype)
        return made

    def call(self, which: int, kind: str, arrays: dict[str, Array]) -> tuple[Array, Array]:
        """Results and logarithms of a kernel, `kind` by the function's name; `which` is 0 where it chooses."""
        if hasattr(self, "c"):
            return self._on_cpu(which, kind, arrays)
        sizes = {"batch": 3, "sm_scale": self.scale * which, "kv": len(arrays.get("k", ()))}
        sizes |= dict.fromkeys(("held", "most"), len(arrays.get("numbers", ())))
        found: tuple[Array, Array] = self._launch(getattr(self, kind), which, arrays, sizes)
        return found

    def _on_cpu(self, which: int, kind: str, given: dict[str, Array]) -> tuple[Array, Array]:
        n, shape, new = len(given["q"]), self.shape, kind == "ragged"
        names = ("k", "v", "kv_indptr") if new else ("pages", "indptr", "numbers", "last", "offsets")
        arrays = [given["q"], given.get("q_indptr") if kind != "decode" else None, *(given[name] for name in names)]
        out, lse = np.full(given["q"].shape, np.nan, self.dtype), np.zeros((n, self.queries), np.float32)
        block = 1 if kind == "decode" else shape.rows_of_a_task
        sizes = (n, *shape.sizes, *(() if new else (PAGE,)), block)
        for task in range(-(-n // block) * shape.tasks):
            limits = task, 0, np.int32(self.sinks), 0.0, 0.0, self.scale * which
            name = f"mlcbuild_choice_{'ragged' if new else 'paged'}"
            self.c(name, *arrays, given["positions"], out, lse, *sizes, *limits)
        return out, lse

    def merge(self, one: tuple[Array, Array], other: tuple[Array, Array]) -> Array:
        if not hasattr(self, "c"):
            arrays = {"v": one[0], "s": one[1], "v_other": other[0], "s_other": other[1]}
            return self.gpu.launch(self.merging, 0, arrays, {"n": len(one[0])})["v"]
        rest = self.queries, self.dim, KEYS, self.shape.heads * self.dim, self.shape.heads
        for row in range(len(one[0])):
            self.c("mlcbuild_choice_merge", *one, *other, *rest, row)
        return one[0]

    def _launch(self, function: Any, which: int, arrays: dict[str, Array], scalars: dict[str, Any]) -> Any:
        n = len(arrays["q"])
        empty = {"out": np.full((n, self.queries, self.dim), np.nan, self.dtype)}
        empty["lse"] = np.zeros((n, self.queries), np.float32)
        scores = {"scores": np.zeros(n * 1024 + 4, np.int32)} if which == 0 else {}
        given = {**SCALARS, **{f"{name}_at": 0 for name in OFFSETS}, "n": n, **scalars}
        found = self.gpu.launch(function, which, {**arrays, **empty, **scores}, given)
        return found["out"], found.get("lse", empty["lse"])

    def over(self, which: int, q: Array) -> Any:
        """New tokens among themselves and over cached ones, merged, by kernel `which`: 0 chooses."""
        ends = np.cumsum([0, *NEW]).astype(np.int32)
        positions = np.array([position for _, position in self.rows], np.int32)
        new = np.concatenate([keys[held:] for keys, held in zip(self.keys, HELD, strict=True)])
        rows = {"q": q, "q_indptr": ends, "positions": positions, "offsets": np.zeros(3, np.int32)}
        both = {"k": np.ascontiguousarray(new[:, 0]), "v": np.ascontiguousarray(new[:, 1]), "kv_indptr": ends}
        one = self.call(which, "ragged", {**rows, **both})
        return self.merge(one, self.call(which, "prefill", {**rows, **self.pages(HELD)}))

    def pages(self, lengths: tuple[int, ...]) -> dict[str, Array]:
        """The first tokens of each sequence in pages, in no order."""
        counts = [-(-length // PAGE) for length in lengths]
        numbers = np.random.default_rng(1).permutation(sum(counts)).astype(np.int32)
        pages = np.full((sum(counts), 2, self.stored, PAGE, self.dim), np.nan, self.dtype)
        for b, start in enumerate(np.cumsum([0, *counts[:-1]])):
            for place in range(lengths[b]):
                pages[numbers[start + place // PAGE], :, :, place % PAGE] = self.keys[b][place]
        last = np.array([(length - 1) % PAGE + 1 for length in lengths], np.int32)
        arrays = {"pages": pages, "indptr": np.cumsum([0, *counts]).astype(np.int32), "numbers": numbers, "last": last}
        return {**arrays, "offsets": np.zeros(len(lengths), np.int32)}

    @property
    def scale(self) -> float:
        return 0.2

    def lists(self, out: Array) -> list[list[int]]:
        """Of every row, the positions that it chose; none is all."""
        behind = out[:, self.it.queries :].reshape(len(out), -1)[:, : DIGITS * KEYS].astype(np.float64)
        found = (np.nan_to_num(behind.reshape(len(out), KEYS, DIGITS)) @ [1, 256, 65536] - 1).astype(int)
        return [list(row[: [*row, -1].index(-1)]) for row in found]

    def best(self, b: int, position: int, query: Array) -> list[int]:
        """The positions that a row of sequence b chooses, by its numbers behind the model's heads; in float64."""
        it, keys = self.it, self.keys[b][: position + 1].astype(np.float64)
        numbers = query[it.queries :].reshape(-1).astype(np.float64)
        row = keys[:, :, it.key_head].reshape(len(keys), -1)[:, it.at : it.at + it.width]
        heads = numbers[: it.heads * it.width].reshape(it.heads, it.width)
        scores = numbers[it.heads * it.width :][: it.heads] @ np.maximum(heads @ row.T, 0)
        return sorted(np.argsort(-scores, kind="stable")[:KEYS])

    def attended(self, b: int, query: Array, seen: list[int]) -> Array:
        """[heads, numbers of a value] of a row over those positions, in float64."""
        keys, found = self.keys[b][seen].astype(np.float64), []
        for head in range(self.heads):
            if self.joined:
                row = keys[:, :, 0].reshape(len(keys), -1)
                q, k = query[2 * head : 2 * head + 2].reshape(-1), row[:, : self.rank + self.turned]
                v = row[:, : self.rank]
            else:
                q, k, v = query[head], keys[:, 0, head], keys[:, 1, head]
            scores = k @ q.astype(np.float64)[: k.shape[1]] * self.scale
            weights = np.exp(scores - scores.max())
            sink = np.exp(float(q[-1]) - scores.max()) if self.sinks else 0
            found.append(weights @ v / (weights.sum() + sink))
        return np.stack(found)

    def check(self, rows: list[tuple[int, int]], q: Array, chosen: Array, run: Any) -> None:
        """Lists are the best positions, and attention is over them."""
        lists = self.lists(chosen)
        for (b, position), query, mine in zip(rows, q, lists, strict=True):
            assert sorted(mine) == ([] if position < KEYS else self.best(b, position, query))
        given = q.copy()
        given[:, self.it.queries :] = chosen[:, self.it.queries :]
        for (b, position), query, mine, out in zip(rows, q, lists, run(given), strict=True):
            expected = self.attended(b, query, mine or list(range(position + 1)))
            whole = out[: self.it.queries].reshape(self.heads, -1)[:, : expected.shape[1]]
            assert np.abs(whole - expected).max() < (3e-3 if self.dtype == "float16" else 1e-5)


@pytest.fixture(scope="module", params=CASES)
def attention(gpu: Gpu, request: pytest.FixtureRequest) -> Attention:
    return Attention(gpu, *CASES[request.param])


@pytest.mark.parametrize(("name", "dtype"), CASES.values())
def test_the_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    attention = Attention(tmp_path, name, dtype)
    test_new_tokens(attention)
    test_one_token_of_each_sequence(attention)


def test_new_tokens(attention: Attention) -> None:
    attention.check(attention.rows, attention.q, attention.over(0, attention.q), lambda q: attention.over(1, q))


def test_one_token_of_each_sequence(attention: Attention) -> None:
    lengths = tuple(held + new for held, new in zip(HELD, NEW, strict=True))
    rows, q = [(b, length - 1) for b, length in enumerate(lengths)], attention.q[:3]
    arrays = attention.pages(lengths)
    arrays["positions"] = np.array([length - 1 for length in lengths], np.int32)

    def run(which: int, q: Array) -> Array:
        return attention.call(which, "decode", {**arrays, "q": q})[0]

    attention.check(rows, q, run(0, q), lambda given: run(1, given))
