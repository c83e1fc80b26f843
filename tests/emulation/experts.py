"""A matrix product with chosen experts on the emulated device, with its plan, for the worker: NumPy's sums in float64.

{"experts": {"quantization": "q4f16_1", "rows": 50, "columns": 96, "each": true}}
-> {"errors": {"1": 3e-4, "3": ...}, "notes": {}, "kernels": 5}: by the tokens, over the sums' deviation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

TOKENS = (1, 3, 4, 400)  # where rows are multiplied one by one, the last such, in small blocks, in large ones
EXPERTS, COUNT = 3, 1  # so that 400 tokens are enough


def judged(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    import numpy as np
    import tvm
    import tvm_ffi
    from tvm import IRModule, target

    from mlcbuild.compiler.gpu import expert_plan, experts, schedules, sources
    from mlcbuild.compiler.gpu.device import device_of
    from mlcbuild.compiler.operations import FEW
    from mlcbuild.emulation import cuda
    from mlcbuild.quantization.schemes import parts_of
    from mlcbuild.recipes.load import load
    from tests.compiler.packing import pack, rounded
    from tests.emulation.build import ROOT

    catalog = load(ROOT)
    quantization = catalog.quantizations[asked["quantization"]]
    dtype, shape = quantization.model_dtype, (EXPERTS, int(asked["rows"]), int(asked["columns"]))
    weights = quantization.weights and replace(quantization.weights, layout="NK")
    random = np.random.default_rng(shape[2])
    packed = pack(random.standard_normal(shape).astype("float32"), weights, dtype)
    parts = parts_of(shape, weights, dtype) if weights else ()
    described = tuple((part.form, part.shape, part.dtype) for part in parts) or (("weight", shape, dtype),)
    device = catalog.targets["cuda"].device
    folder.mkdir(parents=True)

    def compiled(code: str, *_: Any) -> bytes:
        return cuda.compile_source(sources.complete(code), folder)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)
    with target.Target({**device, "host": {"kind": "llvm"}}) as both:
        product = experts.linear(described, weights, *shape[1:], COUNT, False, dtype, dtype, device_of(device))
        named = {"plan": expert_plan.plan(EXPERTS, COUNT, int(product.attrs[FEW])), "product": product}
        module = IRModule({name: function.with_attr("global_symbol", name) for name, function in named.items()})
        run = tvm.compile(schedules.schedule(module, device_of(device)), target=both)

    def place(array: Any) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda())

    on_device = [place(part) for part in packed.parts]
    before = cuda.report().launches
    cuda.forget()
    errors = {}
    for n in TOKENS:
        chosen = random.choice([0, 2], (n, COUNT), p=[0.8, 0.2]).astype("int32")  # nobody takes one of them
        x = rounded(random.standard_normal((n, shape[2])).astype("float32"), dtype)
        sizes = (n * COUNT,), (expert_plan.tile_count(n * COUNT, EXPERTS), expert_plan.FIELDS)
        plan = [place(np.full(size, -1, "int32")) for size in (*sizes, (expert_plan.parts(n * COUNT), EXPERTS))]
        out = place(np.full((n * COUNT, shape[1]), np.nan, dtype))
        run["plan"](place(chosen), *plan)
        run["product"](place(x.astype(dtype)), place(chosen), *plan[:2], *on_device, out)
        expected = np.einsum("pk,pnk->pn", x.astype("float64"), packed.values.astype("float64")[chosen[:, 0]])
        errors[str(n)] = float(np.abs(out.numpy().astype("float64") - expected).max() / expected.std())
    report = cuda.report()
    ran = [name for name, count in report.launches.items() if count > before.get(name, 0)]
    return {"errors": errors, "notes": report.notes, "kernels": len(ran)}
