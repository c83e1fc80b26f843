"""Fewer launches at decode on CUDA devices: a norm, the product behind it and the gate behind that as one function.

One row is one kernel, of kernels/fused_rows.cuh. 2 to 32 rows launch the norm, then the product with the gate in it;
more launch the three one by one. What lies between them is a result of the function that nobody reads: the graph plans
its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, relax, s_tir, tirx

from mlcbuild.compiler.gpu.calls import added, called, given_to, rebound
from mlcbuild.compiler.gpu.cuda_rows import COUNTS, fused, launched, operands
from mlcbuild.compiler.gpu.inlining import blocks_of, scheduled
from mlcbuild.compiler.gpu.products import PRODUCT
from mlcbuild.compiler.gpu.rows import BLOCKS, GATE, NORM

Schedule = Callable[[tirx.PrimFunc, int], tirx.PrimFunc]


@dataclass(frozen=True)
class _Chain:
    """Functions that follow each other: of a product, and of a norm before it, of a gate behind it, or both."""

    product: tirx.PrimFunc
    norm: tirx.PrimFunc | None
    gate: tirx.PrimFunc | None

    @property
    def all(self) -> list[tirx.PrimFunc]:
        return [each for each in (self.norm, self.product, self.gate) if each is not None]


def fuse(module: IRModule, schedule: Schedule) -> IRModule:
    """Call one function, scheduled, for each such chain; `schedule` is for a function and more rows than a number."""
    functions = dict(module.functions_items())
    made: dict[tuple[Any, ...], Any] = {}
    for gv, function in functions.items():
        if not isinstance(function, relax.Function):
            continue
        instead: dict[Any, list[Any]] = {}
        for block in function.body.blocks:
            for bindings, chain in _chains(block, functions) if isinstance(block, relax.DataflowBlock) else []:
                names = tuple(binding.value.args[0] for binding in bindings)
                if bindings[0].var in instead:
                    continue
                if names not in made:
                    one = _function(chain, schedule)
                    made[names] = one and added(module, "_".join(each.name_hint for each in names), one)
                if made[names] is not None:
                    instead |= _in_one(bindings, made[names])
        module[gv] = rebound(function, instead)
    return module


def _in_one(bindings: list[Any], function: ir.GlobalVar) -> dict[Any, list[Any]]:
    """What is bound instead, by what each binds: nothing by all but the last."""
    results = relax.TupleType([binding.var.ty for binding in bindings])
    given = [argument for i, binding in enumerate(bindings) for argument in given_to(binding)[i > 0 :]]
    everything = relax.DataflowVar("fused", results)
    last = bindings[-1].var
    new = [
        relax.VarBinding(everything, called(function, given, results)),
        relax.VarBinding(last, relax.TupleGetItem(everything, len(bindings) - 1)),
    ]
    return {binding.var: [] for binding in bindings[:-1]} | {last: new}


def _chains(block: Any, functions: Any) -> list[tuple[list[Any], _Chain]]:
    """Each chain with its bindings; after one of all three, that without the gate, which may have no kernel."""
    uses = relax.analysis.udchain(block)
    found = {binding.var: binding for binding in block.bindings}

    def next_of(binding: Any) -> Any:
        """The one binding whose call has the result as its first argument, and uses it nowhere else."""
        if not isinstance(binding.var, relax.DataflowVar) or len(uses.get(binding.var, [])) != 1:
            return None
        then = found.get(uses[binding.var][0])
        places = [i for i, each in enumerate(given_to(then)) if each.same_as(binding.var)]
        return then if places == [0] else None

    norms = {next_of(b): b for b in block.bindings if _is(_called(b, functions), NORM)}
    chains = []
    for binding in block.bindings:
        product = _called(binding, functions)
        norm, gate = norms.get(binding), next_of(binding)
        gate = gate if _is(_called(gate, functions), GATE) else None
        if product is None or scheduled(product) or (norm or gate) is None:
            continue
        if PRODUCT in blocks_of(product):
            chain = _Chain(product, _called(norm, functions), _called(gate, functions))
            chains.append(([each for each in (norm, binding, gate) if each is not None], chain))
            if norm is not None and gate is not None:
                chains.append(([norm, binding], _Chain(product, chain.norm, None)))
    return chains


def _called(binding: Any, functions: Any) -> tirx.PrimFunc | None:
    return functions[binding.value.args[0]] if given_to(binding) else None


def _is(function: tirx.PrimFunc | None, attribute: str) -> bool:
    """Whether a function has the attribute, and does nothing else."""
    has = function is not None and function.attrs is not None and attribute in function.attrs
    return has and not scheduled(function) and blocks_of(function).keys() == BLOCKS[attribute]


def _function(chain: _Chain, schedule: Schedule) -> tirx.PrimFunc | None:
    """All of them as one function, with a result for each; None where there are no kernels."""
    first, *others = chain.all
    n, joined = first.params[0].shape[0], [first]
    for each in others:
        renamed = _replaced(each, {each.params[0].shape[0]: n})
        joined.append(_onto(renamed, [joined[-1].params[-1], *renamed.params[1:]]))
    renamed = joined[0 if chain.norm is None else 1]
    same = _Chain(renamed, chain.norm, None if chain.gate is None else joined[-1])
    alone, *few = [_kernel(most, same) for most in (COUNTS if same.gate is not None else COUNTS[:1])]
    if alone is None or any(kernel is None for kernel in few):
        return None
    above = COUNTS[len(few)]
    many = []
    for each, of in zip(chain.all, joined, strict=True):
        alike = schedule(each, above)
        many.append(_onto(_replaced(alike, {alike.params[0].shape[0]: n}), of.params).body)
    before = [many.pop(0)] if chain.norm is not None else []
    body = _in_turn(many)
    for most, kernel in reversed([*zip(COUNTS[1:], few, strict=False)]):
        body = _up_to(n, most, kernel, body)
    body = _up_to(n, COUNTS[0], alone, _in_turn([*before, body]))
    body = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
    given = [param for i, each in enumerate(joined) for param in each.params[i > 0 : -1]]
    attributes = {"tirx.is_scheduled": True, "tirx.HoistIfThenElseExprWithBlock": 1, "tirx.noalias": True}
    return tirx.PrimFunc([*given, *(each.params[-1] for each in joined)], body).with_attrs(attributes)


def _in_turn(bodies: list[Any]) -> Any:
    return tirx.SeqStmt(bodies) if len(bodies) > 1 else bodies[0]


def _up_to(n: Any, most: int, few: Any, many: Any) -> Any:
    return tirx.IfThenElse(tirx.op.tvm_thread_invariant(n <= most), few, many)


def _onto(function: tirx.PrimFunc, params: Sequence[Any]) -> tirx.PrimFunc:
    """`function` with other parameters of the same types."""
    body = _replaced(function.body, dict(zip(function.params, params, strict=True)))
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)


def _replaced(node: Any, by: Mapping[Any, Any]) -> Any:
    return tvm_ffi.structural_map(node, [(ir.Var, lambda var: by.get(var, var))])


def _kernel(most: int, chain: _Chain) -> tirx.Stmt | None:
    """What up to `most` rows of x launch; None where no function of ours reads the product's matrix."""
    found = operands(chain.product, blocks_of(chain.product)[PRODUCT])
    if found is None or found.fixed_rows is None or not found.buffers[0].same_as(chain.product.params[0]):
        return None
    norm, gate = chain.norm if most == 1 else None, chain.gate
    x, words, scales = found.buffers
    weight, eps = x, 0.0
    if norm is not None:
        (x, weight), eps = norm.params[:2], float(norm.attrs[NORM])
    chosen = fused(found.form, found.fixed_rows, found.columns, most, norm is not None, gate is not None)
    if chosen is None or {x.dtype, weight.dtype} != {found.buffers[0].dtype}:
        return None
    block, thread, number = (tirx.Var(name, "int32") for name in ("bx", "tx", "i"))
    results = tirx.decl_buffer((chosen.results,), "float32", "results", scope="local")
    shared = tirx.decl_buffer((chosen.shared,), "float32", "partial", scope="shared")
    pointers = [each.data for each in (results, shared, x, weight, words, scales)]
    sizes = [tirx.const(eps, "float32"), found.n, found.rows]
    call = tirx.Evaluate(tirx.call_extern("void", chosen.name, *pointers, *sizes, block))
    parts = 1 if gate is None else 2  # rows of the matrix to a result
    height = chosen.rows // parts
    at = number * chosen.threads + thread
    row, column = at // height, block * height + at % height
    sums = [tirx.BufferLoad(results, [number * parts + i]) for i in range(parts)]
    stores = [found.epilogue.at(row, column + i * (found.rows // 2), total) for i, total in enumerate(sums)]
    store = stores[0] if gate is None else _gated(gate, row, column, *(each.value for each in stores))
    inside = tirx.IfThenElse(tirx.all(row < found.n, column < found.rows // parts), store, None)
    every = tirx.For(number, 0, chosen.results // parts, tirx.ForKind.UNROLLED, inside)
    blocks = {"blockIdx.x": (block, -(-found.fixed_rows // chosen.rows))}
    return launched(tirx.SeqStmt([call, every]), [results, shared], (thread, chosen.threads), blocks)


def _gated(function: tirx.PrimFunc, row: Any, column: Any, gate: Any, up: Any) -> Any:
    """The store of a gate's function, with values in place of what it loads from [gate | up]."""
    (block,) = blocks_of(function).values()
    i, j = (var.var for var in block.iter_vars)

    def load(node: Any) -> Any:
        return gate if node.indices[1].same_as(j) else up

    store = tvm_ffi.structural_map(block.body, [(ir.TensorLoad, load)])
    return _replaced(store, {i: row, j: column})
