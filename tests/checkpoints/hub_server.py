"""A Hugging Face hub on loopback: the few endpoints that huggingface_hub uses to resolve and download a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, `owner/name`, with one commit on `main`. Files that end in .safetensors are stored as LFS."""

    files: dict[str, bytes]
    repo: str = "owner/name"
    token: str | None = None  # needed to read it, when given
    gated: bool = False
    served: dict[str, bytes] = field(default_factory=dict)  # content to send in place of the right one
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
            }
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT, "siblings": siblings}

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a GET of `path`."""
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            if self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        api, resolve = f"/api/models/{self.repo}", f"/{self.repo}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(f"{api}/revision/") if path != api else "main"
            if revision not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            return 200, {"Content-Type": "application/json"}, json.dumps(self.listing()).encode()
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            if revision not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if name not in self.files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            content = self.served.get(name, self.files[name])
            etag = hashlib.sha256(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer, body = hub.answer(path, headers)
            begin = headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
            if status == 200 and int(begin or 0):
                status, answer["Content-Range"] = 206, f"bytes {begin}-{len(body) - 1}/{len(body)}"
                body = body[int(begin) :]
            self.send_response(status)
            for name, value in answer.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = reply

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
