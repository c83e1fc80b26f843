"""What the engine samples with on a GPU: relax functions around the kernels of sorting.py and choosing.py.

Names and arguments are MLC's (docs/contract.md). b rows of probabilities, s samples, p positions, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.compiler.gpu import choosing, drafts, sorting

Body = Callable[[], Any]


def emit(builder: relax.BlockBuilder, threads: int, drafts_too: bool) -> None:
    """Add every sampling function; `threads` to a block. With `drafts_too`, also the check of drafted tokens."""
    _argsort(builder, threads)
    _sample_with_top_p(builder, threads)
    _multinomial(builder, threads)
    _take_probs(builder)
    _renormalize(builder, threads)
    if drafts_too:
        _verify(builder, threads)


class _Function:
    """One relax function: its sizes, its inputs, and the kernels that it calls."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        names = {"b": "batch_size", "s": "num_samples", "p": "num_positions", "v": "vocab_size"}
        self.sizes: dict[str, Any] = {short: tirx.Var(name, "int64") for short, name in names.items()}

    def type(self, shape: str, dtype: str) -> Any:
        return relax.TensorType([self.sizes.get(axis, axis) for axis in shape], dtype)

    def tensor(self, name: str, shape: str, dtype: str = "float32") -> relax.Var:
        return relax.Var(name, self.type(shape, dtype))

    def call(self, kernel: Any, name: str, inputs: list[Any], out: Any) -> Any:
        function = self.builder.add_func(kernel, name)
        return self.builder.emit(relax.call_tir(function, inputs, out_ty=out))

    def emit(self, name: str, inputs: list[relax.Var], body: Body) -> None:
        with self.builder.function(name, inputs):
            with self.builder.dataflow():
                out = self.builder.emit_output(body())
            self.builder.emit_func_output(out)


def _argsort(builder: relax.BlockBuilder, threads: int) -> None:
    """argsort_probs(probs [b, V]) -> (sorted [b, V], tokens [b, V] int32), the likeliest first."""
    f = _Function(builder)
    probs = f.tensor("probs", "bv")

    def body() -> Any:
        pair = [f.type("bv", "float32"), f.type("bv", "int32")]
        made = f.call(sorting.sort_rows(threads), "sort_probabilities", [probs], pair * 2)
        return relax.Tuple([builder.emit(relax.TupleGetItem(made, i)) for i in (0, 1)])

    f.emit("argsort_probs", [probs], body)


def _sample_with_top_p(builder: relax.BlockBuilder, threads: int) -> None:
    """sample_with_top_p(sorted_probs, tokens [b, V], uniform [s], rows [s], top_p [b]) -> [s] int32."""
    f = _Function(builder)
    probs, tokens = f.tensor("sorted_probs", "bv"), f.tensor("sorted_indices", "bv", "int32")
    uniform, rows = f.tensor("uniform_samples", "s"), f.tensor("sample_indices", "s", "int32")
    top_p = f.tensor("top_p", "b")

    def body() -> Any:
        mass = f.call(choosing.kept_mass(threads), "top_p_mass", [probs, top_p], top_p.ty)
        chosen = f.call(choosing.choose(threads, True), "choose_of_mass", [probs, mass, uniform, rows], rows.ty)
        return builder.emit_te(_tokens_at, tokens, rows, chosen, primfunc_name_hint="tokens_at")

    f.emit("sample_with_top_p", [probs, tokens, uniform, rows, top_p], body)


def _multinomial(builder: relax.BlockBuilder, threads: int) -> None:
    """multinomial_from_uniform(probs [b, V], uniform [s], rows [s]) -> [s] int32."""
    f = _Function(builder)
    probs, uniform, rows = f.tensor("probs", "bv"), f.tensor("uniform_samples", "s"), f.tensor("rows", "s", "int32")
    inputs = [probs, uniform, rows]
    kernel = choosing.choose(threads, False)
    f.emit("multinomial_from_uniform", inputs, lambda: f.call(kernel, "choose_of_all", inputs, rows.ty))


def _take_probs(builder: relax.BlockBuilder) -> None:
    """sampler_take_probs(probs, tokens [b, V], rows [s], chosen [s], places [p]) -> (f32 [s], f32 [p], i32 [p]).

    The probabilities of the chosen tokens; and the probability and token at each flat place in the sorted rows.
    """
    f = _Function(builder)
    probs, tokens = f.tensor("unsorted_probs", "bv"), f.tensor("sorted_indices", "bv", "int32")
    rows, chosen = f.tensor("sample_indices", "s", "int32"), f.tensor("sampling_results", "s", "int32")
    places = f.tensor("top_prob_offsets", "p", "int32")

    def body() -> Any:
        of_chosen = builder.emit_te(_tokens_at, probs, rows, chosen, primfunc_name_hint="probs_of_chosen")
        top = builder.emit_te(_at_place, tokens, places, primfunc_name_hint="top_tokens")
        of_top = builder.emit_te(_probs_of_top, probs, top, places, primfunc_name_hint="top_probs")
        return relax.Tuple([of_chosen, of_top, top])

    f.emit("sampler_take_probs", [probs, tokens, rows, chosen, places], body)


def _renormalize(builder: relax.BlockBuilder, threads: int) -> None:
    """renormalize_by_top_p(probs [b, V], top_p [b], init_pivots [b, 3]) -> [b, V]."""
    f = _Function(builder)
    probs, top_p = f.tensor("probs", "bv"), f.tensor("top_p", "b")
    pivots = relax.Var("init_pivots", relax.TensorType([f.sizes["b"], 3], "float32"))
    inputs = [probs, top_p, pivots]
    kernel = choosing.renormalize(threads)
    f.emit("renormalize_by_top_p", inputs, lambda: f.call(kernel, "renormalize_rows", inputs, probs.ty))


def _verify(builder: relax.BlockBuilder, threads: int) -> None:
    """sampler_verify_draft_tokens: see drafts.py."""
    f = _Function(builder)
    nodes, width, batch = tirx.Var("num_nodes", "int64"), f.sizes["v"], tirx.Var("nbatch", "int64")
    wide, node = relax.TensorType([nodes, width], "float32"), relax.TensorType([nodes], "int32")
    inputs = [
        relax.Var("draft_probs", wide),
        relax.Var("draft_tokens", node),
        relax.Var("model_probs", wide),
        relax.Var("token_tree_first_child", node),
        relax.Var("token_tree_next_sibling", node),
        relax.Var("uniform_samples", relax.TensorType([nodes], "float32")),
        relax.Var("token_tree_parent_ptr", relax.TensorType([batch], "int32")),
    ]

    def body() -> Any:
        kernel = builder.add_func(drafts.verify(threads), "verify_drafts")
        changed = [inputs[2].ty, inputs[6].ty]
        return builder.emit(relax.op.call_tir_inplace(kernel, inputs, [2, 6], changed))

    f.emit("sampler_verify_draft_tokens", inputs, body)


def _tokens_at(table: te.Tensor, rows: te.Tensor, places: te.Tensor) -> te.Tensor:
    return te.compute(rows.shape, lambda i: table[rows[i], places[i]], name="at")


def _at_place(table: te.Tensor, places: te.Tensor) -> te.Tensor:
    width = table.shape[1].astype("int32")
    return te.compute(
        places.shape, lambda i: table[tirx.floordiv(places[i], width), tirx.floormod(places[i], width)], name="top"
    )


def _probs_of_top(probs: te.Tensor, top: te.Tensor, places: te.Tensor) -> te.Tensor:
    width = probs.shape[1].astype("int32")
    return te.compute(places.shape, lambda i: probs[tirx.floordiv(places[i], width), top[i]], name="of_top")
