"""`mlcbuild serve`: packages loaded, each with its engine, behind one HTTP server."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.runtime.model import Model, load

KEY = "MLCBUILD_API_KEY"
_PORTS = 65535
_LOOPBACK = ["127.0.0.1", "localhost", "[::1]", "::1"]
_SECONDS = 1  # that answers which are being written have when the server ends
_REST = 0.5  # seconds for their last words; who has not read them by then does not read
_STEP = 0.2  # seconds that an engine has for its last step
_IDLE = 60  # seconds that a connection stays open unused: more than clients keep one, or both could act at once


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
    if port > _PORTS:
        raise MlcBuildError(f"--port is {port}: expected {_PORTS} or less")
    key = os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise MlcBuildError(f"{KEY} has characters that no header can carry: expected ASCII, without blanks around it")
    models: dict[str, Model] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in models:
            raise MlcBuildError(f"two packages are called {name}; rename one of the folders")
        models[name] = load(folder, None, threads, device)
        models[name].tokenizer  # noqa: B018  read now, not at the first request
    local = host in ("127.0.0.1", "localhost", "::1")
    if not local and key is None:
        print(f"mlcbuild serve: anybody who reaches {host} can use it; {KEY} sets a key", file=sys.stderr)
    engines = {name: Engine(model, Limits(sequences, window, queue)) for name, model in models.items()}
    server = Server(engines, key)

    class Ending(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            loop.call_later(_SECONDS, server.end)
            loop.call_later(_SECONDS + _REST, setattr, self, "force_exit", True)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        server.app(_LOOPBACK if local else ["*"]),
        host,
        port,
        http="h11",  # whose headers have a bound
        ws="none",
        log_level="info",
        access_log=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_SECONDS + 1,
    )
    try:
        Ending(config).run()
    except KeyboardInterrupt:
        # Nothing is left to be done. To take the interpreter and the libraries down is a second, under load several,
        # and it must not happen under a thread that is still in a step, which cannot be interrupted.
        for engine in engines.values():
            engine.close(_STEP)
        print(file=sys.stderr, flush=True)
        os._exit(130)
    finally:
        for engine in engines.values():
            engine.close()
