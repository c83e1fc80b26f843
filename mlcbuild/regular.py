"""Files that somebody else may have put there, opened: a pipe would be waited for, a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular(path: str | Path) -> FileIO:
    """The file, unbuffered, for reading. Raises OSError, also for what is no regular file; waits for nobody."""
    file = FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path) -> bytes:
    """All of the file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.readall()


def nowhere(path: Path) -> str:
    """What is added where a file is not there: that a link to it is. A cache of Hugging Face's loses blobs so."""
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            return f": it is a symbolic link to {path.readlink()}: put that back, or remove the link"
    except OSError:
        pass
    return ""
