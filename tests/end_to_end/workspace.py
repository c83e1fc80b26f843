"""A workspace in a temporary folder, driven the way a user does: through `doit` and `mlcbuild` as processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild import zig
from tests.runtime.conftest import byte_level_tokenizer
from tests.support import llama

BIN = Path(sys.executable).parent
DODO = '"""The tasks of this workspace."""\n\nfrom mlcbuild.tasks import *  # noqa: F403\n'


@dataclass(frozen=True)
class Workspace:
    root: Path
    cache: Path

    def run(
        self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the workspace; with `check`, a failure shows everything that it printed."""
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.root,
            env=self.environment(environment or {}),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        own = {name for name in os.environ if name.startswith("MLCBUILD_")} - {zig.SHARED}
        kept = {name: value for name, value in os.environ.items() if name not in own}
        return {**kept, "MLCBUILD_CACHE": str(self.cache), **more}

    def doit(
        self, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run("doit", *arguments, check=check, environment=environment)

    def built(self, *arguments: str) -> list[str]:
        """The steps that `doit ARGUMENTS` really ran, as its log for machines tells."""
        log = self.root / "events.jsonl"
        log.unlink(missing_ok=True)
        self.doit(*arguments, environment={"MLCBUILD_LOG_JSON": str(log)})
        events = [json.loads(line) for line in log.read_text().splitlines()]
        return [e["step"] for e in events if e["event"] == "step_finished" and e["outcome"] == "built"]

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def recipe(self, name: str, quantization: str = "q4f16_1", model: str = "tiny", target: str = "cpu") -> None:
        self.write(f"recipes/{name}.yaml", f"model: {model}\nquantization: {quantization}\ntarget: {target}\n")

    def model(self, name: str, checkpoint: Path, more: str = "verify: {gate: report}\n") -> None:
        relative = os.path.relpath(checkpoint, self.root / "recipes" / "models")
        self.write(f"recipes/models/{name}.yaml", f"source: {{path: {relative}}}\ntemplate: chatml\n{more}")

    def digests(self, recipe: str) -> dict[str, str]:
        """Everything in dist/<recipe>, by content."""
        return digests(self.root / "dist" / recipe)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_workspace(root: Path, cache: Path, checkpoint: Path) -> Workspace:
    """A workspace with the model `tiny` and one recipe of it, `tiny-cpu`."""
    workspace = Workspace(root, cache)
    workspace.write("dodo.py", DODO)
    workspace.model("tiny", checkpoint)
    workspace.recipe("tiny-cpu")
    return workspace


def write_checkpoint(folder: Path, dtype: str = "bfloat16", **changes: Any) -> Any:
    """A tiny random llama with a tokenizer, as transformers saves it; the model itself, rounded to `dtype`."""
    import torch

    model = llama.transformers_llama(**{"vocab_size": 300, **changes}).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return model.float()


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
