"""benchmarks/load.py for some seconds: clients that ask, leave, are killed and send nonsense; then Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.mark.slow
def test_many_clients_get_right_answers_or_right_errors(tiny_package: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tiny_package), "--seconds", "20", "--clients", "32"]
    command += ["--ended", "10"]  # tests run beside each other
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("whole", "streamed", "cancelled", "bad_json", "wrong_model"):
        assert f"{kind}: " in done.stdout
