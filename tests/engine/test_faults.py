"""FAULTS.md C: a build in which one call of the system fails, whichever it is, says so in a sentence and loses nothing.

`faults.c` counts the calls that a build makes below its workspace, in all of its processes, and lets one of them fail.
FAULT_POINTS=n lets n calls of every kind fail, each in a build of its own; without it one of those that matter most.
FAULT_SEED draws others.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mlcbuild.zig import run_zig
from tests.engine.workspace import Workspace

CALLS = ("open", "read", "write", "rename", "mkdir", "link", "unlink", "fsync", "stat", "utime", "chmod")
FEW = ("open", "write", "rename", "stat")
CODES = (errno.EACCES, errno.ENOSPC, errno.EIO, errno.EMFILE)
RECIPE = "recipe=tiny-q4f16_1-cpu"


def build(
    workspace: Workspace, library: Path, code: int, fails: Mapping[str, int]
) -> tuple[int, str, Mapping[str, int]]:
    """A build in which the call of this kind and number fails: its status, its words, and how many calls were made."""
    count = library.with_name("count")
    count.write_bytes(
        struct.pack(f"={2 * len(CALLS)}Q", *(number for call in CALLS for number in (0, fails.get(call, 0))))
    )
    faults = {"FAULT_ERRNO": str(code), "FAULT_COUNT": str(count), "FAULT_UNDER": str(workspace.root)}
    with workspace.start("build", RECIPE, "log_json=log.jsonl", LD_PRELOAD=str(library), **faults) as process:
        output, _ = process.communicate(timeout=120)
    made = struct.unpack(f"={2 * len(CALLS)}Q", count.read_bytes())[::2]
    return process.returncode, output, dict(zip(CALLS, made, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
def test_any_call_may_fail(workspace: Workspace, tmp_path: Path) -> None:
    library, draw = tmp_path / "faults.so", random.Random(os.environ.get("FAULT_SEED", "0"))
    run_zig(["cc", "-shared", "-fPIC", str(Path(__file__).with_name("faults.c")), "-o", str(library)], tmp_path)
    status, output, made = build(workspace, library, 0, {})
    assert status == 0 and all(made[call] for call in FEW), output
    right, points = workspace.digests(), os.environ.get("FAULT_POINTS")
    for call in FEW if points is None else CALLS * int(points):
        for folder in (workspace.cache, workspace.dist):
            shutil.rmtree(folder, ignore_errors=True)
        number, code = draw.randint(1, max(1, made[call])), draw.choice(CODES)
        status, output, _ = build(workspace, library, code, {call: number})
        where = f"{call} {number} of {made[call]} fails with {errno.errorcode[code]}: status {status}\n{output}"
        assert "Traceback" not in output and "bug in the step" not in output, where
        assert status == 0 or ": " in output, where
        # What was left behind is mended by the next build, which needs no help.
        workspace.doit("build", RECIPE)
        assert workspace.digests() == right, where
