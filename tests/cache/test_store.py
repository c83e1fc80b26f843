"""The store: what was committed is found, and nothing that is not whole ever is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mlcbuild.cache.action import Action
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.errors import MlcBuildError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def ingested(store: Store, content: bytes = b"content", mode: int = 0o644) -> Entry:
    file = store.root / "incoming"
    file.write_bytes(content)
    file.chmod(mode)
    return store.ingest(file)


def commit(store: Store, key: str = "ab" + "0" * 62, **files: Entry) -> Action:
    action = Action(key, "toy", "toy:x", "code", {"a": 1}, {"in": "tree"}, {"numpy": "2"}, 1.0, Tree(files))
    store.commit(action)
    return action


def test_what_is_committed_is_found(store: Store) -> None:
    entry = ingested(store)
    action = commit(store, file=entry)
    assert not (store.root / "incoming").exists()
    assert Store(store.root).action(action.key) == action
    assert store.action("cd" + "0" * 62) is None
    record = json.loads((store.root / "ac" / "ab" / f"{action.key}.json").read_text())
    assert set(record) == {"tree", "files", "step", "name", "code", "fields", "inputs", "toolchain", "seconds"}


def test_blobs_are_read_only_and_keep_whether_they_are_programs(store: Store) -> None:
    entry = ingested(store)
    assert entry.path.stat().st_mode & 0o777 == 0o444
    assert entry.mode == 0o644
    assert ingested(store, mode=0o755).mode == 0o755
    assert ingested(store, mode=0o600).mode == 0o644


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_an_action_with_a_damaged_blob_is_absent(store: Store, damage: str) -> None:
    entry = ingested(store)
    action = commit(store, file=entry, whole=ingested(store, b"whole"))
    entry.path.chmod(0o644)
    if damage == "missing":
        entry.path.unlink()
    else:
        entry.path.write_bytes(b"short" if damage == "shorter" else b"CONTENT")
    assert store.action(action.key) is None
    assert not entry.path.exists()  # nobody else may believe it either
    ingested(store)
    assert store.action(action.key) is not None


def test_a_blob_that_was_only_touched_is_believed_again(store: Store) -> None:
    action = commit(store, file=ingested(store))
    os.utime(action.tree.path("file"))
    assert store.action(action.key) == action
    assert store.action(action.key) == action


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": {"../x": ["a", 1, 420]}}', "\xff"])
def test_a_damaged_entry_is_absent(store: Store, text: str) -> None:
    action = commit(store, file=ingested(store))
    path = store.root / "ac" / "ab" / f"{action.key}.json"
    path.write_text(text, encoding="latin-1")
    assert store.action(action.key) is None


def test_an_entry_whose_files_were_edited_is_absent(store: Store) -> None:
    action = commit(store, file=ingested(store), more=ingested(store, b"more"))
    path = store.root / "ac" / "ab" / f"{action.key}.json"
    record = json.loads(path.read_text())
    del record["files"]["more"]
    path.write_text(json.dumps(record))
    assert store.action(action.key) is None


def test_borrowed_content_is_not_copied_and_counts_while_it_is_unchanged(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    entry = entry_of(file, store.index)
    store.borrow(entry)
    action = commit(store, file=entry)
    found = store.action(action.key)
    assert found is not None
    assert found.tree.path("file") == file
    assert not store.blob_path(entry.digest).exists()
    file.write_bytes(b"WEIGHTS")
    assert store.action(action.key) is None
    with pytest.raises(MlcBuildError, match=r"model\.safetensors: changed during the build"):
        store.borrow(entry)


def test_a_blob_of_ones_own_is_preferred_to_a_borrowed_one(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    entry = entry_of(file, store.index)
    store.borrow(entry)
    own = ingested(store)
    file.unlink()
    assert store.find(entry.digest, entry.size) == own.path


def test_forgetting_removes_the_entry_and_keeps_the_blobs(store: Store) -> None:
    action = commit(store, file=ingested(store))
    assert store.forget(action.key)
    assert not store.forget(action.key)
    assert store.action(action.key) is None
    assert action.tree.path("file").exists()


def test_no_temporary_files_stay(store: Store) -> None:
    commit(store, file=ingested(store))
    assert not list((store.root / "tmp").iterdir())
    assert not list((store.root / "locks").iterdir())
