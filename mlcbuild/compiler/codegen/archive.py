"""A static library for an app: a tar of object files, the same bytes for the same objects."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path


def write_tar(objects: Sequence[Path], output: Path) -> None:
    """Members in order of their names, without owner or time."""
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(objects, key=lambda each: each.name):
            content = path.read_bytes()
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
