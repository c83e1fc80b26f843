"""Which file contents were already found valid, so that a build that changes nothing neither parses nor validates."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from mlcbuild.recipes.files import write_atomically

_FORMAT = "mlcbuild memo 1"  # raise the number when `syntax` reads the same text differently


class Memo:
    """Content of valid files by the digest of their text; a memo that is missing or damaged is an empty one.

    The file's first line is the digest of the rest, so that a damaged memo is never believed.
    """

    def __init__(self, path: Path | None, schemas: str) -> None:
        """`schemas`: digest of what the contents are valid under."""
        self._path = path
        self._head = f"{_FORMAT} {schemas}"
        self._known = self._read()
        self._used: dict[str, Any] = {}

    def get(self, kind: str, raw: bytes) -> Any:
        """The content of a file of `kind` with these bytes; None if it is not known to be valid."""
        key = _key(kind, raw)
        if key in self._known:
            self._used[key] = self._known[key]
        return self._known.get(key)

    def put(self, kind: str, raw: bytes, data: Any) -> None:
        self._used[_key(kind, raw)] = data

    def save(self) -> None:
        """Writes what was used, if that is not what was read. A memo that cannot be written is let be."""
        if self._path is None or self._used.keys() == self._known.keys():
            return
        body = json.dumps(self._used, separators=(",", ":"))
        with contextlib.suppress(OSError):
            write_atomically(self._path, f"{self._seal(body)}\n{body}")

    def _read(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            seal, _, body = self._path.read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return {}
        if seal != self._seal(body):
            return {}
        known: dict[str, Any] = json.loads(body)
        return known

    def _seal(self, body: str) -> str:
        return hashlib.sha256(f"{self._head}\n{body}".encode()).hexdigest()


def _key(kind: str, raw: bytes) -> str:
    return hashlib.sha256(kind.encode() + b"\0" + raw).hexdigest()
