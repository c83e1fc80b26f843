"""The store: what was committed is found, and nothing that is not whole ever is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache.action import Action, Damaged
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.materialise import BLOB_TIME
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree, digest_json
from mlcbuild.errors import MlcBuildError
from tests.cache.test_materialise import damage


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


def test_who_is_wrong_about_a_size_takes_no_blob_away(store: Store) -> None:
    """FAULTS.md D: an entry of a shared cache with another size."""
    entry = ingested(store)
    assert store.find(entry.digest, entry.size + 1) is None
    assert store.find(entry.digest, -1) is None
    assert store.find(entry.digest, entry.size) == entry.path
    entry.path.chmod(0o644)
    with entry.path.open("ab") as file:
        file.write(b"more")
    assert store.find(entry.digest, entry.size + 4) is None
    assert not entry.path.exists()


def test_what_is_proven_is_read_and_what_is_damaged_is_forgotten(store: Store, tmp_path: Path) -> None:
    """FAULTS.md A2. Nothing is to be seen from outside: neither of blobs, nor of a file that was borrowed."""
    whole, damaged, small = ingested(store, b"whole"), ingested(store, b"damaged by somebody"), ingested(store, b"1")
    borrowed = Entry(whole.digest, whole.size, whole.mode, tmp_path / "mine")
    borrowed.path.write_bytes(b"whole")
    read: list[int] = []
    store.prove([whole, damaged, whole, small], read.append)
    assert sum(read) == whole.size + damaged.size + small.size, "each once"
    damage(damaged.path)
    small.path.unlink()
    with pytest.raises(Damaged) as error:
        store.prove([whole, damaged, small])
    told = [rf"{damaged.path}: damaged: its sha256 is [0-9a-f]{{16}}…, not {damaged.digest[:16]}…: removed"]
    assert re.fullmatch("\n".join([*told, f"{small.path}: it is gone"]), str(error.value))
    assert store.find(damaged.digest, damaged.size) is None
    with pytest.raises(Damaged, match="mine: damaged"):
        store.prove([Entry(damaged.digest, 5, 0o644, borrowed.path)])
    assert borrowed.path.exists(), "what is not the store's own is forgotten, not removed"


def test_what_a_step_is_given_is_hashed_where_its_stat_has_changed(store: Store) -> None:
    """Its date may be as before: the change time is not. FAULTS.md A2."""
    entry = ingested(store, b"content of a blob")
    store.check([entry])
    (store.root / "link").hardlink_to(entry.path)
    store.check([entry])
    damage(store.root / "link")
    with pytest.raises(Damaged, match=f"{entry.path}: damaged: .*: removed"):
        store.check([entry])
    with pytest.raises(Damaged, match="it is gone"):
        store.check([entry])
    assert (store.root / "link").stat().st_mtime != BLOB_TIME, "not believed any more where it is linked to"


_GOOD = {"a/b": ["ab" * 32, 1, 0o644]}


@pytest.mark.parametrize(
    "change",
    [
        *({"files": {"a": ["ab" * 32, size, 0o644]}} for size in (10**18, -1, True, 1.0, "1", None)),
        *({"files": {"a": ["ab" * 32, 1, mode]}} for mode in (0o4755, 0, True, 420.0)),
        *({"files": {"a": file}} for file in ([], "abc", ["ab" * 32, 1], ["AB" * 32, 1, 0o644], None)),
        *({"files": {name: ["ab" * 32, 1, 0o644]}} for name in ("../a", "/a", "a//b", "a/.", "a\\b", "a\nb", "\ud800")),
        *({"files": {name: ["ab" * 32, 1, 0o644]}} for name in ("n" * 300, "é" * 128, "d/" * 40 + "f", "")),
        {"files": {**_GOOD, "a": ["ab" * 32, 1, 0o644]}},  # a file, and a folder of that name
        {"files": {f"{number}": ["ab" * 32, 1, 0o644] for number in range(50_001)}},
        {"files": {}},
        {"extra": 1},
        {"seconds": True},
        {"seconds": -1},
        {"seconds": 10**400},
        {"seconds": -(10**400)},
        {"seconds": float("nan")},
        {"name": "n" * 1001},
        {"inputs": {"in": 1}},
        {"toolchain": []},
    ],
)
def test_no_entry_is_believed_that_cannot_be(change: dict[str, Any]) -> None:
    """FAULTS.md D: one check, for entries from here and from a shared cache."""
    record = {"step": "toy", "name": "toy:x", "code": "", "fields": {}, "inputs": {}, "toolchain": {}, "seconds": 1}
    good = {**record, "files": _GOOD, "tree": digest_json(_GOOD)}
    assert Action.from_json("ab" * 32, json.dumps(good).encode()).tree.files["a/b"].size == 1
    bad = {**good, **change}
    bad["tree"] = digest_json(bad["files"])
    with pytest.raises(Damaged, match=r"^its entry (has|cannot be read|was made in a time)") as error:
        Action.from_json("ab" * 32, json.dumps(bad).encode())
    assert len(str(error.value)) < 200


def test_an_entry_without_end_or_bottom_is_damaged() -> None:
    for text in (b"[" * 100_000, b" " * (16 << 20) + b"{}", b"1" * 10_000, b"\xff"):
        with pytest.raises(Damaged, match="its entry cannot be read"):
            Action.from_json("ab" * 32, text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": {"../x": ["a", 1, 420]}}', "\xff"])
def test_a_damaged_entry_is_absent(store: Store, text: str) -> None:
    action = commit(store, file=ingested(store))
    path = store.root / "ac" / "ab" / f"{action.key}.json"
    path.write_text(text, encoding="latin-1")
    assert store.action(action.key) is None


def test_a_damaged_entry_is_no_record_either(store: Store) -> None:
    """`why` and estimates read entries too: one whose inputs had become a list ended every build with a traceback."""
    action = commit(store, file=ingested(store))
    (found,) = store.recorded(action.step)
    path = store.root / "ac" / "ab" / f"{action.key}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": ["x"]}))
    assert found["key"] == action.key and not [*store.recorded(action.step)]


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


@pytest.mark.parametrize("gate", ["prove", "check"])
def test_what_the_disk_does_not_give_back_is_forgotten(store: Store, gate: str) -> None:
    """And so is made again. /proc/self/mem is a file of which no byte can be read: EIO."""
    entry = ingested(store)
    entry.path.unlink()
    entry.path.symlink_to("/proc/self/mem")
    with pytest.raises(Damaged, match=f"^{entry.path}: cannot be read: Input/output error: removed"):
        getattr(store, gate)([entry])
    assert not entry.path.is_symlink()
    outside = Entry(entry.digest, entry.size, entry.mode, Path("/proc/self/mem"))
    with pytest.raises(OSError, match="Input/output error"):
        getattr(store, gate)([outside])
