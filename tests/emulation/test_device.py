"""What the emulated device finds in a kernel: races, accesses outside of memory, threads that wait for ever."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.compiler.gpu import sources
from mlcbuild.emulation.kernels import Array, Machine
from mlcbuild.errors import MlcBuildError

CUDA = """extern "C" __global__ void __launch_bounds__(64) test(float* __restrict__ x_ptr) {{
  int i = ((int)blockIdx.x) * 32 + ((int)threadIdx.x);
  {}
}}
"""
OPENCL = """// Function: test
__kernel void test(__global float* restrict x_ptr);
__kernel void test(__global float* restrict x_ptr) {{
  int i = convert_int(get_group_id(0)) * 32 + convert_int(get_local_id(0));
  {}
}}
"""
METAL = """// Function: test
#include <metal_stdlib>
using namespace metal;
struct test_args_t {{
  int n[2];
  long wide;
}};
kernel void test(  device float* x_ptr [[ buffer(0) ]],
  constant test_args_t& arg [[ buffer(1) ]],
  uint blockIdx [[threadgroup_position_in_grid]],
  uint threadIdx [[thread_position_in_threadgroup]]
) {{
  int i = ((int)blockIdx) * 32 + ((int)threadIdx);
  {}
}}
"""
REVERSED = "t[31 - i % 32]"
STAGED = {  # by way of shared memory
    "cuda": (CUDA, "__shared__ alignas(64) float", "__syncthreads();"),
    "opencl": (OPENCL, "__local float", "barrier(CLK_LOCAL_MEM_FENCE);"),
    "metal": (METAL, "threadgroup float", "threadgroup_barrier(mem_flags::mem_threadgroup);"),
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("device"))


def launched(machine: Machine, code: str, language: str = "cuda", threads: int = 32) -> Array:
    kernel = machine.load(code, language)["test"]
    numbers = {"n": 3, "wide": 2**40}
    return kernel.run((2, 1, 1), (threads, 1, 1), {"x": np.full(64, np.nan, np.float32)}, numbers)["x"]


def test_what_is_touched_before_the_kernel_before_has_ended(machine: Machine) -> None:
    def early(code: str) -> None:
        source = sources.complete(CUDA.format(code), early=True).replace(f"{{\n{sources._WAIT}", "{\n")
        machine.load(source, "cuda")["test"].run((2, 1, 1), (32, 1, 1), {"x": np.zeros(64, np.float32)}, {}, early=True)

    early(f"{sources._WAIT} x_ptr[i] = i;")
    for code in (f"x_ptr[i] = i; {sources._WAIT}", f"__syncthreads(); if (i == 40) x_ptr[i] = 1; {sources._WAIT}"):
        with pytest.raises(MlcBuildError, match="test: touches what kernels write before it waits for the one before"):
            early(code)
    with pytest.raises(MlcBuildError, match="test: threads that do not wait for the kernel before"):
        early(f"if (i < 40) {{{{ {sources._WAIT} }}}} x_ptr[i] = i;")


def problem(machine: Machine, code: str, language: str = "cuda", threads: int = 32) -> str:
    with pytest.raises(MlcBuildError) as caught:
        launched(machine, code, language, threads)
    return str(caught.value)


@pytest.mark.parametrize("language", STAGED)
def test_a_barrier_between_writing_and_reading(language: str, machine: Machine) -> None:
    code, declared, barrier = STAGED[language]
    stage = f"{declared} t[32]; t[i % 32] = (float)i;"
    got = launched(machine, code.format(f"{stage} {barrier} x_ptr[i] = {REVERSED};"), language)
    assert got.tolist() == [*range(31, -1, -1), *range(63, 31, -1)]
    assert problem(machine, code.format(f"{stage} x_ptr[i] = {REVERSED};"), language).startswith(
        "test: a race: thread orders 0 and "
    )


@pytest.mark.parametrize(
    ("code", "language"),
    [
        (CUDA.format("x_ptr[i] = __shfl_xor_sync(0xffffffff, (float)i, 1, 32);"), "cuda"),
        (METAL.format("x_ptr[i] = simd_shuffle_xor((float)i, 1);"), "metal"),
    ],
)
def test_lanes_exchange_what_they_have(code: str, language: str, machine: Machine) -> None:
    assert launched(machine, code, language)[:4].tolist() == [1, 0, 3, 2]


def test_numbers_of_metal_come_in_slots(machine: Machine) -> None:
    got = launched(machine, METAL.format("x_ptr[i] = (float)arg.n[0] + (float)(arg.wide >> (long)39);"), "metal")
    assert (got == 5).all()


def test_vectors_and_halves(machine: Machine) -> None:
    vector = "(float4)(1.0f, 2.0f, 3.0f, convert_float(convert_half(0.1f)))"
    body = f"if (i % 4 == 0) {{ vstore4(({vector} * {vector}), 0, x_ptr + i); }}"
    tenth = np.float32(np.float16(0.1))
    assert launched(machine, OPENCL.format(body), "opencl")[:5].tolist() == [1, 4, 9, tenth * tenth, 1]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            "x_ptr[i] = (float)i; __syncthreads();"
            "float sum = x_ptr[i / 32 * 32]; x_ptr[i / 32 * 32] = 0.5f * sum + (float)i;",
            id="every thread reads one figure and overwrites it",
        ),
        pytest.param("x_ptr[0] = (float)i;", id="two blocks write to one place"),
    ],
)
def test_a_race_is_noted(body: str, machine: Machine) -> None:
    assert problem(machine, CUDA.format(body)).startswith("test: a race: thread orders 0 and ")


@pytest.mark.parametrize("left_out", [None, "mlcbuild::wait_for_copies<0>();", "__syncthreads(); x_ptr"])
def test_asynchronous_copies_are_there_behind_a_wait_and_a_barrier(left_out: str | None, machine: Machine) -> None:
    body = f"""__shared__ alignas(64) float t[32]; x_ptr[i] = (float)i; __syncthreads();
  if (i % 32 < 8) mlcbuild::copy_later<16>(t + i % 32 * 4, x_ptr + i + i % 32 * 3, true);
  mlcbuild::end_of_copies(); mlcbuild::wait_for_copies<0>(); __syncthreads(); x_ptr[i] = {REVERSED};"""
    if left_out is None:
        assert launched(machine, CUDA.format(body)).tolist() == [*range(31, -1, -1), *range(63, 31, -1)]
    else:
        code = CUDA.format(body.replace(left_out, left_out.partition("; ")[2]))
        assert "a race" in problem(machine, code)


def test_simdgroup_functions_do_not_order_memory(machine: Machine) -> None:
    """What lanes have written is there for a matrix only behind a barrier."""
    body = """threadgroup float t[64]; t[i % 32] = (float)i; t[i % 32 + 32] = (float)i; BARRIER
  simdgroup_float8x8 m[1]; simdgroup_load(m[0], (&(t[0])), 8, 0, (bool)0);
  simdgroup_store(m[0], (&(x_ptr[0])), 8, 0, (bool)1);"""
    code = METAL.format(f"if (((int)blockIdx) == 0) {{ {body} }}")
    got = launched(machine, code.replace("BARRIER", "simdgroup_barrier(mem_flags::mem_threadgroup);"), "metal")
    expected = np.tile(np.arange(32), 2).reshape(8, 8).T
    assert (got == expected.reshape(-1)).all()
    assert "a race" in problem(machine, code.replace("BARRIER", ""), "metal")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x_ptr[i + 1] = 1.0f;", "touches byte 1 behind an allocation of 256 bytes"),
        ("__shared__ alignas(64) float t[32]; t[i] = 1.0f; x_ptr[i] = t[i];", "touches memory that is not its own"),
        ("*(float4*)(x_ptr + 1) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);", "makes an access that is not aligned"),
        (
            "if (i % 32 < 8) { return; } __syncthreads(); x_ptr[i] = 0.0f;",
            "24 of 32 threads wait at a barrier that the others never reach",
        ),
    ],
)
def test_a_fault_is_a_failed_launch(body: str, expected: str, machine: Machine) -> None:
    assert problem(machine, CUDA.format(body)) == f"test: {expected}"


def test_memory_that_nobody_wrote_to_is_no_number(machine: Machine) -> None:
    got = launched(machine, CUDA.format("__shared__ alignas(64) float t[32]; x_ptr[i] = t[i % 32];"))
    assert np.isnan(got).all()


def test_what_a_language_does_not_have_is_not_compiled(machine: Machine) -> None:
    with pytest.raises(MlcBuildError, match=r"erf"):
        launched(machine, METAL.format("x_ptr[i] = erf((float)i);"), "metal")
