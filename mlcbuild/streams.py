"""The standard streams as a program needs them, whatever it was started with."""

from __future__ import annotations

import io
import os
import sys

from mlcbuild.errors import FULL


def open_streams() -> None:
    """A closed stream leads nowhere from now on, and a character that a stream's encoding lacks is written as `\\xe9`.

    A closed 0, 1 or 2 would be the number of the next file that is opened, the cache's index for one.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing < number:  # another that was closed has taken what is free
                nothing = os.dup2(nothing, number)
            setattr(sys, name, open(nothing, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper) and (stream.encoding, stream.errors) != _EXACT:
            stream.reconfigure(errors="backslashreplace")


_EXACT = ("utf-8", "surrogateescape")  # names of files that are not UTF-8 come out as they are


def refused(error: Exception) -> str | None:
    """The sentence for an error that is of standard output itself, whose disk may be full; None for any other."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in FULL:
        return None
    try:
        os.write(1, b"\n")
    except OSError as again:
        return f"the output cannot be written: {again.strerror}"
    return None
