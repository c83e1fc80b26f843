"""A store somewhere else, through fsspec: a shared folder, S3, Google Cloud Storage, a hub ...

It has the entries and blobs of a store under the same names. Nothing here waits for ever: what a call has not done in
its time is given up (`TooSlow`), and its thread, which nobody can stop, ends with the process. fsspec is imported by
the first call.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlcbuild.cache.layout import action_name, blob_name
from mlcbuild.redact import redact

_T = TypeVar("_T")

_SLOWEST = 500_000  # bytes a second, on average: what is slower than that is not worth waiting for
_WINDOW = 100_000_000  # bytes: an upload of up to this much may come without a sign of life in between
_TICK = 0.05  # seconds
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
        """The entry's text; None when there is none. Raises what the file system raises, or TooSlow."""

        def read(fs: Any, root: str) -> bytes | None:
            name = f"{root}/{action_name(key)}"
            fs.invalidate_cache(name)  # another builder may have put it there since a listing was kept
            try:
                content: bytes = fs.cat_file(name)
            except FileNotFoundError:
                return None
            return content

        return self._within(read)

    def is_there(self) -> bool:
        """Whether there is anything at this place. Raises what the file system raises, or TooSlow."""
        return self._within(lambda fs, root: bool(fs.exists(root)))

    def download(self, digest: str, destination: Path, meter: Meter) -> None:
        """Fetch a blob. What comes is not looked at. Raises what the file system raises, or TooSlow."""

        def get(fs: Any, root: str) -> None:
            fs.get_file(f"{root}/{blob_name(digest)}", str(destination), callback=_callback(meter))

        self._within(get, meter)

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
                fs.put_file(str(source), name, callback=_callback(meter))

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
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        if protocols & _OBJECT_STORES:
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


def _callback(meter: Meter) -> Any:
    from fsspec.callbacks import Callback

    class Count(Callback):  # type: ignore[misc]
        seen = 0

        def relative_update(self, inc: int = 1) -> None:
            meter.count(inc)

        def absolute_update(self, value: int) -> None:
            meter.count(max(0, value - self.seen))
            self.seen = value

    return Count()
