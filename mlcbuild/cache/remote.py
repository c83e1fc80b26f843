"""A store somewhere else, through fsspec: a shared folder, S3, Google Cloud Storage, a hub ...

It has the entries and blobs of a store under the same names. Nothing here waits for ever: what a call has not done in
its time is given up (`TooSlow`), and its thread, which nobody can stop, ends with the process. fsspec is imported by
the first call.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlcbuild.cache.action import MOST_BYTES, Damaged
from mlcbuild.cache.layout import action_name, blob_name
from mlcbuild.redact import redact

_T = TypeVar("_T")

_SLOWEST = 500_000  # bytes a second, on average: what is slower than that is not worth waiting for
_WINDOW = 100_000_000  # bytes: an upload of up to this much may come without a sign of life in between
_TICK = 0.05  # seconds
_CHUNK = 1 << 20  # bytes
# Here an object appears whole or not at all. Elsewhere it is written under another name and renamed.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf", "memory"}


class TooSlow(Exception):
    """No answer in time, or bytes that come too slowly."""


class Meter:
    """Bytes that came or went since it was made. One may be shared by several transfers."""

    def __init__(self, patience: float) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.patience = patience
        self._done = 0

    def count(self, number: int) -> None:
        with self._lock:
            self._done += number

    def too_slow(self, window: int = 0) -> bool:
        return time.monotonic() - self._started > self.patience + (self._done + window) / _SLOWEST


class Remote:
    """One place. Safe to use from several threads and after a fork."""

    def __init__(self, url: str, patience: float) -> None:
        self.shown = shown(url)
        self.url = url
        self.patience = patience
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        self._opened: tuple[int, Any, str] | None = None  # process, file system, the URL's path in it

    def entry(self, key: str) -> bytes | None:
        """The entry's text; None when there is none.

        Raises what the file system raises, TooSlow, or Damaged for more text than an entry can have.
        """
        meter = self.meter()

        def read(fs: Any, root: str) -> bytes | None:
            name = f"{root}/{action_name(key)}"
            fs.invalidate_cache(name)  # another builder may have put it there since a listing was kept
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FileNotFoundError):
                _get(fs, name, Path(folder, "entry"), _Count(meter, MOST_BYTES))
                return Path(folder, "entry").read_bytes()
            return None

        return self._within(read, meter)

    def is_there(self) -> bool:
        """Whether there is anything at this place. Raises what the file system raises, or TooSlow."""
        return self._within(lambda fs, root: bool(fs.exists(root)))

    def download(self, digest: str, size: int, destination: Path, meter: Meter) -> None:
        """Fetch a blob. What comes is not looked at, but that there are `size` bytes of it.

        Raises what the file system raises, TooSlow, or Damaged when there are more or fewer; no more are read.
        """

        def get(fs: Any, root: str) -> None:
            _get(fs, f"{root}/{blob_name(digest)}", destination, _Count(meter, size))

        self._within(get, meter)
        if destination.stat().st_size != size:
            raise Damaged(f"it has {destination.stat().st_size:,} bytes, not {size:,}")

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob of this size is there. Raises what the file system raises, or TooSlow."""

        def look(fs: Any, root: str) -> bool:
            name = f"{root}/{blob_name(digest)}"
            fs.invalidate_cache(name)
            try:
                return bool(fs.info(name)["size"] == size)
            except FileNotFoundError:
                return False

        return self._within(look)

    def upload(self, digest: str, source: Path, meter: Meter) -> None:
        """Put a blob there, whole or not at all. Raises what the file system raises, or TooSlow."""
        size = source.stat().st_size

        def put(fs: Any, root: str) -> None:
            with self._name(fs, f"{root}/{blob_name(digest)}") as name:
                fs.put_file(str(source), name, callback=_callback(_Count(meter)))

        self._within(put, meter, min(size, _WINDOW))

    def put_entry(self, key: str, content: bytes) -> None:
        """Put an entry there. Raises what the file system raises, or TooSlow."""

        def put(fs: Any, root: str) -> None:
            with self._name(fs, f"{root}/{action_name(key)}") as name:
                fs.pipe_file(name, content)

        self._within(put)

    @property
    def commits(self) -> bool:
        """Whether files go there by `commit`, many at once: a hub would make a commit of each otherwise."""
        return self.url.startswith("hf://") and not self.url.startswith("hf://buckets/")

    def commit(self, blobs: Mapping[str, Path], entries: Mapping[str, bytes]) -> None:
        """Put blobs and entries into the repository, all at once. Raises what huggingface_hub raises, or TooSlow."""
        files: dict[str, Any] = {blob_name(digest): str(path) for digest, path in blobs.items()}
        files |= {action_name(key): content for key, content in entries.items()}

        def put(fs: Any, root: str) -> None:
            from huggingface_hub import CommitOperationAdd

            from mlcbuild.cache.hub_commit import commit_on_top

            place = fs.resolve_path(root)
            names = {name: f"{place.path_in_repo}/{name}".lstrip("/") for name in files}
            operations = [CommitOperationAdd(names[name], content) for name, content in files.items()]
            commit_on_top(place.repo_id, place.repo_type, operations, "Built by mlcbuild", revision=place.revision)

        # How much has gone is not told, so the time for all of it is allowed from the start; and the hub answers three
        # times: which way files go, where to, and after the commit.
        allowed = sum(path.stat().st_size for path in blobs.values())
        if files:
            with self._committing:  # one at a time: the hub refuses the second of two
                self._within(put, Meter(3 * self.patience), allowed)

    def meter(self) -> Meter:
        """For one transfer, or for several at once."""
        return Meter(self.patience)

    def words(self, error: BaseException) -> str:
        """The error in one line, for the user, without anything secret."""
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        userinfo = urlsplit(self.url).netloc.rpartition("@")[0]
        return redact(text.replace(self.url, self.shown), userinfo, *userinfo.split(":"))[:300]

    def _open(self) -> tuple[Any, str]:
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                import logging

                import fsspec

                # It says before each call that it does not know the bucket's kind, where it may not ask for that.
                logging.getLogger("gcsfs").setLevel(logging.ERROR)
                fs, path = fsspec.core.url_to_fs(self.url)
                self._opened = (os.getpid(), fs, path.rstrip("/"))
            return self._opened[1], self._opened[2]

    @contextlib.contextmanager
    def _name(self, fs: Any, name: str) -> Any:
        """What to write to so that `name` is never there by half."""
        if _protocols(fs) & _OBJECT_STORES:
            yield name
            return
        part = f"{name}.{secrets.token_hex(4)}.part"
        fs.makedirs(name.rpartition("/")[0], exist_ok=True)
        try:
            yield part
            fs.mv(part, name)
        except BaseException:
            with contextlib.suppress(Exception):
                fs.rm_file(part)
            raise

    def _within(self, work: Callable[[Any, str], _T], meter: Meter | None = None, window: int = 0) -> _T:
        """What `work` returns or raises, given the file system and the path in it, unless that takes too long."""
        meter = meter or self.meter()
        result: list[_T] = []
        errors: list[BaseException] = []
        ended = threading.Event()

        def run() -> None:
            try:
                result.append(work(*self._open()))
            except BaseException as error:
                errors.append(error)
            ended.set()

        threading.Thread(target=run, daemon=True, name="shared-cache").start()
        while not ended.wait(_TICK):
            if meter.too_slow(window):
                raise TooSlow(f"no answer within {self.patience:g} s, or less than {_SLOWEST // 1000} kB a second")
        if errors:
            raise errors[0]
        return result[0]


def shown(url: str) -> str:
    """The URL without what could be secret: user, password, query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.scheme else url


@dataclass
class _Count:
    """Bytes of one file as they come or go, told to a meter that several may share."""

    meter: Meter
    most: int | None = None
    seen: int = 0

    def add(self, number: int) -> None:
        """Raises Damaged when there are more than there may be: an answer need not end."""
        self.seen += number
        self.meter.count(number)
        self.check(self.seen)

    def check(self, size: int | None) -> None:
        if self.most is not None and size is not None and size > self.most:
            raise Damaged(f"it has more than {self.most:,} bytes")


def _get(fs: Any, name: str, destination: Path, count: _Count) -> None:
    """Fetch one file. Raises Damaged when there are too many bytes, and reads no further."""
    if not _protocols(fs) & {"file", "local"}:
        fs.get_file(name, str(destination), callback=_callback(count))
        return
    with fs.open(name, "rb") as source, destination.open("wb") as target:  # which fsspec would copy without counting
        while chunk := source.read(_CHUNK):
            count.add(len(chunk))
            target.write(chunk)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _callback(count: _Count) -> Any:
    from fsspec.callbacks import Callback

    class Told(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            count.check(size)

        def relative_update(self, inc: int = 1) -> None:
            count.add(inc)

        def absolute_update(self, value: int) -> None:
            count.add(max(0, value - count.seen))

    return Told()
