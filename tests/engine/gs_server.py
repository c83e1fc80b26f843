"""A server of Google Cloud Storage's interface on loopback (PyPI: gcp-storage-emulator); objects are kept in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

BUCKET = "a-bucket"


@dataclass
class Server:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, Any]:
        """What a user of this server sets; NO_GCE_CHECK: this machine is none of Google's, which need not be asked."""
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}", "NO_GCE_CHECK": "true"}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def start() -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET]
    process = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", "start", *options],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return Server(port, process)
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, "the server did not start"
            time.sleep(0.05)
