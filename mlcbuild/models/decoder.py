"""The decoder: a structure's blocks as relax functions, every one written once.

The module's public functions are those of docs/contract.md. All of them run the same private `decoder`, which calls the
same private `decoder_layer` for each layer, so that what a compiler pass costs does not grow with the number of layers.
Private functions work on [n, hidden_size]: `n` tokens of all sequences of a batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import ir, relax, tirx

from mlcbuild.models.operations import Expr, Operations
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared, Weights, head_role, tuple_type


class Decoder:
    """What the functions of one module share: the structure, the operations and the parameters' declarations."""

    def __init__(
        self,
        builder: relax.BlockBuilder,
        structure: Structure,
        declared: Sequence[Declared],
        operations: Operations,
        dtype: str,
    ) -> None:
        self.builder, self.structure, self.declared = builder, structure, tuple(declared)
        self.operations, self.dtype = operations, dtype

    def tensor(self, name: str, shape: Sequence[Any], dtype: str | None = None) -> relax.Var:
        return relax.Var(name, relax.TensorType(list(shape), dtype or self.dtype))

    def cast(self, x: Expr, dtype: str) -> Expr:
        return x if str(x.ty.dtype) == dtype else self.builder.emit(relax.op.astype(x, dtype))

    def params(self) -> relax.Var:
        return relax.Var("packed_params", tuple_type(self.declared))

    def weights(self, params: relax.Var) -> Weights:
        return Weights(self.builder, self.declared, params)

    def logits(self, hidden: Expr, weights: Weights) -> Expr:
        """hidden [n, H] -> float32 [n, V]."""
        return self.operations.linear(hidden, weights.get(head_role(self.structure)), "float32")


def kv_cache(name: str = "paged_kv_cache") -> relax.Var:
    return relax.Var(name, relax.AnyType())


def emit_layer(decoder: Decoder) -> relax.GlobalVar:
    """Add `decoder_layer(x [n, H], cache, layer_id, the layer's parameters...) -> [n, H]`, in the compute dtype."""
    d, s = decoder, decoder.structure
    compute = d.operations.compute
    n = tirx.Var("seq_len", "int64")
    x, cache = d.tensor("x", [n, s.hidden_size], compute), kv_cache()
    layer_id = relax.Var("layer_id", ir.PrimType("int64"))
    mine = [p for p in d.declared if p.layer == 0]
    given = {(p.role, p.part): d.tensor(p.name, p.shape, p.dtype) for p in mine}

    def weight(role: str) -> dict[str, Expr]:
        return {part: var for (of, part), var in given.items() if of == role}

    with d.builder.function("decoder_layer", [x, cache, layer_id, *given.values()], private=True):
        with d.builder.dataflow():
            normed = d.operations.rms_norm(x, weight("attention_norm")["weight"], s.norm_eps)
            attended = _attention(d, normed, cache, layer_id, weight, n)
            x1 = d.builder.emit(relax.op.add(x, attended))
            normed = d.operations.rms_norm(x1, weight("mlp_norm")["weight"], s.norm_eps)
            gate_up = d.operations.linear(normed, weight("gate_up_proj"), compute)
            inner = d.operations.gated(gate_up, s.activation)
            down = d.operations.linear(inner, weight("down_proj"), compute)
            out = d.builder.emit_output(relax.op.add(x1, down))
        return d.builder.emit_func_output(out)


def _attention(
    d: Decoder, x: Expr, cache: Expr, layer_id: Expr, weight: Callable[[str], dict[str, Expr]], n: Expr
) -> Expr:
    s = d.structure
    heads, kv_heads, dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
    qkv = d.operations.linear(x, weight("qkv_proj"), d.dtype)
    qkv = d.builder.emit(relax.op.reshape(qkv, [n, heads + 2 * kv_heads, dim]))
    out = d.builder.emit(
        relax.call_dps_packed(
            "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
            [cache, layer_id, relax.prim_value(dim**-0.5), qkv],
            out_ty=relax.TensorType([n, heads, dim], d.dtype),
        )
    )
    out = d.builder.emit(relax.op.reshape(out, [n, heads * dim]))
    return d.operations.linear(out, weight("o_proj"), d.operations.compute)


def emit_decoder(decoder: Decoder, layer: relax.GlobalVar) -> relax.GlobalVar:
    """Add `decoder(x [n, H], cache, params) -> [n, H]`: all layers and the final norm, in the compute dtype."""
    d, s = decoder, decoder.structure
    x = d.tensor("x", [tirx.Var("seq_len", "int64"), s.hidden_size], d.operations.compute)
    cache, params = kv_cache(), d.params()
    with d.builder.function("decoder", [x, cache, params], private=True):
        with d.builder.dataflow():
            weights = d.weights(params)
            hidden: Expr = x
            for i in range(s.num_hidden_layers):
                given = [var for _, var in weights.layer(i)]
                hidden = d.builder.emit(relax.Call(layer, [hidden, cache, relax.prim_value(i), *given]))
            hidden = d.operations.rms_norm(hidden, weights.get("final_norm")["weight"], s.norm_eps)
            out = d.builder.emit_output(hidden)
        return d.builder.emit_func_output(out)
