"""benchmarks/quantize.py runs, and leaves nothing behind. Its figures mean nothing at this size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quantize.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_it_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--shape", "tiny", "--rounds", "1", "--threads", "1", "--folder", tmp_path,
         "--llama-python", "/bin/false"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "making a tiny checkpoint of 2 layers, 0.04 GB of float16"
    assert [line[:26].strip() for line in lines[2:5]] == ["mlcbuild q4f16_1, 1 thread", "copy", "sha256"]
    assert lines[5].startswith("speed of q4f16_1 with 1 thread: ") and lines[5].endswith(" x sha256")
    assert lines[6] == "llama.cpp: skipped: no llama-cpp-python here; name a Python that has it with --llama-python"
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    code = (
        f"import runpy, shutil, sys; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**9); "
        f"sys.argv = ['quantize', '--folder', {str(tmp_path)!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}: 8.1 GB are needed, 1.0 GB are free; choose a --folder\n"
