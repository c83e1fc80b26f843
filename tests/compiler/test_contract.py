"""What a runtime finds in a library: metadata, memory usage, logit processing, sampling helpers, hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.runtime import tvm_runtime
from mlcbuild.runtime.library import Library
from tests.support import llama
from tests.support.llama import Array

FUNCTIONS = [
    "_metadata",
    "embed",
    "prefill",
    "decode",
    "batch_prefill",
    "batch_decode",
    "batch_verify",
    "get_logits",
    "batch_select_last_hidden_states",
    "prefill_to_last_hidden_states",
    "decode_to_last_hidden_states",
    "batch_prefill_to_last_hidden_states",
    "batch_decode_to_last_hidden_states",
    "batch_verify_to_last_hidden_states",
    "create_tir_paged_kv_cache",
    "alloc_embedding_tensor",
    "gather_hidden_states",
    "scatter_hidden_states",
    "gather_probs",
    "scatter_probs",
    "softmax_with_temperature",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "apply_bitmask_inplace",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama.transformers_llama()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Library:
    return Library(llama.build_optimised(llama.structure_of(model), "q0f32", tmp_path_factory.mktemp("contract")))


@pytest.fixture(scope="module")
def metadata(library: Library) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(library["_metadata"]())
    return data


@pytest.fixture(scope="module")
def parameters(metadata: dict[str, Any], model: Any) -> list[Any]:
    values = llama.mlc_parameters(model)
    return [tvm_runtime.tensor(values[p["name"]]) for p in metadata["params"]]


def tensor(values: Any, dtype: str) -> Any:
    return tvm_runtime.tensor(np.array(values, dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_the_contract_is_there(library: Library, name: str) -> None:
    assert library.has(name)


def test_metadata_says_what_the_structure_is(metadata: dict[str, Any]) -> None:
    params, usage = metadata.pop("params"), metadata.pop("memory_usage")
    assert metadata == {
        "model_type": "llama",
        "quantization": "q0f32",
        "context_window_size": 160,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": 160,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "max_batch_size": 8,
        "active_vocab_size": None,
        "model_task": "chat",
        "kv_cache": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    }
    metadata |= {"params": params, "memory_usage": usage}
    assert params[0] == {
        "name": "model.embed_tokens.weight",
        "shape": ["vocab_size", 64],
        "dtype": "float32",
        "preprocs": [],
        "pipeline_stages": [0],
    }
    assert [p["name"] for p in params[1:7]] == [
        f"model.layers.0.{name}.weight"
        for name in (
            "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "input_layernorm",
            "post_attention_layernorm",
        )
    ]  # fmt: skip
    assert [p["name"] for p in params[-2:]] == ["model.norm.weight", "lm_head.weight"]


def test_memory_usage_counts_what_a_full_chunk_needs(metadata: dict[str, Any]) -> None:
    """A prefill holds at least its hidden states and one layer's widest activation, for 160 tokens."""
    usage = metadata["memory_usage"]
    assert usage["prefill"] >= 160 * (64 + 2 * 96) * 4
    assert usage["prefill"] < 64 * 160 * (64 + 2 * 96) * 4
    assert set(usage) <= {*FUNCTIONS} and {"embed", "decode", "batch_verify"} <= set(usage)


def test_logit_bias(library: Library) -> None:
    logits = tensor(np.zeros((2, 5)), "float32")
    library["apply_logit_bias_inplace"](
        logits, tensor([0, 1, 1], "int32"), tensor([4, 0, 0], "int32"), tensor([1.5, 2, 3], "float32")
    )
    expected = np.zeros((2, 5))
    expected[0, 4], expected[1, 0] = 1.5, 5.0
    assert (tvm_runtime.array(logits, (2, 5)) == expected).all()


def test_penalties(library: Library) -> None:
    """Sequence 0 of the call is row 1 of the logits: presence 0.5, frequency 0.25, repetition 2."""
    logits = tensor([[1, 1, 1], [4, -4, 1]], "float32")
    library["apply_penalty_inplace"](
        logits, tensor([1], "int32"), tensor([0, 0], "int32"), tensor([0, 1], "int32"), tensor([2, 4], "int32"),
        tensor([[0.5, 0.25, 2.0]], "float32"),
    )  # fmt: skip
    expected = [[1, 1, 1], [(4 - 0.5 - 0.5) / 2, (-4 - 0.5 - 1.0) * 2, 1]]
    assert (tvm_runtime.array(logits, (2, 3)) == np.array(expected)).all()


def test_bitmask(library: Library) -> None:
    allowed = np.random.default_rng(0).integers(0, 2, (3, 70)).astype(bool)
    words = np.zeros((3, 3), np.uint32)
    for token in range(70):
        words[:, token // 32] |= allowed[:, token].astype(np.uint32) << np.uint32(token % 32)
    logits = tensor(np.ones((3, 70)), "float32")
    library["apply_bitmask_inplace"](logits, tensor([0, 2], "int32"), tvm_runtime.tensor(words.view(np.int32)))
    got = tvm_runtime.array(logits, (3, 70))
    for row in (0, 2):
        assert (got[row] == np.where(allowed[row], 1, np.finfo(np.float32).min)).all()
    assert (got[1] == 1).all()


def test_rows_are_gathered_and_scattered(library: Library) -> None:
    source, indices = np.arange(12, dtype=np.float32).reshape(4, 3), [2, 0]
    for kind in ("hidden_states", "probs"):
        gathered, scattered = tensor(np.zeros((2, 3)), "float32"), tensor(np.zeros((4, 3)), "float32")
        library[f"gather_{kind}"](tvm_runtime.tensor(source), tensor(indices, "int32"), gathered)
        assert (tvm_runtime.array(gathered, (2, 3)) == source[indices]).all()
        library[f"scatter_{kind}"](gathered, tensor([3, 1], "int32"), scattered)
        got = tvm_runtime.array(scattered, (4, 3))
        assert (got[[3, 1]] == source[indices]).all() and (got[[0, 2]] == 0).all()


def test_softmax_with_temperature(library: Library) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 1, 50)).astype(np.float32)
    got = library["softmax_with_temperature"](tvm_runtime.tensor(logits), tensor([0.5, 2.0], "float32"))
    for row, temperature in enumerate((0.5, 2.0)):
        e = np.exp(logits[row, 0].astype(np.float64) / temperature)
        assert np.abs(tvm_runtime.array(got, (2, 50))[row] - e / e.sum()).max() < 1e-6


def test_hidden_states_lead_to_the_same_logits(library: Library, parameters: list[Any], model: Any) -> None:
    """*_to_last_hidden_states, then batch_select_last_hidden_states and get_logits: the engine's other way round."""
    ids = list(range(7, 27))
    expected = llama.reference_logits(model, ids)
    shape = tvm_runtime.shape
    cache = library["create_tir_paged_kv_cache"](shape(2), shape(160), shape(160), shape(16), shape(0))
    state = {name: tvm_runtime.function(f"vm.builtin.kv_state_{name}") for name in
             ("add_sequence", "begin_forward", "end_forward")}  # fmt: skip
    state["add_sequence"](cache, 0)
    state["add_sequence"](cache, 1)

    def run(name: str, lengths: tuple[int, ...], tokens: list[int], form: tuple[int, int]) -> Any:
        embedded = library["embed"](tensor(tokens, "int32"), parameters)
        state["begin_forward"](cache, shape(*range(len(lengths))), shape(*lengths))
        hidden = library[name](tvm_runtime.view(embedded, (*form, 64), "float32"), cache, parameters)[0]
        state["end_forward"](cache)
        return tvm_runtime.view(hidden, (len(tokens), 64), "float32")

    def logits(hidden: Any, count: int) -> Array:
        return tvm_runtime.array(library["get_logits"](hidden, parameters), (count, 320))

    hidden = run("batch_prefill_to_last_hidden_states", (12, 5), [*ids[:12], *ids[:5]], (1, 17))
    last = library["batch_select_last_hidden_states"](hidden, tensor([11, 16], "int32"))
    assert np.abs(logits(last, 2) - expected[[11, 4]]).max() < 1e-4 * expected.std()
    hidden = run("batch_decode_to_last_hidden_states", (1, 1), [ids[12], ids[5]], (2, 1))
    assert np.abs(logits(hidden, 2) - expected[[12, 5]]).max() < 1e-4 * expected.std()
    hidden = run("batch_verify_to_last_hidden_states", (2, 1), [ids[13], ids[14], ids[6]], (1, 3))
    assert np.abs(logits(hidden, 3) - expected[[13, 14, 6]]).max() < 1e-4 * expected.std()


def test_embedding_memory_holds_a_chunk(library: Library) -> None:
    assert tuple(library["alloc_embedding_tensor"]().shape) == (160, 64)


def test_a_library_names_no_path_of_the_machine_that_built_it(library: Library) -> None:
    content = library.path.read_bytes()
    assert str(library.path.parent).encode() not in content
    assert b"/mlcbuild/" not in content and str(Path.home()).encode() not in content
