"""The part of a hub's interface that uploads: repositories made, blobs by LFS or Xet, one commit for many files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.checkpoints.hub_server import Hub
from tests.checkpoints.xet_storage import contents

Answer = tuple[int, dict[str, str], bytes]
_LFS = (".bin", ".so", ".wasm", ".tar", ".safetensors")


@dataclass
class WritableHub(Hub):
    """The repository of the base, and those that were made. Writing needs the token `writer`.

    Names of repositories are those of models; those of data sets begin with `datasets/`.
    """

    writer: str = "hf_planted0123456789abcdef"
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)  # by sha256: uploaded, in a commit or not yet
    commits: dict[str, list[str]] = field(default_factory=dict)  # messages, by repository
    uploaded: list[str] = field(default_factory=list)  # digests, as they came
    xet: Path | None = None  # the folder of its Xet storage, where it has that
    regular: int = 10_000_000  # bytes: what is larger goes to large file storage, whatever its name

    def head(self, repo: str) -> str:
        files = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in self.repos[repo].items())
        return hashlib.sha1(json.dumps([repo, len(self.commits[repo]), files]).encode()).hexdigest()

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        for repo, files in self.repos.items():
            api = _api(repo)
            if path in (api, f"{api}/revision/main"):
                return self._json({"id": repo, "sha": self.head(repo), "siblings": [*map(_sibling, files.items())]})
            if path.startswith(f"{api}/tree/main"):
                return self._tree(files, path.removeprefix(f"{api}/tree/main").strip("/"))
            if path == f"{api}/xet-write-token/main" and self.xet is not None:
                if headers.get("authorization") != f"Bearer {self.writer}":
                    return 401, {}, b""
                return self._json({"accessToken": "xet", "exp": 1 << 40, "casUrl": f"local://{self.xet}"})
            if path.startswith(f"/{repo}/resolve/main/"):
                content = files.get(path.removeprefix(f"/{repo}/resolve/main/"))
                return (404, {"X-Error-Code": "EntryNotFound"}, b"") if content is None else (200, {}, content)
        return super().answer(path, headers)

    def take(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        if path.startswith("/lfs/"):  # signed addresses: no token
            digest = hashlib.sha256(body).hexdigest()
            if digest != path.removeprefix("/lfs/"):
                return 400, {}, b"not what it is called"
            self.blobs[digest] = body
            self.uploaded.append(digest)
            return 200, {}, b""
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if headers.get("authorization") != f"Bearer {self.writer}":
            return 401, {}, b'{"error": "Invalid credentials"}'
        if path.endswith("/paths-info/main"):
            return self._paths_info(path.removesuffix("/paths-info/main"), parse_qs(body.decode())["paths"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for repo in self.repos:
            if path == f"/{repo}.git/info/lfs/objects/batch":
                return self._json({"transfer": "basic", "objects": [*map(self._object, json.loads(body)["objects"])]})
            if path == f"{_api(repo)}/preupload/main":
                return self._json({"files": [*map(self._mode, json.loads(body)["files"])]})
            if path == f"{_api(repo)}/commit/main":
                return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _create(self, asked: Mapping[str, Any]) -> Answer:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.repos:
            return 409, {}, b'{"error": "You already created this model repo"}'
        self.repos[repo], self.commits[repo] = {".gitattributes": b"*.bin filter=lfs\n"}, []
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        return self._json({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def _tree(self, files: Mapping[str, bytes], folder: str) -> Answer:
        """What is in a folder, not in those below it."""
        prefix = f"{folder}/" if folder else ""
        inside = {name.removeprefix(prefix): name for name in files if name.startswith(prefix)}
        if not inside:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        folders = {name.partition("/")[0] for name in inside if "/" in name}
        listed: list[Any] = [{"type": "directory", "path": prefix + name, "oid": "0", "size": 0} for name in folders]
        listed += [_file(name, files[name]) for short, name in inside.items() if "/" not in short]
        return self._json(listed)

    def _paths_info(self, api: str, names: Sequence[str]) -> Answer:
        (files,) = [files for repo, files in self.repos.items() if _api(repo) == api]
        return self._json([_file(name, files[name]) for name in names if name in files])

    def _mode(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        mode = "lfs" if asked["path"].endswith(_LFS) or asked["size"] > self.regular else "regular"
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _object(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        found = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.blobs:
            return found
        return {**found, "actions": {"upload": {"href": f"{self.url}/lfs/{asked['oid']}", "header": {}}}}

    def _commit(self, repo: str, lines: list[Any]) -> Answer:
        files = dict(self.repos[repo])
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, self.head(repo)):
            return 412, {}, b'{"error": "The commit that this is based on is no longer the newest"}'
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if self.xet is not None:
                    self.blobs |= contents(self.xet)
                if value["oid"] not in self.blobs:
                    return 400, {}, b'{"error": "no such blob"}'
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[repo] = files
        self.commits[repo].append(header["summary"])
        head = self.head(repo)
        return self._json({"commitUrl": f"{self.url}/{repo}/commit/{head}", "commitOid": head, "success": True})

    def _json(self, content: Any) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _api(repo: str) -> str:
    return f"/api/{repo}" if repo.startswith("datasets/") else f"/api/models/{repo}"


def _file(name: str, content: bytes) -> dict[str, Any]:
    sibling = _sibling((name, content))
    lfs = {"oid": sibling["lfs"]["sha256"], "size": len(content), "pointerSize": 134} if "lfs" in sibling else None
    entry = {"type": "file", "path": name, "size": len(content), "oid": sibling["blobId"]}
    return entry | ({"lfs": lfs} if lfs else {})


def _sibling(file: tuple[str, bytes]) -> dict[str, Any]:
    name, content = file
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
    if name.endswith(_LFS):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
