"""One matrix product on the emulated device, for the worker: random codes and scales, NumPy's sums in float64.

{"product": {"quantization": "q4f16_1", "rows": 50, "columns": 96, "changes": {"group_size": 64}, "around": ["norm"]}}
-> {"errors": {"1": 3e-4, "8": ...}, "notes": {}, "kernels": 2}: by the rows of x, over the sums' deviation; with a norm
or a gate around it, over the largest result
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROWS_OF_X = (1, 2, 8, 9, 32, 33, 260)
EPS = 1e-10  # the inverse of its root is more than half has
# Of x, where a norm is before the product: no square fits into 16 bits; of one row also as much as EPS, and nothing.
SCALE, SCALES_OF_ONE = 900.0, (1e-5, 0.0)


def judged(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    import ml_dtypes
    import numpy as np
    import tvm
    import tvm_ffi
    from tvm import IRModule, target

    from mlcbuild.compiler.gpu import cuda_fused, cuda_rows, products, schedules, sources
    from mlcbuild.compiler.gpu import rows as functions
    from mlcbuild.compiler.gpu.device import device_of
    from mlcbuild.emulation import cuda
    from mlcbuild.quantization.schemes import elements_per_word, max_code
    from mlcbuild.recipes.load import load
    from tests.emulation.build import ROOT

    catalog = load(ROOT)
    quantization = catalog.quantizations[asked["quantization"]]
    dtype = quantization.model_dtype
    weights = quantization.weights and replace(quantization.weights, **asked.get("changes", {}))
    rows, columns = int(asked["rows"]), int(asked["columns"])
    random = np.random.default_rng(rows * columns)
    number = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    if weights is None:
        given = {"weight": random.standard_normal((rows, columns)).astype(number)}
        exact = given["weight"].astype("float64")
    else:
        group, per_word, middle = weights.group_size, elements_per_word(weights), max_code(weights)
        groups = -(-columns // group)
        codes = random.integers(0, 2 * middle + 1, (rows, groups * group)).astype("uint32")
        codes[:, columns:] = 0
        scales = random.uniform(0.01, 0.02, (rows, groups)).astype(number)
        shifts = np.arange(per_word, dtype="uint32") * weights.bits
        words = (codes.reshape(rows, -1, per_word) << shifts).sum(axis=2, dtype="uint32")
        given = {"q_weight": words, "q_scale": scales}
        exact = (codes.astype("float64") - middle) * scales.astype("float64").repeat(group, axis=1)
        exact = exact[:, :columns]
        if weights.layout == "KN":
            given = {name: np.ascontiguousarray(part.T) for name, part in given.items()}
    height = "rows" if asked.get("symbolic") else rows
    named = {rows: height}
    parts = tuple((name, tuple(named.get(n, n) for n in part.shape), str(part.dtype)) for name, part in given.items())
    around = asked.get("around", [])
    function = products.linear(parts, weights, height, columns, dtype, dtype if around else "float32", False)
    device = catalog.targets["cuda"].device
    folder.mkdir(parents=True)

    def compiled(code: str, *_: Any) -> bytes:
        few = ["fused_rows"] if "gate" in around else ["fused_rows", "few_rows"] if around else ["few_rows"]
        for name in [*few, "many_rows"] if dtype != "float32" else ["few_rows"]:
            assert f"mlcbuild::{name}<mlcbuild::Weights<{cuda_rows.TYPES[dtype]}" in code, "another kernel"
        return cuda.compile_source(sources.complete(code), folder)

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)
    with target.Target({**device, "host": {"kind": "llvm"}}) as both:
        of = device_of(device)

        def schedule(one: Any, above: int = 0) -> Any:
            return schedules.schedule(IRModule({"main": one}), of, above)["main"]

        if around:
            norm = functions.rms_norm(columns, EPS, dtype) if "norm" in around else None
            gate = functions.gated("silu", rows // 2, dtype) if "gate" in around else None
            chain = [each and schedules._narrow(IRModule({"main": each}))["main"] for each in (function, norm, gate)]
            function = cuda_fused._function(cuda_fused._Chain(*chain), schedule)
        else:
            function = schedule(function)
        run = tvm.compile(IRModule({"main": function.with_attr("global_symbol", "main")}), target=both)
    on_device = [tvm.runtime.tensor(part, tvm.cuda()) for part in given.values()]
    before = cuda.report().launches
    cuda.forget()
    errors = {}
    counts = ROWS_OF_X if dtype != "float32" else ROWS_OF_X[:3]  # what there are functions for
    asked_of = [(n, SCALE) for n in counts] + [(1, scale) for scale in SCALES_OF_ONE if "norm" in around]
    for n, size in asked_of:
        x = random.standard_normal((n, columns)).astype(number)
        weight = random.uniform(-2, 2, columns).astype(number)
        normed, factor = x.astype("float64"), weight.astype("float64")
        if "norm" in around:
            x = (x * size).astype(number)
            normed = x.astype("float64")
            normed = normed / np.sqrt((normed**2).mean(axis=1, keepdims=True) + EPS) * factor
        expected = normed @ exact.T
        results = [np.full((n, columns), np.nan, number)] if "norm" in around else []
        results.append(np.full((n, rows), np.nan, number if around else "float32"))
        if "gate" in around:
            left, right = expected[:, : rows // 2], expected[:, rows // 2 :]
            expected = left / (1 + np.exp(-left)) * right
            results.append(np.full((n, rows // 2), np.nan, number))
        inputs = [x, weight] if "norm" in around else [x]
        outputs = [tvm.runtime.tensor(each, tvm.cuda()) for each in results]
        run["main"](*(tvm.runtime.tensor(each, tvm.cuda()) for each in inputs), *on_device, *outputs)
        scale = (np.abs(expected).max() or 1.0) if around else expected.std()
        errors[str(n) if size == SCALE else f"1 of {size}"] = float(
            np.abs(outputs[-1].numpy().astype("float64") - expected).max() / scale
        )
    report = cuda.report()
    ran = [name for name, count in report.launches.items() if count > before.get(name, 0)]
    return {"errors": errors, "notes": report.notes, "kernels": len(ran)}
