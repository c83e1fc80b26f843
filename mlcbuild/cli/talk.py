"""The commands that run a package: `chat`, `serve` and `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlcbuild.cli.options import JSON, SAMPLING, arg, command, given


def _chat(options: argparse.Namespace) -> int:
    from mlcbuild.talk.console import chat

    chat(**given(options))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from mlcbuild.serve.commands import serve

    serve(**given(options))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from mlcbuild.evaluation.commands import evaluate

    evaluate(**given(options))
    return 0


_RUNNING = (
    arg("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)"),
    arg("--device", choices=("cpu", "cuda"), help="where to run (default: what the library was built for)"),
)
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
        *_RUNNING,
    ),
    command(
        "serve",
        _serve,
        "serve packages by OpenAI's HTTP interface, with a page to talk to them",
        arg("folders", nargs="+", type=Path, metavar="PACKAGE", help="packages (dist/NAME); each is served as NAME"),
        arg("--host", metavar="ADDRESS", help="where to listen (default 127.0.0.1: this machine alone)"),
        arg("--port", type=int, metavar="N", help="the port (default 8000; 0: any that is free)"),
        arg("--sequences", type=int, metavar="N", help="texts that are written at once (default 8)"),
        arg("--window", type=int, metavar="N", help="most tokens of a text with its prompt (default 8192)"),
        arg("--queue", type=int, metavar="N", help="requests that may wait; more are refused (default 64)"),
        *_RUNNING,
    ),
    command(
        "evaluate",
        _evaluate,
        "score a package on tasks, and on texts of your own",
        arg("folder", type=Path, help="a package (dist/NAME), or a folder of weights with --library"),
        arg(
            "--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, with commas (default: small ones of ours)"
        ),
        arg("--text", type=Path, action="append", metavar="FILE", help="tell a text's perplexity; may be repeated"),
        arg("--include", type=Path, metavar="DIR", help="a folder with tasks of your own, as YAML files"),
        arg("--few-shot", type=int, metavar="N", help="examples before each question (default: what the task says)"),
        arg("--apply-chat-template", action="store_true", help="ask in conversations, by the package's template"),
        arg("--limit", type=int, metavar="N", help="ask N questions of each task at most"),
        JSON,
        arg("--library", type=Path, help="the compiled library, where it is not in the folder"),
        *_RUNNING,
    ),
)
