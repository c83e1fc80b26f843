"""Windows and soft caps in GPU attention, as WGSL and as SPIR-V on a software device, against NumPy in float64."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
from tvm import target

from mlcbuild.compiler.gpu import attention, lower
from mlcbuild.models.architecture import resolve
from tests.architectures.cases import CASES
from tests.support import llama, wgsl
from tests.support.wgsl import Array

pytestmark = pytest.mark.slow

HEADS, KV_HEADS, DIM, PAGE, WINDOW, CAP = 4, 2, 32, 16, 12, 1.5
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


@pytest.fixture(scope="module")
def kernels(gpu: Any) -> dict[str, Any]:
    model = llama.structure_of(llama.transformers_llama(head_dim=DIM))
    structure = dataclasses.replace(model, sliding_window_size=WINDOW, attn_logit_softcapping=CAP)
    device = target.Target(dict(gpu.TARGET))
    with device:
        made = attention.kernels(structure, "float32", device)
    names = ("ragged", "prefill", "decode")
    return {name: partial(run, gpu, function) for name, function in zip(names, made, strict=True)}


def run(gpu: Any, function: Any, arrays: dict[str, Array], scalars: dict[str, Any]) -> tuple[Array, Array]:
    offsets = {f"{name}_elem_offset": 0 for name in OFFSETS}
    found = gpu.launch(function, 0, arrays, {**SCALARS, **offsets, **scalars})
    return found["output"], found["lse"]


def row(q: Array, k: Array, v: Array, scale: float) -> Array:
    scores = CAP * np.tanh(k.astype(np.float64) @ q.astype(np.float64) * scale / CAP)
    weights = np.exp(scores - scores.max())
    out: Array = weights @ v.astype(np.float64) / weights.sum()
    return out


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_new_tokens(kernels: dict[str, Any], scale: float) -> None:
    """A positive scale is that of a layer that does not slide."""
    random, n = np.random.default_rng(0), 40
    q = random.standard_normal((n, HEADS, DIM)).astype(np.float32)
    k, v = (random.standard_normal((n, KV_HEADS, DIM)).astype(np.float32) for _ in range(2))
    indptr = np.array([0, 9, n], np.int32)
    arrays = {
        **{"q": q, "k": k, "v": v, "q_indptr": indptr, "kv_indptr": indptr},
        **{"q_rope_position": np.zeros(n, np.int32), "k_rope_pos_offset": np.zeros(2, np.int32)},
        **{"output": np.zeros_like(q), "lse": np.zeros((n, HEADS), np.float32)},
    }
    sizes = {"batch_size": 2, "qo_len": n, "kv_len": n, "causal": 1, "sm_scale": scale}
    got, _ = kernels["ragged"](arrays, sizes)
    for i in range(n):
        start = 0 if i < 9 else 9
        seen = slice(max(start, i + 1 - WINDOW) if scale < 0 else start, i + 1)
        for head in range(HEADS):
            expected = row(q[i, head], k[seen, head // 2], v[seen, head // 2], abs(scale))
            assert np.abs(got[i, head] - expected).max() < 1e-5


def cache(random: np.random.Generator) -> dict[str, Array]:
    """Two sequences: 45 tokens from position 30 on, and 3 from 0 on."""
    return {
        "pages": random.standard_normal((6, 2, KV_HEADS, PAGE, DIM)).astype(np.float32),
        "page_indptr": np.array([0, 3, 4], np.int32),
        "page_values": np.array([4, 1, 5, 2], np.int32),
        "length_info": np.array([13, 3], np.int32),
        "k_rope_pos_offset": np.array([30, 0], np.int32),
    }


def visible(arrays: dict[str, Array], b: int, position: int, scale: float) -> tuple[Array, Array] | None:
    """Keys and values [n, kv_heads, dim] that a row at `position` sees."""
    values = arrays["page_values"][arrays["page_indptr"][b] : arrays["page_indptr"][b + 1]]
    length, start = (45, 3)[b], int(arrays["k_rope_pos_offset"][b])
    first = max(0, position - WINDOW + 1 - start) if scale < 0 else 0
    if first >= length:
        return None
    slots = [(values[p // PAGE], p % PAGE) for p in range(first, length)]
    k, v = (np.stack([arrays["pages"][page, side, :, slot] for page, slot in slots]) for side in (0, 1))
    return k, v


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_new_tokens_over_cached_pages(kernels: dict[str, Any], scale: float) -> None:
    random, n = np.random.default_rng(1), 20
    q = random.standard_normal((n, HEADS, DIM)).astype(np.float32)
    positions = np.concatenate([75 + np.arange(15), 3 + np.arange(5)]).astype(np.int32)
    arrays = cache(random) | {"q": q, "q_indptr": np.array([0, 15, n], np.int32), "q_rope_position": positions}
    arrays |= {"output": np.zeros_like(q), "lse": np.zeros((n, HEADS), np.float32)}
    sizes = {"batch_size": 2, "total_len": n, "nnz_pages": 4, "max_num_pages": 6, "sm_scale": scale}
    got, lse = kernels["prefill"](arrays, sizes)
    for i in range(n):
        seen = visible(arrays, int(i >= 15), int(positions[i]), scale)
        for head in range(HEADS):
            if seen is None:
                assert lse[i, head] < -4e4  # counts for nothing where both attentions are merged
                continue
            expected = row(q[i, head], seen[0][:, head // 2], seen[1][:, head // 2], abs(scale))
            assert np.abs(got[i, head] - expected).max() < 1e-5


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_one_token_over_cached_pages(kernels: dict[str, Any], scale: float) -> None:
    random = np.random.default_rng(2)
    q = random.standard_normal((2, HEADS, DIM)).astype(np.float32)
    made = cache(random)
    positions = np.array([74, 2], np.int32)  # their own keys are in the cache
    arrays = made | {"Q": q, "q_rope_position": positions, "output": np.zeros_like(q)}
    arrays |= {"page_table_indptr": made["page_indptr"], "page_table_values": made["page_values"]}
    arrays |= {"lse": np.zeros((2, HEADS), np.float32)}
    sizes = {"B": 2, "nnz_pages": 4, "max_num_pages": 6, "sm_scale": scale}
    got, _ = kernels["decode"](arrays, sizes)
    for b in range(2):
        seen = visible(arrays, b, int(positions[b]), scale)
        assert seen is not None
        for head in range(HEADS):
            expected = row(q[b, head], seen[0][:, head // 2], seen[1][:, head // 2], abs(scale))
            assert np.abs(got[b, head] - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("dim", "heads"), [(32, 8), (64, 25), (80, 7), (96, 3), (128, 28), (256, 10)])
def test_a1_two_attentions_become_one_whatever_order_threads_run_in(gpu: Any, dim: int, heads: int, dtype: str) -> None:
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
