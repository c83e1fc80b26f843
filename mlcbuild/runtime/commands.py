"""`mlcbuild generate`: a package's text, on standard output as it is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.model import load


def generate(
    folder: Path,
    prompt: str,
    *,
    chat: bool = False,
    library: Path | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> None:
    """Load a package and print what it writes after `prompt`; with `chat`, its reply to `prompt` as a user's message.

    Raises MlcBuildError as `load` and `Model.stream` do.
    """
    if max_tokens < 0:
        raise MlcBuildError(f"--max-tokens is {max_tokens}: expected 0 or more")
    model = load(folder, library, threads, device)
    start = model.chat_prompt(prompt) if chat else prompt
    write(model.stream(start, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed), sys.stdout)


def write(pieces: Iterable[str], out: TextIO) -> None:
    """Print pieces as they come, and a line end; stop quietly when nobody reads any more."""
    try:
        for piece in pieces:
            out.write(piece)
            out.flush()
        out.write("\n")
        out.flush()
    except BrokenPipeError:
        # Python would report it once more while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
