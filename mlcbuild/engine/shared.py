"""The shared cache, as a build uses it: asked on a miss, given what was built, and never a reason to fail.

Trouble is said once in a run, and from then on the build goes on without: no reading after a failed read, no writing
after a failed write (or read). A damaged entry or blob is no trouble of that kind: that step is built here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mlcbuild.cache.action import Action, Damaged, Ingredients
from mlcbuild.cache.locks import workplace
from mlcbuild.cache.remote import Meter, Remote
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.errors import FULL, StepFailed

_AT_ONCE = 8  # transfers
Say = Callable[[str], None]


class SharedCache:
    """One remote place during one run."""

    def __init__(self, remote: Remote, write: bool) -> None:
        self.remote = remote
        self._lock = threading.Lock()
        self._reading = True
        self._writing = write
        self._looked = write  # whoever writes may be the first one
        self._damaged: set[str] = set()

    def fetch(self, ingredients: Ingredients, store: Store, say: Say) -> Action | None:
        """The action with these ingredients, if it is there whole: its blobs are then in `store`, and it is committed.

        Raises OSError only where this machine's own disk is full.
        """
        if not self._reading:
            return None
        try:
            content = self.remote.entry(ingredients.key)
            if content is None:
                self._look(say)
                return None
            action = Action.from_json(ingredients.key, content)
            if not action.is_under_its_key():
                raise Damaged("its entry is of something else")
            try:
                return self._take(action, ingredients, store)
            except (Damaged, FileNotFoundError):
                # The other blobs may not have been looked at any more: all are put there anew.
                self._damaged.update(entry.digest for entry in action.tree.files.values())
                raise
        except (Damaged, FileNotFoundError) as error:
            say(f"{self.remote.shown}: what it has of this is damaged ({self.remote.words(error)}): building it here")
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            self._stop(error, "read", say)
        return None

    def give(self, action: Action, store: Store, say: Say) -> bool:
        """Put the action there, blobs first; those that it has are passed over. Whether it is there now.

        Nothing is put there by a run that may not write, nor what lies outside the store.
        """
        if not all(store.owns(entry.path) for entry in action.tree.files.values()):
            return False
        return self.put(action, store, say)

    def put(self, action: Action, store: Store, say: Say) -> bool:
        """`give`, also of what lies outside the store."""
        return self._send(action.tree.files.values(), {action.key: action.to_json()}, store, say)

    def send(self, entries: Iterable[Entry], store: Store, say: Say) -> bool:
        """Put blobs there without an entry; whether they are there now. Raises Damaged for what is to be made again."""
        return self._send(entries, {}, store, say)

    def _send(self, entries: Iterable[Entry], records: Mapping[str, bytes], store: Store, say: Say) -> bool:
        """Every byte that leaves is hashed before; `store` forgets what is damaged."""
        if not self._writing:
            return False
        unique = {entry.digest: entry for entry in entries}
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                there = pool.map(self._is_there, unique.values())
                missing = [entry for entry, is_there in zip(unique.values(), there, strict=True) if not is_there]
                store.prove(missing)
                if self.remote.commits:
                    self.remote.commit({entry.digest: entry.path for entry in missing}, records)
                    return True
                meter = self.remote.meter()
                for _ in pool.map(lambda entry: self._put(entry, meter), missing):
                    pass
            for key, content in records.items():
                self.remote.put_entry(key, content)
        except Damaged as error:
            if not records:  # a step waits for it
                raise
            say(f"{error}; not put into the shared cache: the next build makes it again")
            return False
        except Exception as error:
            self._stop(error, "write", say)
            return False
        return True

    def bring(self, entry: Entry, store: Store) -> Path:
        """Where a blob lies in the store after it was fetched. Raises StepFailed where it cannot be had."""
        with workplace(store.root) as place:
            try:
                return self._get(entry, place.path, store, self.remote.meter())[1]
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                words = self.remote.words(error)
                raise StepFailed(f"{self.remote.shown}: an input cannot be fetched: {words}") from None

    def has(self, key: str, say: Say) -> bool:
        """Whether there is an entry for the key that can be read."""
        try:
            content = self.remote.entry(key) if self._reading else None
            return content is not None and bool(Action.from_json(key, content))
        except Damaged:
            return False
        except Exception as error:
            self._stop(error, "read", say)
            return False

    @property
    def usable(self) -> bool:
        """Whether nothing has gone wrong so far (writing included, where this run may write)."""
        return self._reading and self._writing

    def _is_there(self, entry: Entry) -> bool:
        return entry.digest not in self._damaged and self.remote.has(entry.digest, entry.size)

    def _put(self, entry: Entry, meter: Meter) -> None:
        if not self._writing:
            raise InterruptedError("given up")
        self.remote.upload(entry.digest, entry.path, meter)

    def _take(self, action: Action, ingredients: Ingredients, store: Store) -> Action:
        with workplace(store.root) as place:
            meter = self.remote.meter()
            wanted = {entry.digest: entry for entry in action.tree.files.values()}
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                here = dict(pool.map(lambda entry: self._get(entry, place.path, store, meter), wanted.values()))
            files = {name: replace(entry, path=here[entry.digest]) for name, entry in action.tree.files.items()}
            taken = Action.of(ingredients, action.name, action.seconds, Tree(dict(sorted(files.items()))))
            store.commit(taken)
        return taken

    def _get(self, entry: Entry, folder: Path, store: Store, meter: Meter) -> tuple[str, Path]:
        found = store.find(entry.digest, entry.size)
        if found is None:
            file = folder / entry.digest
            try:
                self.remote.download(entry.digest, entry.size, file, meter)
                found = store.ingest(file, expected=entry.digest).path
            except (Damaged, FileNotFoundError) as error:
                raise Damaged(f"blob {entry.digest[:16]}: {error}") from None
        return entry.digest, found

    def _look(self, say: Say) -> None:
        """After a miss, once: a mistyped address has nothing either."""
        with self._lock:
            looked, self._looked = self._looked, True
        if not looked and not self.remote.is_there():
            say(f"{self.remote.shown}: there is nothing at all; is this the shared cache's address?")

    def _stop(self, error: Exception, what: str, say: Say) -> None:
        with self._lock:
            first = self._reading if what == "read" else self._writing
            self._writing = False
            if what == "read":
                self._reading = False
        if first:
            consequence = "built here" if what == "read" else "kept here only"
            hint = _hint(error)
            say(
                f"{self.remote.shown}: the shared cache cannot be {'read' if what == 'read' else 'written'}: "
                f"{self.remote.words(error)}{hint}. The build goes on without it; the rest is {consequence}"
            )


def open_shared(url: str, write: bool, patience: float) -> SharedCache:
    """The shared cache at `url`. Nothing is asked of it yet."""
    return SharedCache(Remote(url, patience), write)


def _hint(error: Exception) -> str:
    if isinstance(error, ImportError):
        return " (pip install 'mlcbuild[s3]' or 'mlcbuild[gcs]')"
    if isinstance(error, PermissionError):
        return " (S3 also answers so for what is not there, to whom it does not let list the bucket)"
    return ""
