"""A server of the tiny model in a thread of the tests, and OpenAI's own client of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn

from mlcbuild.runtime import load
from mlcbuild.serve.app import Server
from mlcbuild.serve.engine import Engine, Limits
from tests.runtime.conftest import reference, tiny, tiny_library, tiny_package, tokenizer

__all__ = ["reference", "tiny", "tiny_library", "tiny_package", "tokenizer"]
KEY = "a key"


@contextmanager
def serving(engine: Engine, name: str, made: Server | None = None) -> Iterator[str]:
    """The address of a server of one package, while it runs."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        made = made or Server({name: engine}, KEY)
        server = uvicorn.Server(uvicorn.Config(made.app(["127.0.0.1"]), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


@pytest.fixture(scope="session")
def engine(tiny_package: Path) -> Engine:
    """Three texts at once, as many as the library takes; chunks of prompts are small."""
    return Engine(load(tiny_package, threads=1), Limits(queue=12, chunk=16))


@pytest.fixture(scope="session")
def server(engine: Engine) -> Server:
    return Server({"tiny-cpu": engine}, KEY)


@pytest.fixture(scope="session")
def address(engine: Engine, server: Server) -> Iterator[str]:
    with serving(engine, "tiny-cpu", server) as url:
        yield url


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Meanwhile the engine does nothing: what is asked for waits."""
    reached, gate = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        gate.wait()

    engine.call(wait)
    reached.wait()
    try:
        yield
    finally:
        gate.set()
