"""`_metadata`: what a runtime asks a library before it loads weights, memory usage included."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tvm import DataType, IRModule, ir, relax, tirx

from mlcbuild.models.kinds import DECODER, ENCODER, HYBRID
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared

# What a session keeps; the other kinds keep an RNN state.
_STATES = {DECODER: "kv_cache", HYBRID: "hybrid", ENCODER: "none"}


def describe(structure: Structure, quantization: str, declared: Sequence[Declared]) -> dict[str, Any]:
    """All of the metadata but `memory_usage`, which is known when memory has been planned."""
    s = structure
    facts: dict[str, Any] = {
        "model_type": s.model_type,
        "quantization": quantization,
        "context_window_size": s.context_window_size,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": s.prefill_chunk_size,
        "tensor_parallel_shards": s.tensor_parallel_shards,
        "pipeline_parallel_stages": s.pipeline_parallel_stages,
        "disaggregation": s.disaggregation,
        "kv_state_kind": _STATES.get(s.kind, "rnn_state"),
        "max_batch_size": s.max_batch_size,
        "active_vocab_size": None,  # the weights' own vocabulary
        "model_task": "chat" if s.embedding is None else "embedding",
    }
    if s.kind in (DECODER, HYBRID):
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        facts["kv_cache"] = {"num_hidden_layers": len(s.cached), **dict(zip(names, s.cache_heads, strict=True))}
    if s.embedding is not None:
        facts["embedding_metadata"] = dict(s.embedding)
    facts["params"] = [
        {
            "name": p.name,
            "shape": p.shape_for("vocab_size"),
            "dtype": p.dtype,
            "preprocs": [],
            "pipeline_stages": [0],
        }
        for p in declared
    ]
    return facts


def attach(module: IRModule, metadata: Mapping[str, Any]) -> IRModule:
    """The module with `_metadata() -> JSON string`, once memory has been planned in it."""
    complete = {**metadata, "memory_usage": memory_usage(module)}
    builder = relax.BlockBuilder()
    with builder.function("_metadata", []):
        builder.emit_func_output(ir.StringImm(json.dumps(complete)))
    module["_metadata"] = builder.finalize()["_metadata"]
    return module


def memory_usage(module: IRModule) -> dict[str, int]:
    """Planned bytes by public function: its own allocations and the largest of those of the functions it calls."""
    functions = {gv.name_hint: f for gv, f in module.functions_items() if isinstance(f, relax.Function)}
    own = {name: _allocations(function) for name, function in functions.items()}
    calls = {name: _callees(function, functions) for name, function in functions.items()}

    def total(name: str) -> int:
        return own[name] + max((total(callee) for callee in calls[name]), default=0)

    public = sorted(name for name, f in functions.items() if f.attrs is not None and "global_symbol" in f.attrs)
    return {name: total(name) for name in public}


def _allocations(function: relax.Function) -> int:
    storage, tensor = ir.Op.get("relax.memory.alloc_storage"), ir.Op.get("relax.builtin.alloc_tensor")
    total = 0
    for call in _calls(function):
        if call.op not in (storage, tensor):
            continue
        extents = call.args[0].values
        if all(isinstance(extent, tirx.IntImm) for extent in extents):
            itemsize = 1 if call.op == storage else DataType(str(call.args[1].value)).itemsize
            total += math.prod(map(int, extents)) * itemsize
    return total


def _callees(function: relax.Function, functions: Mapping[str, relax.Function]) -> set[str]:
    called = {call.op.name_hint for call in _calls(function) if isinstance(call.op, ir.GlobalVar)}
    return called & set(functions)


def _calls(function: relax.Function) -> Iterator[Any]:
    """The calls of a function in normal form: each is a binding's value.

    A visitor would go through every parameter's type at every use of it.
    """
    for block in function.body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                yield binding.value
