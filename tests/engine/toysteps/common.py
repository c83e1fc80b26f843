"""What all toy steps do: note that they ran, perhaps dawdle or fail, and write what they were given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mlcbuild.engine.job import Job
from mlcbuild.errors import MlcBuildError


def run(job: Job, kind: str) -> None:
    """Files in the folder TOY_TRICKS change what happens: see the names below."""
    tricks = Path(os.environ.get("TOY_TRICKS", "/nonexistent"))
    if tricks.is_dir():
        with (tricks / "ran.txt").open("a", encoding="utf-8") as log:
            log.write(f"{kind}\n")
    _play(tricks, kind, job)
    if (tricks / f"{kind}.nothing").exists():
        return
    text = json.dumps(
        {
            "fields": job.fields,
            "random": os.urandom(8).hex() if (tricks / "all.random").exists() else "",
            "inputs": {
                name: sorted(entry.digest for entry in tree.files.values()) for name, tree in job.inputs.items()
            },
        },
        indent=1,
        sort_keys=True,
    )
    for position in range(4):
        job.progress(position, 4, "files")
        (job.output / f"{kind}-{position}.txt").write_text(text, encoding="utf-8")
        _dawdle(tricks, kind)
    if (tricks / f"{kind}.link").exists():
        (job.output / "link").symlink_to("/etc/passwd")
    if kind == "verify":
        (job.output / "quality.json").write_text('{"kl": 0.0}\n', encoding="utf-8")
    if kind == "package":
        job.reuse(next(iter(job.inputs["quantize"].files.values())), "weights/params.bin")


def _play(tricks: Path, kind: str, job: Job) -> None:
    if (tricks / f"{kind}.touch").exists():
        Path((tricks / f"{kind}.touch").read_text()).write_text("changed")
    if (tricks / f"{kind}.remove").exists():
        Path((tricks / f"{kind}.remove").read_text()).unlink()
    if (tricks / f"{kind}.fail").exists():
        raise MlcBuildError(f"{kind} cannot: the toy was told to fail; take {kind}.fail away")
    needle = tricks / f"{kind}.fail-with"
    given = [entry.path for tree in job.inputs.values() for entry in tree.files.values()]
    if needle.exists() and any(needle.read_text() in path.read_text() for path in given):
        raise MlcBuildError(f"{kind} cannot: the toy was told to fail with what it was given")
    if (tricks / f"{kind}.crash").exists():
        raise ZeroDivisionError("a bug")
    if (tricks / f"{kind}.greedy").exists():
        held = [bytearray(b"x") * 1_000_000 for _ in range(int((tricks / f"{kind}.greedy").read_text()))]
        time.sleep(600)
        assert held
    if (tricks / f"{kind}.kill").exists():
        os.abort()
    if (tricks / f"{kind}.child").exists():
        script = "import time; time.sleep(600)"
        mark = (tricks / f"{kind}.child").read_text()
        subprocess.run([sys.executable, "-c", script, mark], check=True)


def _dawdle(tricks: Path, kind: str) -> None:
    for name in (f"{kind}.sleep", "all.sleep"):
        if (tricks / name).exists():
            time.sleep(float((tricks / name).read_text()))
