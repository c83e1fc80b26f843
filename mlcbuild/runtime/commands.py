"""`mlcbuild generate`: a package's text, on standard output as it is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from json import dumps
from pathlib import Path
from typing import Any, TextIO

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.model import load
from mlcbuild.runtime.sampling import Sampling


def generate(
    folder: Path,
    prompt: str,
    *,
    chat: bool = False,
    library: Path | None = None,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
    json: bool = False,
    threads: int | None = None,
    device: str | None = None,
    **sampling: Any,
) -> None:
    """Load a package and print what it writes after `prompt`; with `chat`, its reply to `prompt` as a user's message.

    With `json`, print one object when the text is complete. How fast it was is said on standard error. Raises
    MlcBuildError as `load` and `Model.stream` do.
    """
    if max_tokens < 0:
        raise MlcBuildError(f"--max-tokens is {max_tokens}: expected 0 or more")
    settings = Sampling(**sampling)
    model = load(folder, library, threads, device)
    writer = model.writer(model.chat_prompt(prompt) if chat else prompt, max_tokens, stop, settings)
    pieces = model.pieces(writer)
    shown = map(dumps, [writer.report("".join(pieces))]) if json else pieces
    if write(shown, sys.stdout):
        print(writer.speed, file=sys.stderr)


def write(pieces: Iterable[str], out: TextIO) -> bool:
    """Print pieces as they come, and a line end; stop quietly, and give False, when nobody reads any more."""
    try:
        for piece in pieces:
            out.write(piece)
            out.flush()
        out.write("\n")
        out.flush()
        return True
    except BrokenPipeError:
        # Python would report it once more while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return False
