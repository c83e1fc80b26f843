"""Many small recipes, for the benchmarks of whole builds: what is in their matrix files, and what a command costs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

QUANTIZATIONS = (
    "q4f16_1",
    "q4f32_1",
    "q3f16_1",
    "q8f16_1",
    "q0f16",
    "q0f32",
    "q4f16_0",
    "q4bf16_1",
    "q8f32_1",
    "q0bf16",
)
TARGETS = ("cpu", "cpu-x86_64")
PER_MODEL = len(QUANTIZATIONS) * len(TARGETS)


@dataclass(frozen=True)
class Cost:
    """Seconds: of the processor, by a process and all that it started, and of the clock."""

    cpu: float
    wall: float


def write_matrices(root: Path, names: Sequence[str], count: int) -> None:
    """A matrix file for each model; together they name `count` recipes, or one more where that is odd."""
    folder = root / "recipes" / "matrix"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        here = min(count - number * PER_MODEL, PER_MODEL)
        formats = QUANTIZATIONS[: -(-here // len(TARGETS))]
        axes = {"model": [name], "quantization": formats, "target": TARGETS}
        (folder / f"{name}.yaml").write_text(json.dumps({"matrix": axes}))


def models(count: int) -> int:
    """How many models `count` recipes are made of."""
    return max(1, -(-count // PER_MODEL))


def run(command: Sequence[str], where: Path, more: Mapping[str, str], log: Path) -> Cost:
    """What the command costs. Raises RuntimeError, with the end of what it wrote to `log`, when it fails."""
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=where, env={**environment(), **more}, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{tail}")
    return Cost(usage.ru_utime + usage.ru_stime, wall)


def environment() -> dict[str, str]:
    """This process's, without what would steer a build."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLCBUILD_")}
