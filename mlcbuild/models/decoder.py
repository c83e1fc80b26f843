"""What the functions of a module share: structure, operations, parameters, and what is computed in several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from mlcbuild.models.operations import Expr, Operations
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared, Given, Weights, head_role


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

    def function(
        self, name: str, inputs: Sequence[relax.Var], body: Callable[[], Expr], private: bool = False
    ) -> relax.GlobalVar:
        """Add a function whose result is the body's."""
        with self.builder.function(name, list(inputs), private=private):
            with self.builder.dataflow():
                out = self.builder.emit_output(body())
            return self.builder.emit_func_output(out)

    def params(self) -> relax.Var:
        return relax.Var("packed_params", relax.AnyType())

    def layer_parameters(self, number: int) -> list[relax.Var]:
        """The parameters of a layer, as a function of it takes them: in order."""
        return [self.tensor(p.name, p.shape, p.dtype) for p in self.declared if p.of(number)]

    def given(self, number: int, parameters: Sequence[Expr]) -> Given:
        """The same by role."""
        return Given([p for p in self.declared if p.of(number)], parameters)

    def weights(self, params: relax.Var) -> Weights:
        return Weights(self.builder, self.declared, params)

    def norm(self, x: Expr, weights: Given | Weights, role: str) -> Expr:
        """x [n, H] normed, with the weight that plays `role` and the bias that plays `role`_bias, where there are.

        With a matrix that plays `role`_in_proj, it has a gate: y * sigmoid(out_proj silu(in_proj y)) of y normed
        (transformers modeling_axk2.py).
        """
        normed = self._ungated_norm(x, weights, role)
        if f"{role}_in_proj" not in weights:
            return normed
        inner = self.operations.activation(self.project(normed, weights, f"{role}_in"), "silu")
        gate = self.builder.emit(relax.op.sigmoid(self.project(inner, weights, f"{role}_out")))
        return self.builder.emit(relax.op.multiply(normed, gate))

    def _ungated_norm(self, x: Expr, weights: Given | Weights, role: str) -> Expr:
        s = self.structure
        eps = s.norm_eps if role != "final_norm" or s.final_norm_eps is None else s.final_norm_eps
        weight, bias = (weights(each).plain if each in weights else None for each in (role, f"{role}_bias"))
        if s.norm_offset and weight is not None:
            compute = self.operations.compute  # not the model dtype, which would round the sum
            factor = relax.op.add(self.cast(weight, compute), relax.const(s.norm_offset, compute))
            x = relax.op.multiply(self._plain_norm(x, None, None, eps), self.builder.emit(factor))
            return self.builder.emit(x if bias is None else relax.op.add(x, self.cast(bias, compute)))
        return self._plain_norm(x, weight, bias, eps)

    def _plain_norm(self, x: Expr, weight: Expr | None, bias: Expr | None, eps: float) -> Expr:
        if self.structure.norm == "rms":
            return self.operations.rms_norm(
                x, *(self.unweighted(x.ty.shape[1], eps) if weight is None else (weight, eps))
            )
        return self.operations.layer_norm(x, weight, bias, eps)

    def ones(self, width: Any) -> Expr:
        """The weight of a norm that has none: [width] in the model dtype."""
        return self.builder.emit(relax.op.ones([width], self.dtype))

    def unweighted(self, width: Any, eps: float) -> tuple[Expr, float]:
        """Weight and epsilon of an rms norm without a weight, or of a division by the length: its root of a mean square
        is the length over the root of the width."""
        if not self.structure.norm_length:
            return self.ones(width), eps
        size = int(width)
        return self.builder.emit(relax.op.full([size], relax.const(size**-0.5, self.dtype))), eps / size

    def project(self, x: Expr, weights: Given | Weights, name: str, dtype: str | None = None) -> Expr:
        """x [n, K] times the matrix of role `name`_proj, plus its `name`_bias where there is one, and a low-rank
        difference (Hu et al., arXiv 2106.09685): [n, N].

        `dtype` is the result's, by default the compute dtype; the sum is formed in that.
        """
        x = self.rounded(x) if self.structure.input_bits else x
        compute = self.operations.compute
        if f"{name}_adapter_a_proj" not in weights:
            return self.biased(x, weights, f"{name}_proj", f"{name}_bias", dtype or compute)
        more = self.project(self.project(x, weights, f"{name}_adapter_a"), weights, f"{name}_adapter_b")
        whole = self.biased(x, weights, f"{name}_proj", f"{name}_bias", compute)
        return self.cast(self.builder.emit(relax.op.add(whole, more)), dtype or compute)

    def biased(self, x: Expr, weights: Given | Weights, matrix: str, bias: str, dtype: str) -> Expr:
        """As `project`, by the roles of matrix and bias; times a number for each row, where one plays the role of both
        with `_scale` in the bias's place."""
        scale = f"{bias.removesuffix('_bias')}_scale"
        if bias not in weights and scale not in weights:
            return self.operations.linear(x, weights(matrix), dtype)
        compute = dtype if scale in weights else self.operations.compute
        total = self.operations.linear(x, weights(matrix), compute)
        for role, combined in ((bias, relax.op.add), (scale, relax.op.multiply)):
            if role in weights:
                total = self.builder.emit(combined(total, self.cast(weights(role).plain, compute)))
        return self.cast(total, dtype)

    def rounded(self, x: Expr) -> Expr:
        """x [n, K] with each row in whole steps of its largest magnitude / (2 ** (bits - 1) - 1), by float32."""
        steps, wide = 2 ** (self.structure.input_bits - 1) - 1, self.cast(x, "float32")
        largest = self.builder.emit(relax.op.max(self.builder.emit(relax.op.abs(wide)), axis=1, keepdims=True))

        def table(x: te.Tensor, largest: te.Tensor) -> te.Tensor:
            def value(i: tirx.Var, j: tirx.Var) -> Expr:
                scale = tirx.const(steps, "float32") / tirx.max(largest[i, 0], tirx.const(1e-5, "float32"))
                return tirx.round(x[i, j] * scale) / scale

            return te.compute(x.shape, value, name="rounded")

        return self.cast(self.builder.emit_te(table, wide, largest, primfunc_name_hint="rounded"), str(x.ty.dtype))

    def shifted(self, x: Expr, weights: Given | Weights, role: str) -> Expr:
        """x [n, H] plus what plays `role`_shift, times what plays `role`, where there are such: numbers of columns."""
        for name, combined in ((f"{role}_shift", relax.op.add), (role, relax.op.multiply)):
            if name in weights:
                x = self.builder.emit(combined(x, self.cast(weights(name).plain, self.operations.compute)))
        return x

    def scaled(self, x: Expr, factor: float) -> Expr:
        return x if factor == 1 else self.builder.emit(relax.op.multiply(x, relax.const(factor, str(x.ty.dtype))))

    def logits(self, hidden: Expr, weights: Given | Weights) -> Expr:
        """hidden [n, H] -> float32 [n, V]; the cap is Gemma 2's (arXiv 2408.00118)."""
        hidden = self.scaled(hidden, self.structure.logits_scale)
        logits = self.biased(hidden, weights, head_role(self.structure), "lm_head_bias", "float32")
        cap = self.structure.final_logit_softcapping
        if cap is None:
            return logits
        return self.scaled(self.builder.emit(relax.op.tanh(self.scaled(logits, 1 / cap))), cap)

    @property
    def has_beginning(self) -> bool:
        """Whether anything is done to embeddings before the first layer."""
        s = self.structure
        choices = s.embedding_scale != 1 or s.sinusoidal or s.norm_embeddings
        return choices or bool(s.roles() & {"position_embedding", "embedding_norm", "embedding_factor"})

    def beginning(self, x: Expr, positions: Callable[[], Expr], weights: Given | Weights) -> Expr:
        """Embeddings [n, H] -> what the first layer is given; `positions`: the tokens' in their sequence, int32 [n]."""
        s, compute = self.structure, self.operations.compute
        x = self.shifted(self.scaled(x, s.embedding_scale), weights, "embedding_factor")
        if "position_embedding" in weights:
            rows = self.operations.embedding(self.rows(positions()), weights("position_embedding"), s.hidden_size)
            x = self.builder.emit(relax.op.add(x, self.cast(rows, compute)))
        if s.sinusoidal:
            x = self.builder.emit(relax.op.add(x, self.cast(self._sinusoids(positions(), s.hidden_size), compute)))
        normed = s.norm_embeddings or "embedding_norm" in weights
        return self.norm(x, weights, "embedding_norm") if normed else x

    def rows(self, positions: Expr) -> Expr:
        """The rows of a table of positions: int32 [n]."""
        offset = self.structure.position_offset
        return self.builder.emit(relax.op.add(positions, relax.const(offset, "int32"))) if offset else positions

    def _sinusoids(self, positions: Expr, width: int) -> Expr:
        """float32 [n, width]: sines of position times each frequency, then cosines (tensor2tensor's, as XGLM has them).

        Frequencies go from 1 to 1 / 10000 in equal steps of their logarithm, or to one step before it (CTRL).
        Angles are kept small, for GPUs whose sines are coarse otherwise.
        """
        half, high = width // 2, 6.28125  # high times a whole number is exact
        step = np.float32(-math.log(10000) / (half - (not self.structure.sinusoidal_open)))
        frequencies = relax.const(np.exp(np.arange(half, dtype=np.float32) * step))

        def value(i: tirx.Var, j: tirx.Var, at: te.Tensor, by: te.Tensor) -> Expr:
            angle = at[i].astype("float32") * by[j % half]
            turns = tirx.round(angle * tirx.const(1 / math.tau, "float32"))
            angle = angle - turns * tirx.const(high, "float32") - turns * tirx.const(math.tau - high, "float32")
            return tirx.if_then_else(j < half, tirx.sin(angle), tirx.cos(angle))

        def table(at: te.Tensor, by: te.Tensor) -> te.Tensor:
            return te.compute((at.shape[0], width), lambda i, j: value(i, j, at, by), name="sinusoids")

        return self.builder.emit_te(table, self.rows(positions), frequencies, primfunc_name_hint="sinusoids")

    def finished(self, hidden: Expr, weights: Given | Weights) -> Expr:
        """What the last layer gives [n, H], as the head is given it."""
        s = self.structure
        hidden = hidden if s.norm_position == "sum" else self.norm(hidden, weights, "final_norm")
        if "head_dense" not in weights:
            return hidden
        hidden = self.biased(hidden, weights, "head_dense", "head_dense_bias", self.operations.compute)
        return self.norm(self.operations.activation(hidden, s.head_activation), weights, "head_norm")


def kv_cache(name: str = "paged_kv_cache") -> relax.Var:
    return relax.Var(name, relax.AnyType())


def numbered(name: str, number: int) -> str:
    """The name of the function for the kind of layer that first occurs as the layer `number`."""
    return name if number == 0 else f"{name}_{number}"


def one_per_kind(decoder: Decoder, emit: Callable[[int], relax.GlobalVar]) -> tuple[relax.GlobalVar, ...]:
    """The function of each layer: `emit` adds one for all of a type whose parameters are packed alike."""
    kinds: dict[Any, relax.GlobalVar] = {}
    functions = []
    for number in range(decoder.structure.num_hidden_layers):
        packed = tuple((p.role, p.part, p.shape, p.dtype, p.packing) for p in decoder.declared if p.of(number))
        kind = *decoder.structure.computed(number), packed
        if kind not in kinds:
            kinds[kind] = emit(number)
        functions.append(kinds[kind])
    return tuple(functions)
