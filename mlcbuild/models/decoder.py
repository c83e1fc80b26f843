"""The decoder: a structure's blocks as relax functions, every one written once.

The module's public functions are those of docs/contract.md. All of them run the same private `decoder`, which calls the
same private `decoder_layer` for each layer, so that what a compiler pass costs does not grow with the number of layers.
Private functions work on [n, hidden_size]: `n` tokens of all sequences of a batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import ir, relax, tirx

from mlcbuild.models.attention import attention
from mlcbuild.models.operations import Expr, Operations
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared, Weight, Weights, head_role, weight_of


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
        return relax.Var("packed_params", relax.AnyType())

    def weights(self, params: relax.Var) -> Weights:
        return Weights(self.builder, self.declared, params)

    def logits(self, hidden: Expr, weights: Weights) -> Expr:
        """hidden [n, H] -> float32 [n, V]."""
        return self.operations.linear(hidden, weights.get(head_role(self.structure)), "float32")


def kv_cache(name: str = "paged_kv_cache") -> relax.Var:
    return relax.Var(name, relax.AnyType())


def layer_inputs(decoder: Decoder, number: int = 0) -> list[relax.Var]:
    """x [n, H] in the compute dtype, the KV cache, the layer's number in it, and the parameters of a layer in order."""
    d = decoder
    x = d.tensor("x", [tirx.Var("seq_len", "int64"), d.structure.hidden_size], d.operations.compute)
    given = [d.tensor(p.name, p.shape, p.dtype) for p in d.declared if p.layer == number]
    return [x, kv_cache(), relax.Var("layer_id", ir.PrimType("int64")), *given]


def emit_layers(decoder: Decoder) -> tuple[relax.GlobalVar, ...]:
    """Add `decoder_layer(layer_inputs...) -> [n, H]`, one for all layers whose parameters are packed alike.

    The function of each layer.
    """
    kinds: dict[Any, relax.GlobalVar] = {}
    functions = []
    for number in range(decoder.structure.num_hidden_layers):
        kind = tuple((p.role, p.part, p.shape, p.dtype, p.packing) for p in decoder.declared if p.layer == number)
        if kind not in kinds:
            kinds[kind] = _emit_layer(decoder, number)
        functions.append(kinds[kind])
    return tuple(functions)


def _emit_layer(decoder: Decoder, number: int) -> relax.GlobalVar:
    d, inputs = decoder, layer_inputs(decoder, number)
    with d.builder.function("decoder_layer" if number == 0 else f"decoder_layer_{number}", inputs, private=True):
        with d.builder.dataflow():
            out = d.builder.emit_output(layer(d, *inputs, number=number))
        return d.builder.emit_func_output(out)


def layer(decoder: Decoder, x: Expr, cache: Expr, layer_id: Expr, *given: Expr, number: int = 0) -> Expr:
    """One layer's computation on what `layer_inputs` describes: [n, H]."""
    d, s = decoder, decoder.structure
    mine = [p for p in d.declared if p.layer == number]

    def weight(role: str) -> Weight:
        pairs = [(p, var) for p, var in zip(mine, given, strict=True) if p.role == role]
        return weight_of([p for p, _ in pairs], [var for _, var in pairs])

    normed = d.operations.rms_norm(x, weight("attention_norm").plain, s.norm_eps)
    attended = attention(d, normed, cache, layer_id, weight, x.ty.shape[0], number)
    x1 = d.builder.emit(relax.op.add(x, attended))
    normed = d.operations.rms_norm(x1, weight("mlp_norm").plain, s.norm_eps)
    gate_up = d.operations.linear(normed, weight("gate_up_proj"), d.operations.compute)
    inner = d.operations.gated(gate_up, s.activation)
    down = d.operations.linear(inner, weight("down_proj"), d.operations.compute)
    return relax.op.add(x1, down)


def emit_decoder(decoder: Decoder, layers: Sequence[relax.GlobalVar]) -> relax.GlobalVar:
    """Add `decoder(x [n, H], cache, params) -> [n, H]`: all layers and the final norm, in the compute dtype."""
    d, s = decoder, decoder.structure
    x = d.tensor("x", [tirx.Var("seq_len", "int64"), s.hidden_size], d.operations.compute)
    cache, params = kv_cache(), d.params()
    with d.builder.function("decoder", [x, cache, params], private=True):
        with d.builder.dataflow():
            weights = d.weights(params)
            hidden: Expr = x
            for i, function in enumerate(layers):
                given = [var for _, var in weights.layer(i)]
                hidden = d.builder.emit(relax.Call(function, [hidden, cache, relax.prim_value(i), *given]))
            hidden = d.operations.rms_norm(hidden, weights.get("final_norm").plain, s.norm_eps)
            out = d.builder.emit_output(hidden)
        return d.builder.emit_func_output(out)
