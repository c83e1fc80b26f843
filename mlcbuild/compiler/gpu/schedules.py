"""Schedules: which thread computes what, for every function that has none yet.

A matrix product becomes three to five kernels, and the number of rows of x decides at run time which one is launched:
few rows (decoding) are bound by reading the matrix, so its rows are shared out and x stays in the caches; many rows
(prefill) go through tensor cores, simdgroups or shared memory. Everything else is TVM's dlight.
"""

from __future__ import annotations

from typing import Any

from tvm import IRModule, s_tir, tirx
from tvm.s_tir import dlight

from mlcbuild.compiler.gpu import cuda_fused, cuda_many, cuda_prefetch, cuda_rows, metal, recurrent, vector_rows
from mlcbuild.compiler.gpu.device import Device
from mlcbuild.compiler.gpu.few_rows import few_rows
from mlcbuild.compiler.gpu.inlining import blocks_of, scheduled
from mlcbuild.compiler.gpu.products import PRODUCT, STEP
from mlcbuild.models import routers

_EACH = (routers.BLOCK, recurrent.NARROW)  # blocks that dlight's reductions do not take: a thread for each value
_EARLY = "tirx.use_programtic_dependent_launch"  # spelled as TVM does
# Up to so many rows of x: a kernel whose blocks of threads take so many of them, or none but a function of ours.
FEW = tuple(zip(cuda_rows.COUNTS, (1, 4, None), strict=True))


def schedule(module: IRModule, device: Device, above: int = 0) -> IRModule:
    """The module with every TIR function scheduled for the current target, which is `device`.

    Products have no kernels for `above` rows of x and fewer.
    """
    module = _narrow(module)
    if device.kind == "cuda":
        module = cuda_fused.fuse(
            module, lambda function, least: schedule(IRModule({"main": function}), device, least)["main"]
        )
    for gv, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc) or scheduled(function):
            continue
        if _product(function) is not None:
            module[gv] = _linear(function, device, above)
        elif any(name.startswith(_EACH) for name in blocks_of(function)):
            module[gv] = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(IRModule({"main": function}))["main"]
    rules = dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback()
    module = dlight.ApplyDefaultSchedule(*rules)(module)
    module = cuda_prefetch.prefetch(module) if device.kind == "cuda" else module
    for gv, function in module.functions_items() if device.early else []:
        if isinstance(function, tirx.PrimFunc):
            module[gv] = function.with_attr("tirx.kernel_launch_params", [_EARLY])
    return module


def _narrow(module: IRModule) -> IRModule:
    """Indices as int32: twice as fast to compute, and what simdgroup intrinsics have (an int64 beside them fails)."""
    waiting = {gv: f for gv, f in module.functions_items() if isinstance(f, tirx.PrimFunc) and not scheduled(f)}
    narrow = tirx.transform.ForceNarrowIndexToInt32()(IRModule({gv.name_hint: f for gv, f in waiting.items()}))
    for gv in waiting:
        module[gv] = narrow[gv.name_hint]
    return module


def _product(function: tirx.PrimFunc) -> Any:
    """The block that is a matrix product's, or None."""
    return blocks_of(function).get(PRODUCT)


def _linear(function: tirx.PrimFunc, device: Device, above: int) -> tirx.PrimFunc:
    product = _product(function)
    rows_of_x = product.iter_vars[0].dom.extent
    own = cuda_many.many_rows(function, product) if device.kind == "cuda" else []
    many = own[-1][1] if own else _many_rows(function, device)
    kernels = [(most, kernel) for most, kernel in own if most is not None]
    kernels += [few for few in reversed(_few_rows(function, product, device)) if few[0] > above]
    body = many.body
    for most, kernel in kernels:
        body = tirx.IfThenElse(tirx.op.tvm_thread_invariant(rows_of_x <= most), kernel.body, body)
    body = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body))
    result = many.with_body(body)
    return result.with_attr("tirx.is_scheduled", True).with_attr("tirx.HoistIfThenElseExprWithBlock", 1)


def _few_rows(function: tirx.PrimFunc, product: Any, device: Device) -> list[tuple[int, tirx.PrimFunc]]:
    """Up to how many rows of x, and the kernel."""
    if device.kind in vector_rows.KINDS:
        found = [(most, vector_rows.few_rows(function, product, most)) for most in vector_rows.COUNTS]
        if all(kernel is not None for _, kernel in found):
            return found
    kernels, step = [], int(function.attrs.get(STEP, 8))
    for limit, count in FEW:
        small = cuda_rows.few_rows(function, product, limit) if device.kind == "cuda" else None
        if small is None and count is not None:
            small = few_rows(function, device, count, step)
        if small is not None:
            kernels.append((limit, small))
    return kernels


def _many_rows(function: tirx.PrimFunc, device: Device) -> tirx.PrimFunc:
    if device.kind == "metal":
        return metal.many_rows(function)
    rule = dlight.ApplyDefaultSchedule(dlight.gpu.Matmul())
    return rule(IRModule({"main": function}))["main"]
