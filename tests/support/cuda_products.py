"""CUDA source of single products: kernels as TVM writes them around the functions of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from mlcbuild.compiler.gpu import cuda_many, cuda_rows, sources


def source(instances: dict[str, cuda_rows.Instance], early: bool = False) -> str:
    """Kernels as TVM writes them around the function; a gate is SiLU. `early` is sources.complete's."""
    pieces = ["#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"]
    for name, one in instances.items():
        number = next(of for of in ("nv_bfloat16", "float", "half") if f"<{of}," in one.name)
        fused = one.function == "fused_rows"
        given = "x, g, w, s, 1e-5f" if fused else "x, w, s"
        each = 2 if fused and one.arguments.endswith("true") else 1  # rows of the matrix to a result
        gate = "results[2 * i] / (1.f + __expf(-results[2 * i])) * results[2 * i + 1]"
        pieces.append(
            f'extern "C" __global__ void __launch_bounds__({one.threads}) {name}({number}* __restrict__ y, '
            f"{number}* __restrict__ s, unsigned int* __restrict__ w, {number}* __restrict__ x, "
            f"{number}* __restrict__ g, int n, int rows) {{\n"
            f"  float results[{one.results}];\n  __shared__ alignas(64) float partial[{one.shared}];\n"
            f"  {one.name}(results, partial, {given}, n, rows, ((int)blockIdx.x));\n"
            f"  for (int i = 0; i < {one.results // each}; ++i) {{\n"
            f"    int at = i * {one.threads} + threadIdx.x, m = at / {one.rows // each};\n"
            f"    int column = blockIdx.x * {one.rows // each} + at % {one.rows // each};\n"
            f"    if (m < n && column < rows / {each})\n"
            f"      y[m * (rows / {each}) + column] = ({number})({gate if each == 2 else 'results[i]'});\n"
            "  }\n}\n"
        )
    return sources.complete("".join(pieces), early)


def source_of_many(instances: dict[str, cuda_many.Instance], early: bool = False) -> str:
    """The same for products of many rows of float16."""
    pieces = ["#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"]
    for name, one in instances.items():
        handed = 64 * one.height // 128
        given = "half* __restrict__ y, half* __restrict__ s, unsigned int* __restrict__ w, half* __restrict__ x, int n"
        pieces.append(
            f'extern "C" __global__ void __launch_bounds__(128) {name}({given}, int rows) {{\n'
            f"  float sums[{one.height * one.width * one.along // 128}];\n"
            f"  __shared__ alignas(64) float stages[{one.shared}];\n"
            f"  {one.name}(sums, stages, x, w, s, n, rows, ((int)blockIdx.x), ((int)blockIdx.y));\n"
        )
        for part, hand_over in enumerate(one.handed):
            total = " + ".join(f"stages[{along * 64 * (one.height + 4)} + low + inner]" for along in range(one.along))
            pieces.append(
                f"  {hand_over}(stages, sums);\n  for (int i = 0; i < {handed}; ++i) {{\n"
                f"    int at = i * 128 + threadIdx.x, inner = at % {one.height}, of_x = at / {one.height};\n"
                f"    int low = of_x * {one.height + 4}, row = blockIdx.x * {one.width} + {64 * part} + of_x;\n"
                f"    int column = blockIdx.y * {one.height} + inner;\n"
                f"    if (row < n && column < rows) y[row * rows + column] = (half)({total});\n  }}\n"
            )
        pieces.append("}\n")
    return sources.complete("".join(pieces), early)


def source_of_experts(shapes: Mapping[str, tuple[str, int, int, bool]]) -> str:
    """Products of many rows with the experts that they chose, as TVM writes them: `name_1`, `name_2` for each name.

    shapes: format, rows and columns of the matrices, and whether each choice has its own row.
    """
    from mlcbuild.compiler.gpu import experts
    from mlcbuild.compiler.gpu.device import device_of
    from mlcbuild.quantization.schemes import parts_of
    from tests.support import device_code
    from tests.support.gpus import DEVICES
    from tests.support.llama import QUANTIZATIONS

    cuda, pieces = DEVICES[0], list[str]()
    for name, (form, rows, columns, each) in shapes.items():
        dtype, weights, shape = QUANTIZATIONS[form].model_dtype, QUANTIZATIONS[form].weights, (8, rows, columns)
        weights = weights and replace(weights, layout="NK")
        found = parts_of(shape, weights, dtype) if weights else ()
        parts = tuple((part.form, part.shape, part.dtype) for part in found) or (("weight", shape, dtype),)
        sizes = (rows, columns, 2, each, dtype, dtype, device_of(cuda.TARGET))
        code, _ = device_code.source(cuda.scheduled(experts.linear(parts, weights, *sizes)), cuda.TARGET)
        pieces = pieces or [code[: code.index('extern "C"')]]
        kernels = re.findall(r'^extern "C" [^{;]*\{\n.*?^\}\n', code, re.MULTILINE | re.DOTALL)
        pieces += [kernel.replace("main_kernel", name, 1) for kernel in kernels if "rows_of_expert" in kernel]
    return sources.complete("".join(pieces))
