"""Many small recipes, for the benchmarks of whole builds: what is in their matrix files, and what a command costs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.workspace.init import init

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
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
}
CHECKPOINT = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Cost:
    """Seconds: of the processor, by a process and all that it started, and of the clock."""

    cpu: float
    wall: float


def write_workspace(root: Path, count: int) -> None:
    """A workspace with `count` recipes of tiny models, one in five with a structure of its own; nothing is built."""
    init(root)
    (root / "recipes" / "stories-cpu.yaml").unlink()
    names = [f"m{number:04}" for number in range(models(count))]
    for number, name in enumerate(names):
        checkpoint = root / "recipes" / "models" / name
        checkpoint.mkdir(parents=True)
        width = CONFIG["intermediate_size"] + 32 * (number // 5)  # not layers: more of them is more to plan
        (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": width}))
        for file in CHECKPOINT:
            (checkpoint / file).write_text(f"{name} {file}")
        (checkpoint.parent / f"{name}.yaml").write_text(f"source: {{path: {name}}}\ntemplate: chatml\n")
    write_matrices(root, names, count)


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


def run(command: Sequence[str], where: Path, more: Mapping[str, str], log: Path, status: int = 0) -> Cost:
    """What the command costs. Raises RuntimeError, with the end of what it wrote to `log`, where it ends otherwise."""
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=where, env={**environment(), **more}, stdout=output, stderr=output)
        _, ended, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}\n{tail}")
    return Cost(usage.ru_utime + usage.ru_stime, wall)


def environment() -> dict[str, str]:
    """This process's, without what would steer a build."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MLCBUILD_")}
