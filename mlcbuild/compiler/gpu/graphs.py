"""CUDA graphs: a decoding step is launched at once instead of kernel by kernel.

What is captured must be one function, since a captured graph holds the addresses of the weights that it was captured
with: a function that all layers share would be replayed with the first layer's. So `batch_decode` has its layers
written out, and takes the parameters as a tuple whose tensors the pass knows not to change; all others share
`decoder_layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import IRModule, ir, relax, transform

from mlcbuild.compiler.gpu.calls import bindings_of

_CAPTURED, _ONE = "batch_decode", "decode"
_SYMBOLS = "relax.rewrite_cuda_graph.capture_symbolic_vars"
_PARAMS = "packed_params"
_ALLOCATION, _TAKE = "cuda_graph_alloc", "vm.builtin.tuple_getitem"


def prepare(module: IRModule) -> IRModule:
    """Write out the layers of `batch_decode`, once for all batch sizes; `decode` is that with a batch of one."""
    functions = {gv.name_hint: f for gv, f in module.functions_items() if isinstance(f, relax.Function)}
    private = {n: f for n, f in functions.items() if f.attrs is None or "global_symbol" not in f.attrs}
    batch, one = functions[_CAPTURED], functions[_ONE]
    rows = batch.params[0].ty.shape[0]
    bound = {name: _with_rows(function, rows) for name, function in private.items()}
    types = _types([batch, *bound.values()])
    params = relax.Var(_PARAMS, relax.TupleType([types.get(i, relax.AnyType()) for i in range(max(types) + 1)]))
    *inputs, _ = batch.params
    builder = relax.BlockBuilder(module)
    attributes = {**dict(batch.attrs), "num_input": len(inputs), _SYMBOLS: [rows.name]}
    with builder.function("written_out", [*inputs, params], attrs=attributes):
        with builder.dataflow():
            result = _WriteOut(builder, bound, params).run(batch, [*inputs, params])
            out = builder.emit_output(result)
        builder.emit_func_output(out)
    inputs = [relax.Var(p.name, p.ty) for p in one.params]
    with builder.function("one", inputs, attrs=dict(one.attrs)):
        with builder.dataflow():
            out = builder.emit_output(relax.Call(module.get_global_var(_CAPTURED), inputs))
        builder.emit_func_output(out)
    made = builder.finalize()
    for name, new in ((_CAPTURED, "written_out"), (_ONE, "one")):
        module[name] = made[new].with_attr("global_symbol", name)
    return module


def _with_rows(function: relax.Function, rows: Any) -> relax.Function:
    """A private function whose `seq_len` rows are `rows`, one for each sequence of its batch."""
    names = {var.name for var in relax.analysis.defined_symbolic_vars(function)} & {"seq_len", "batch_size"}
    return function.bind_symbolic_vars(dict.fromkeys(sorted(names), rows)) if names else function


def _types(functions: Sequence[relax.Function]) -> dict[int, Any]:
    """The types of the parameters that the functions take out of their tuple, by index."""
    found = {}
    for function in functions:
        taken: dict[relax.Var, int] = {}
        for binding in bindings_of(function):
            index = _taken(binding)
            if index is not None:
                taken[binding.var] = index
            elif isinstance(binding, relax.MatchCast) and binding.value in taken:
                found[taken[binding.value]] = binding.ty
    return found


def _taken(binding: Any) -> int | None:
    """The index of the parameter that a binding takes out of the tuple; None where it does something else."""
    value = binding.value
    pure = isinstance(value, relax.Call) and value.op == ir.Op.get("relax.call_pure_packed")
    if not pure or not isinstance(value.args[0], relax.ExternFunc) or str(value.args[0].global_symbol) != _TAKE:
        return None
    return int(value.args[2].value)


class _WriteOut:
    """Emits what functions do into a builder. (Relax's own inlining gives their symbolic sizes new names.)"""

    def __init__(self, builder: relax.BlockBuilder, private: Mapping[str, relax.Function], params: relax.Var) -> None:
        self.builder, self.private, self.params = builder, private, params

    def run(self, function: relax.Function, arguments: Sequence[Any]) -> Any:
        """The function's result for `arguments`."""
        known = dict(zip(function.params, arguments, strict=True))
        taken: dict[relax.Var, int] = {}
        for binding in bindings_of(function):
            index = _taken(binding)
            if index is not None:
                taken[binding.var] = index
            elif isinstance(binding, relax.MatchCast):
                known[binding.var] = self.builder.emit(relax.TupleGetItem(self.params, taken[binding.value]))
            else:
                known[binding.var] = self._value(_replaced(binding.value, known))
        return _replaced(function.body.body, known)

    def _value(self, value: Any) -> Any:
        if isinstance(value, relax.Call) and isinstance(value.op, ir.GlobalVar) and value.op.name_hint in self.private:
            return self.run(self.private[value.op.name_hint], list(value.args))
        return self.builder.emit(value)


def _replaced(value: Any, known: Mapping[relax.Var, Any]) -> Any:
    """`value`, whose parts are variables and constants, with other expressions for its variables."""
    if isinstance(value, relax.Var):
        return known.get(value, value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_replaced(field, known) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(_replaced(value.tuple_value, known), value.index)
    if isinstance(value, relax.Call):
        arguments = [_replaced(argument, known) for argument in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)
    return value


def capture(module: IRModule) -> IRModule:
    """Lift what can be captured, and add `cuda_graph_alloc_init`, which reserves its memory before the first step.

    Only of `batch_decode`: the pass gives all functions one set of buffers, and a function that another one calls would
    write over what its caller has in them. (Gemma's scaled embeddings were lost so, in every prefill.)
    """
    others = {
        gv: f for gv, f in module.functions_items() if isinstance(f, relax.Function) and gv.name_hint != _CAPTURED
    }
    alone = IRModule({gv: f for gv, f in module.functions_items() if gv not in others}, attrs=module.attrs)
    with transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        module = relax.transform.RewriteCUDAGraph()(alone)
    for gv, function in others.items():
        module[gv] = function
    module = _without_types(module)
    allocations = [gv for gv in module.get_global_vars() if gv.name_hint.startswith(_ALLOCATION)]
    if not allocations:
        return module
    (allocation,) = allocations
    builder = relax.BlockBuilder(module)
    with builder.function("cuda_graph_alloc_init", []):
        builder.emit_func_output(
            builder.emit(
                relax.op.call_builtin_with_ctx(
                    "vm.builtin.cuda_graph.get_cached_alloc",
                    [allocation, relax.prim_value(0)],
                    ty_args=relax.AnyType(),
                )
            )
        )
    return builder.finalize()


def _without_types(module: IRModule) -> IRModule:
    """Parameters as one opaque object in the captured pieces too, as all other functions have them.

    A tuple with types would be checked tensor by tensor, in each step and in each piece, with words for each failure:
    that was nine tenths of a library's code.
    """
    functions = dict(module.functions_items())
    changed = {gv: _opaque(f) for gv, f in functions.items() if isinstance(f, relax.Function) and _typed(f)}
    new = {}
    for gv, function in changed.items():
        new[gv.name_hint] = ir.GlobalVar(gv.name_hint)
        relax.expr._update_type(new[gv.name_hint], function.ty)
    rename = [(ir.GlobalVar, lambda gv: new.get(gv.name_hint, gv))]
    renamed = {
        new.get(gv.name_hint, gv): tvm_ffi.structural_map(changed.get(gv, function), rename)
        if isinstance(function, relax.Function)
        else function
        for gv, function in functions.items()
    }
    return IRModule(renamed, attrs=module.attrs, global_infos=module.global_infos)


def _typed(function: relax.Function) -> list[Any]:
    return [p for p in function.params if p.name == _PARAMS and isinstance(p.ty, relax.TupleType)]


def _opaque(function: relax.Function) -> relax.Function:
    (old,), new = _typed(function), relax.Var(_PARAMS, relax.AnyType())

    def take(index: int, of: Any) -> Any:
        return relax.Call(relax.ExternFunc(_TAKE), [new, relax.prim_value(index)], None, [of])

    def taken(binding: Any) -> Any:
        value = binding.value
        if not isinstance(value, relax.TupleGetItem) or not value.tuple_value.same_as(old):
            return binding
        return relax.VarBinding(binding.var, take(value.index, binding.var.ty))

    # The vocabulary's size is known by a tensor that has it.
    fields = enumerate(old.ty.fields)
    sized = next(((index, of) for index, of in fields if relax.analysis.tir_vars_in_type(of)), None)
    first = []
    if sized is not None:
        held, sized_tensor = relax.Var("held", relax.AnyType()), relax.Var("sized", sized[1])
        first = [relax.VarBinding(held, take(sized[0], held.ty)), relax.MatchCast(sized_tensor, held, sized[1])]
    blocks = [relax.BindingBlock([taken(binding) for binding in block.bindings]) for block in function.body.blocks]
    blocks = [relax.BindingBlock(first), *blocks] if first else blocks
    swap = [(relax.Var, lambda var: new if var.same_as(old) else var)]
    body = tvm_ffi.structural_map(relax.SeqExpr(blocks, function.body.body), swap)
    params = [new if param.same_as(old) else param for param in function.params]
    return relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs)
