"""A static library for an app: a tar of object files, the same bytes for the same objects."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path


def write_tar(objects: Sequence[Path], output: Path, prefix: str) -> None:
    """Members in order of their names, without owner or time.

    All names begin with `prefix`, so that the files of several libraries can lie in one folder.
    """
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(objects, key=lambda each: each.name):
            content = path.read_bytes()
            member = tarfile.TarInfo(prefix + path.name.removeprefix(prefix))
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
