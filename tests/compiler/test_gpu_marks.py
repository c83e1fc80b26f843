"""What decoding on devices other than CUDA's is measured by: loads, instructions, barriers."""

from __future__ import annotations

from typing import Any

import pytest

from mlcbuild.compiler.gpu import products, vector_rows, wide_buffers
from mlcbuild.quantization.schemes import parts
from tests.compiler.test_gpu_attention import Attention, Shape
from tests.support import device_code
from tests.support.gpus import DEVICES, Gpu
from tests.support.llama import QUANTIZATIONS
from tests.support.tir_marks import Marks, barriers, marks

pytestmark = pytest.mark.slow

OTHERS = [gpu for gpu in DEVICES if gpu.kind != "cuda"]
# Bits of a weight; instructions for each, of one row of x, of up to four and of up to eight.
MOST = {
    "q4f16_1": (4, 3.9, 8.3, 13.3),
    "q4f32_1": (4, 3.6, 7.3, 11.3),
    "q4f16_0": (4, 3.9, 8.3, 13.3),
    "q3f16_1": (3.2, 3.9, 8.3, 13.3),
    "q8f16_1": (8, 4.0, 8.4, 13.4),
    "q0f16": (16, 2.3, 6.0, 11.0),
}
COLUMNS = (2048, 4096, 11008, 14336)  # of 1B, 7B and 8B models
ROWS = 4096


def product(gpu: Gpu, name: str, columns: int) -> Any:
    quantization = QUANTIZATIONS[name]
    weights, dtype = quantization.weights, quantization.model_dtype
    described: tuple[products.Part, ...] = (("weight", (ROWS, columns), dtype),)
    if weights is not None:
        described = tuple((part.form, part.shape, part.dtype) for part in parts(ROWS, columns, weights, dtype))
    wide = gpu.kind == "metal"
    return gpu.scheduled(products.linear(described, weights, ROWS, columns, dtype, dtype, wide=wide))


def measured(gpu: Gpu, name: str, columns: int) -> list[Marks]:
    """Those of the kernels for few rows. In WGSL and SPIR-V, a buffer's elements are what can be loaded at once."""
    functions = device_code.device_functions(product(gpu, name, columns), gpu.TARGET)[: len(vector_rows.COUNTS)]
    if gpu.kind in ("webgpu", "vulkan"):
        functions = [wide_buffers.kernel(each) for each in functions]
        assert all(str(param.ty.element_type.dtype)[-2:] == "x4" for each in functions for param in each.params[2:4])
    return [marks(each, "weight" if name == "q0f16" else "q_weight") for each in functions]


@pytest.mark.parametrize("gpu", OTHERS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("columns", COLUMNS)
def test_products_of_few_rows(gpu: Gpu, columns: int) -> None:
    check(gpu, "q4f16_1", columns)


@pytest.mark.parametrize("name", [name for name in MOST if name != "q4f16_1"])
def test_products_in_other_formats(name: str) -> None:
    check(OTHERS[0], name, 4080 if name == "q3f16_1" else 4096)


def check(gpu: Gpu, name: str, columns: int) -> None:
    """The matrix in loads of 16 bytes (of plain 16-bit numbers, 8), each once; 64 bytes of it before one is used."""
    bits, *most = MOST[name]
    matrix, wide = ("weight", 8) if name == "q0f16" else ("q_weight", 16)
    for rows, bound, found in zip(vector_rows.COUNTS, most, measured(gpu, name, columns), strict=True):
        words = found.of(matrix)
        assert words == {wide: 64 // wide}, (rows, words)
        weights = 64 * 8 / bits
        assert found.instructions / weights <= bound, (rows, found.instructions / weights)
        assert found.ahead == 64
        (size,) = found.of("x")
        assert size == (16 if "f32" in name else 8) and sum(found.of("x").values()) * 16 <= weights * rows
        assert (found.looped, found.barriers) == (0, 1 if rows <= 4 else 3)


def test_loads_as_each_language_writes_them() -> None:
    texts = {gpu.name: device_code.source(product(gpu, "q4f16_1", 4096), gpu.TARGET)[0] for gpu in OTHERS[:3]}
    assert "uint4 words = *(device uint4*)(q_weight_ptr + " in texts["metal"]
    assert "uint4 words = vload4(0, q_weight_ptr + " in texts["opencl"]
    assert "var<storage, read> q_weight_ptr : array<vec4<u32>>;" in texts["wgsl"]
    assert "let words : vec4<u32> = q_weight_ptr[" in texts["wgsl"]


@pytest.mark.parametrize("gpu", OTHERS[::2], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("heads", "keys"), [(32, 128), (64, 64)])  # query heads; keys of a step
def test_decoding_over_cached_pages(gpu: Gpu, heads: int, keys: int) -> None:
    """Six barriers to a step of keys, whose loads are vectors: of keys eight or four on their way, of values four."""
    first, joining = device_code.device_functions(Attention(gpu, Shape(128, heads, 8)).decode, gpu.TARGET)
    if gpu.kind in ("webgpu", "vulkan"):
        first = wide_buffers.kernel(first)
    found = marks(first, "flat")
    assert (found.looped, found.of("flat")) == (6, {8: keys // 16 + 4})
    assert not barriers(joining.body)
