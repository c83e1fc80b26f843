"""Helpers that the engine calls between model functions: gather, scatter, softmax, memory for embeddings."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.script import tirx as T

from mlcbuild.models.operations import Operations


def emit(
    builder: relax.BlockBuilder, operations: Operations, rows: int, hidden_size: int, dtype: str, as_written: bool
) -> None:
    """Add them all; `rows` is the prefill chunk size, `dtype` that of embeddings and hidden states.

    `as_written`: kernels run in the order in which they are written, instead of being scheduled later.
    """
    for name, scatter in (("gather_probs", False), ("scatter_probs", True)):
        function = _copy_rows("float32", scatter, as_written).with_attr("global_symbol", name)
        builder.add_func(function, name)
    _emit_copy(builder, "gather_hidden_states", dtype, False, as_written)
    _emit_copy(builder, "scatter_hidden_states", dtype, True, as_written)
    _emit_softmax(builder, operations)
    with builder.function("alloc_embedding_tensor", []):
        allocation = relax.op.builtin.alloc_tensor(relax.ShapeExpr([rows, hidden_size]), dtype, runtime_device_index=0)
        builder.emit_func_output(builder.emit(allocation))


def _copy_rows(dtype: str, scatter: bool, as_written: bool) -> Any:
    """dst[indices[i]] = src[i], or dst[i] = src[indices[i]]: src and dst are [., n], indices int32."""

    @T.prim_func(s_tir=True, private=True)
    def copy_rows(var_src: T.handle, var_indices: T.handle, var_dst: T.handle):
        T.func_attr({"tirx.is_scheduled": as_written, "tirx.noalias": True})
        count = T.int64()
        m = T.int64()
        n = T.int64()
        src = T.match_buffer(var_src, (count if scatter else m, n), dtype)
        indices = T.match_buffer(var_indices, (count,), "int32")
        dst = T.match_buffer(var_dst, (m if scatter else count, n), dtype)
        for i, j in T.grid(count, n):
            with T.sblock("scatter" if scatter else "gather"):
                vi, vj = T.axis.remap("SS", [i, j])
                if scatter:
                    dst[indices[vi], vj] = src[vi, vj]
                else:
                    dst[vi, vj] = src[indices[vi], vj]

    return copy_rows


def _emit_copy(builder: relax.BlockBuilder, name: str, dtype: str, scatter: bool, as_written: bool) -> None:
    count, m, n = (tirx.Var(symbol, "int64") for symbol in ("batch_size", "m", "n"))
    many, few = relax.TensorType([m, n], dtype), relax.TensorType([count, n], dtype)
    src = relax.Var("src", few if scatter else many)
    indices = relax.Var("indices", relax.TensorType([count], "int32"))
    dst = relax.Var("dst", many if scatter else few)
    kernel = builder.add_func(_copy_rows(dtype, scatter, as_written), f"{name}_kernel")
    with builder.function(name, [src, indices, dst]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.call_tir_inplace(kernel, [src, indices, dst], 2, dst.ty))
        builder.emit_func_output(out)


def _emit_softmax(builder: relax.BlockBuilder, operations: Operations) -> None:
    """softmax_with_temperature(logits [b, 1, V], temperature [b]) -> [b, 1, V], float32."""
    b, v = tirx.Var("batch_size", "int64"), tirx.Var("vocab_size", "int64")
    logits = relax.Var("logits", relax.TensorType([b, 1, v], "float32"))
    temperature = relax.Var("temperature", relax.TensorType([b], "float32"))
    with builder.function("softmax_with_temperature", [logits, temperature]):
        with builder.dataflow():
            flat = builder.emit(relax.op.reshape(logits, [b, v]))
            probabilities = operations.softmax(flat, temperature)
            out = builder.emit_output(relax.op.reshape(probabilities, [b, 1, v]))
        builder.emit_func_output(out)
