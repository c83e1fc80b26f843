"""`mlcbuild serve`: packages loaded, each with its engine, behind one HTTP server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.runtime.model import Model, load

KEY = "MLCBUILD_API_KEY"
_LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1"]
_SECONDS = 1  # that answers which are being written have when the server ends


def serve(
    folders: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    sequences: int = 8,
    window: int = 8192,
    queue: int = 64,
    threads: int | None = None,
    device: str | None = None,
) -> None:
    """Serve packages under the names of their folders until Ctrl-C.

    Raises MlcBuildError as `load` does, for two packages of one name, and for a number out of range; Unavailable where
    the libraries of the extra `serve` are not installed.
    """
    try:
        import uvicorn

        from mlcbuild.serve.app import Server
    except ImportError as error:
        raise Unavailable(f"it needs more libraries ({error.name} is missing): pip install 'mlcbuild[serve]'") from None
    from mlcbuild.serve.engine import Engine, Limits

    for name, value, least in (
        ("sequences", sequences, 1),
        ("window", window, 2),
        ("queue", queue, 0),
        ("port", port, 0),
    ):
        if value < least:
            raise MlcBuildError(f"--{name} is {value}: expected {least} or more")
    models: dict[str, Model] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in models:
            raise MlcBuildError(f"two packages are called {name}; rename one of the folders")
        models[name] = load(folder, None, threads, device)
        models[name].tokenizer  # noqa: B018  read now, not at the first request
    key = os.environ.get(KEY) or None
    local = host in ("127.0.0.1", "localhost", "::1")
    if not local and key is None:
        print(f"mlcbuild serve: anybody who reaches {host} can use it; {KEY} sets a key", file=sys.stderr)
    engines = {name: Engine(model, Limits(sequences, window, queue)) for name, model in models.items()}
    try:
        application = Server(engines, key).app(_LOOPBACK if local else ["*"])
        config = uvicorn.Config(
            application, host, port, log_level="info", access_log=False, timeout_graceful_shutdown=_SECONDS
        )
        uvicorn.Server(config).run()
    finally:
        for engine in engines.values():
            engine.close()
