"""The commands that talk: `chat`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlcbuild.cli.options import SAMPLING, arg, command, given


def _chat(options: argparse.Namespace) -> int:
    from mlcbuild.talk.console import chat

    chat(**given(options))
    return 0


COMMANDS = (
    command(
        "chat",
        _chat,
        "talk to a package, in turns; /help there lists what else it takes",
        arg("folder", type=Path, help="a package (dist/NAME), or a folder of weights with --library"),
        arg("--system", metavar="TEXT", help="the system message (default: the template's)"),
        arg("--library", type=Path, help="the compiled library, where it is not in the folder"),
        arg("--max-tokens", type=int, metavar="N", help="end an answer after N tokens (default 1024)"),
        arg("--window", type=int, metavar="N", help="tokens that it remembers (default: its context, at most 16384)"),
        *SAMPLING,
        arg("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)"),
        arg("--device", choices=("cpu", "cuda"), help="where to run (default: what the library was built for)"),
    ),
)
