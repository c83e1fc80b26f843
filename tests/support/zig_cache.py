"""zig's cache, one for all libraries that a run of the tests compiles: half of each is the same few C kernels.

zig finds an object in it by the content of sources, headers and flags, and locks what it writes.
"""

from __future__ import annotations

import os
from pathlib import Path

PLACE = "MLCBUILD_TEST_ZIG_CACHE"  # set by tests/conftest.py, and seen by the processes that tests start


def share(scratch: Path) -> Path:
    """The folder in which a build in `scratch` has zig keep its cache: that of the run, unless it is there already."""
    folder = scratch / "zig"
    if place := os.environ.get(PLACE):
        scratch.mkdir(parents=True, exist_ok=True)
        Path(place).mkdir(exist_ok=True)
        if not folder.exists():
            folder.symlink_to(place)
    return folder
