"""One file from a hub: gone on with where it stopped, and believed only with the right size and sha256."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.hub_http import Later, Request, get
from mlcbuild.errors import CheckpointError
from mlcbuild.recipes.types import LockedFile

_CHUNK = 1 << 20  # bytes
_RANGE = re.compile(r"bytes (\d+)-")
_ADVICE = "build again, and if it stays so, `mlcbuild lock --update` shows what moved"


def download(
    request: Request,
    url: str,
    info: LockedFile,
    place: Path,
    progress: Callable[[int], None] = lambda arrived: None,
) -> None:
    """Bring the file to `place`; what is there already is its beginning. `progress` is told the bytes that are there.

    Raises CheckpointError as `get` does, with what has arrived left in place, and for content of another size or
    sha256 than `info` says, which is removed. Content that was begun earlier gets a second chance from the start.
    """
    resumed = place.exists() and place.stat().st_size > 0
    problem = _attempt(request, url, info, place, progress)
    if problem and resumed:
        problem = _attempt(request, url, info, place, progress)
    if problem:
        raise CheckpointError(f"{request}: {problem}; {_ADVICE}")


def _attempt(request: Request, url: str, info: LockedFile, place: Path, progress: Callable[[int], None]) -> str | None:
    """None when the file is right; else what is wrong with it, and it is gone."""
    digest, size = hashlib.sha256(), 0
    with place.open("ab+") as file:
        file.seek(0)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)

        def receive(response: Any) -> None:
            nonlocal digest, size
            found = _RANGE.match(response.headers.get("content-range", "")) if response.status_code == 206 else None
            if size and (found is None or int(found[1]) != size):  # the hub sends all of it
                file.truncate(0)
                digest, size = hashlib.sha256(), 0
            for chunk in response.iter_bytes():  # as it arrives: a buffer would be lost with the connection
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress(min(size, info.size))
                if size > info.size:
                    return
            if size < info.size and response.headers.get("content-length") is None:
                raise Later(f"the connection ended after {size:,} of {info.size:,} bytes")

        if size < info.size or not info.size:
            headers = lambda: {"range": f"bytes={size}-"} if size else {}  # noqa: E731
            get(request, url, receive, headers, lambda: size)
    if size == info.size and digest.hexdigest() == info.sha256:
        return None
    place.unlink()
    if size != info.size:
        more = "or more" if size > info.size else ""
        return f"{size} bytes{' ' if more else ''}{more}, recipes.lock says {info.size}"
    return f"its sha256 is {digest.hexdigest()}, recipes.lock says {info.sha256}"
