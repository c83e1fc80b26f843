"""A workspace of toy steps in a temporary folder, and `doit` run in it as a user would."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).parents[2]  # step processes import the toy steps from there

DODO = """\
from mlcbuild.planning import planner

planner.STEPS = "tests.engine.toysteps"

from mlcbuild.tasks import *
"""
CONFIG = {
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


class Started(subprocess.Popen[str]):
    """A process that ends where the test around it fails: waiting for one that hangs would hang all tests."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, traceback)


@dataclass(frozen=True)
class Workspace:
    root: Path
    tricks: Path

    @property
    def dist(self) -> Path:
        return self.root / "dist"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def trick(self, name: str, text: str = "") -> Path:
        """Make the toy steps behave: see toysteps/common.py."""
        path = self.tricks / name
        path.write_text(text, encoding="utf-8")
        return path

    def ran(self) -> Counter[str]:
        """How often each kind of step has run since the last call."""
        log = self.tricks / "ran.txt"
        counts = Counter(log.read_text(encoding="utf-8").split()) if log.exists() else Counter[str]()
        log.unlink(missing_ok=True)
        return counts

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return Started(
            [sys.executable, "-m", "doit", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TOY_TRICKS": str(self.tricks), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that starts the tests in the background has told them, and so their children, to ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def doit(self, *arguments: str, status: int | None = 0, **environment: str) -> str:
        """What `doit ARGUMENTS` prints. Asserts its exit status."""
        with self.start(*arguments, **environment) as process:
            output, _ = process.communicate(timeout=120)
        assert status is None or process.returncode == status, output
        return output

    def digests(self) -> dict[str, str]:
        """The content of dist/, by name."""
        return {
            path.relative_to(self.dist).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.dist.rglob("*"))
            if path.is_file()
        }


def make_workspace(folder: Path) -> Workspace:
    """One model called `tiny`; the recipes tiny-q4f16_1-cpu and tiny-q4f32_1-cpu."""
    workspace = Workspace(folder / "workspace", folder / "tricks")
    workspace.tricks.mkdir(parents=True)
    workspace.write("dodo.py", DODO)
    workspace.write("recipes/models/tiny.yaml", "source: {path: tiny}\ntemplate: chatml\n")
    workspace.write("recipes/models/tiny/config.json", json.dumps(CONFIG))
    workspace.write("recipes/models/tiny/tokenizer.json", "{}")
    workspace.write("recipes/models/tiny/model.safetensors", "these would be weights" * 1000)
    quantizations = "[q4f16_1, q4f32_1]"
    workspace.write(
        "recipes/matrix/tiny.yaml", f"matrix: {{model: [tiny], quantization: {quantizations}, target: [cpu]}}\n"
    )
    return workspace


def living(mark: str) -> list[int]:
    """Processes whose command line contains `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if mark in command and state != "Z":
                found.append(int(entry.name))
    return found
