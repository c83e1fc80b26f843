"""What the emulated device finds in a kernel: races, accesses outside of memory, threads that wait for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.emulation.worker import ROOT

HEAD = 'extern "C" __global__ void __launch_bounds__(64) test(float* __restrict__ x_ptr) {\n'
INDEX = "  int i = ((int)blockIdx.x) * 32 + ((int)threadIdx.x);\n"


def launched(body: str, threads: int = 32) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.emulation.launch", str(threads)]
    return subprocess.run(command, cwd=ROOT, input=f"{HEAD}{body}}}\n", capture_output=True, text=True, check=False)


def test_a_kernel_without_a_fault_has_no_note() -> None:
    done = launched(
        f"{INDEX}  __shared__ alignas(64) float t_ptr[32];\n"
        "  t_ptr[((int)threadIdx.x)] = (float)i;\n  __syncthreads();\n"
        "  x_ptr[i] = t_ptr[31 - ((int)threadIdx.x)] + __shfl_xor_sync(0xffffffff, (float)i, 1, 32);\n"
    )
    assert done.stdout == "0 {} [32.0, 30.0, 32.0, 30.0]\n", done.stderr


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            "  __shared__ alignas(64) float t_ptr[32];\n  t_ptr[((int)threadIdx.x)] = (float)i;\n"
            "  x_ptr[i] = t_ptr[31 - ((int)threadIdx.x)];\n",
            id="no barrier between writing and reading shared memory",
        ),
        pytest.param(
            "  x_ptr[i] = (float)i;\n  __syncthreads();\n"
            "  float sum = x_ptr[i / 32 * 32];\n  x_ptr[i / 32 * 32] = 0.5f * sum + (float)i;\n",
            id="every thread reads one figure and overwrites it",
        ),
        pytest.param("  x_ptr[0] = (float)i;\n", id="two blocks write to one place"),
    ],
)
def test_a_race_is_noted(body: str) -> None:
    done = launched(f"{INDEX}{body}")
    assert "'test': ('a race: thread orders 0 and " in done.stdout, done.stdout + done.stderr


def test_an_access_outside_of_memory_ends_the_process_and_is_said() -> None:
    done = launched(f"{INDEX}  x_ptr[i + 1] = 1.0f;\n")
    assert done.returncode == -11
    assert done.stderr.endswith("emulated device: test touches byte 1 behind an allocation of 256 bytes\n")


def test_shared_memory_has_an_end() -> None:
    done = launched(f"{INDEX}  __shared__ alignas(64) float t_ptr[32];\n  t_ptr[i] = 1.0f;\n  x_ptr[i] = t_ptr[i];\n")
    assert done.returncode == -11
    assert done.stderr.endswith("emulated device: test touches memory that is not its own\n")


def test_a_vector_that_is_not_aligned_is_a_fault() -> None:
    done = launched("  *(float4*)(x_ptr + 1) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);\n")
    assert done.returncode < 0
    assert done.stderr.endswith("emulated device: test makes an access that is not aligned\n")


def test_a_barrier_that_some_threads_never_reach_is_a_failed_launch() -> None:
    done = launched(f"{INDEX}  if (((int)threadIdx.x) < 8) {{ return; }}\n  __syncthreads();\n  x_ptr[i] = 0.0f;\n")
    assert done.stdout.startswith("719 {'test': ('24 of 32 threads wait at a barrier that the others never reach',)}")


def test_memory_that_nobody_wrote_to_is_no_number() -> None:
    done = launched(f"{INDEX}  if (i > 1) {{ x_ptr[i] = 1.0f; }}\n")
    assert done.stdout == "0 {} [nan, nan, 1.0, 1.0]\n", done.stderr
