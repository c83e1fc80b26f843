"""A Hugging Face hub on loopback: the few endpoints that resolve and download a repository, and a bad day of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What happens to the next `times` requests whose path ends with `path`, in place of the right answer."""

    path: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1
    cut: int | None = None  # end the connection after so many bytes of the body
    pause: float = 0.0  # seconds, in the middle of the body
    pieces: Callable[[], Iterable[bytes]] | None = None  # what is sent as the body, however long that takes


@dataclass
class Hub:
    """One repository, `owner/name`, with one commit on `main`. Files of weights are stored as LFS."""

    files: dict[str, bytes]
    repo: str = "owner/name"
    token: str | None = None  # needed to read it, when given
    gated: bool = False
    served: dict[str, bytes] = field(default_factory=dict)  # content to send in place of the right one
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)  # the Authorization header of each request
    commit: str = COMMIT
    past: dict[str, dict[str, bytes]] = field(default_factory=dict)  # earlier commits
    url: str = ""

    def move(self, commit: str, files: dict[str, bytes]) -> None:
        """A new commit on `main`."""
        self.past[self.commit] = self.files
        self.commit, self.files = commit, files

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and path.endswith(fault.path):
                fault.times -= 1
                return fault
        return None

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
            }
            if name.endswith((".safetensors", ".bin", ".gguf")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repo, "modelId": self.repo, "sha": self.commit, "siblings": siblings}

    def take(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for what changes something: this hub is only read."""
        return 405, {}, b""

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a GET of `path`."""
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            if self.gated:
                return 403 if "authorization" in headers else 401, {"X-Error-Code": "GatedRepo"}, b""
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        api, resolve = f"/api/models/{self.repo}", f"/{self.repo}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(f"{api}/revision/") if path != api else "main"
            if revision not in ("main", self.commit):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            return 200, {"Content-Type": "application/json"}, json.dumps(self.listing()).encode()
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            files = {**self.past, "main": self.files, self.commit: self.files}.get(revision)
            if files is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if name not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b""
            content = self.served.get(name, files[name])
            etag = hashlib.sha256(files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.tokens.append(headers.get("authorization"))
            fault = hub.fault(path)
            if self.command in ("GET", "HEAD"):
                status, answer, body = hub.answer(path, headers)
            else:
                sent = self.rfile.read(int(headers.get("content-length", 0)))
                status, answer, body = hub.take(self.command, path, headers, sent) if not fault else (200, {}, b"")
            if fault and (fault.status != 200 or fault.pieces):
                status, answer, body = fault.status, dict(fault.headers), b""
            begin = headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
            if status == 200 and int(begin or 0):
                hub.requests[-1] += f" from {begin}"
                status, answer["Content-Range"] = 206, f"bytes {begin}-{len(body) - 1}/{len(body)}"
                body = body[int(begin) :]
            self.send_response(status)
            for name, value in answer.items():
                self.send_header(name, value)
            if fault and fault.pieces is not None:
                self.close_connection = True
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for piece in fault.pieces():
                        self.wfile.write(piece)
                return
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault and fault.pause:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                time.sleep(fault.pause)
                body = body[len(body) // 2 :]
            if fault and fault.cut is not None:
                self.wfile.write(body[: fault.cut])
                self.close_connection = True
                return
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
