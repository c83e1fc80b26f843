"""`mlcbuild cache verify`: what is damaged is found, said and removed, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

from mlcbuild.cache.action import Action
from mlcbuild.cache.audit import audit
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.materialise import BLOB_TIME
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree


def action(store: Store, number: int, **files: Entry) -> Action:
    made = Action(f"{number:064x}", "toy", f"toy:{number}", "", {}, {}, {}, 1.0, Tree(files))
    store.commit(made)
    return made


def ingested(store: Store, content: bytes) -> Entry:
    (store.root / "incoming").write_bytes(content)
    return store.ingest(store.root / "incoming")


def rot(path: Path, content: bytes) -> None:
    """Other bytes of the same length, with nothing to be seen from outside."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)
    os.utime(path, (BLOB_TIME, BLOB_TIME))


def test_a_sound_cache(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    action(store, 1, a=ingested(store, b"one"))
    read: list[tuple[int, int]] = []
    assert audit(store, lambda done, total: read.append((done, total))) == []
    assert read == [(3, 3)]


def test_rot_is_found_and_the_steps_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    bad = ingested(store, b"one")
    installed = tmp_path / "installed"
    installed.hardlink_to(bad.path)
    first, second = action(store, 1, a=bad), action(store, 2, a=bad, b=ingested(store, b"two"))
    whole = action(store, 3, b=ingested(store, b"two"))
    rot(bad.path, b"eno")
    assert store.action(first.key) is not None  # the stat alone does not show it
    (problem,) = audit(store)
    assert str(problem).startswith(f"{bad.path}: damaged: its sha256 is ")
    assert str(problem).endswith(": removed; runs again when needed: toy:1, toy:2")
    assert not bad.path.exists()
    assert [store.action(made.key) is not None for made in (first, second, whole)] == [False, False, True]
    assert installed.stat().st_mtime != BLOB_TIME  # so that the next build looks at the package's copy
    assert audit(store) == []


def test_a_borrowed_file_is_read_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    files = []
    for name in ("gone", "kept", "rotten"):
        path = tmp_path / name
        path.write_bytes(name.encode())
        files.append(entry_of(path, store.index))
        store.borrow(files[-1])
    made = action(store, 1, a=files[0])
    action(store, 2, a=files[1])
    (tmp_path / "gone").unlink()
    (problem,) = audit(store)
    assert f"borrowed from {tmp_path / 'gone'}, which is gone or has changed: forgotten" in str(problem)
    assert problem.steps == ("toy:1",)
    assert store.action(made.key) is None
    assert audit(store) == []


def test_what_is_no_cache_file_and_what_is_incomplete(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    entry = ingested(store, b"one")
    made = action(store, 1, a=entry)
    entry.path.unlink()
    (store.root / "ac" / "00" / "x.json").write_text("{}")
    (store.root / "cas" / "note.txt").write_text("?")
    texts = sorted(problem.text for problem in audit(store))
    assert texts == [
        "1 of its 1 files are not here: removed",
        "a damaged entry: removed",
        "not a file of the cache: removed",
    ]
    assert not (store.root / "ac" / "00" / f"{made.key}.json").exists()
    assert audit(store) == []
