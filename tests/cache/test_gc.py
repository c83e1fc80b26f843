"""Garbage collection: the least recently used goes, what is held stays, and nothing is ever half there."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache import gc
from mlcbuild.cache.action import Action
from mlcbuild.cache.files import entry_of
from mlcbuild.cache.gc import Plan, collect, only_one, parse_size, plan
from mlcbuild.cache.inventory import Record, inventory, read_record, stats
from mlcbuild.cache.locks import begin, running_since
from mlcbuild.cache.pins import Hold, hold_package, holds, installed, pin, pinned, unpin
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Tree
from mlcbuild.errors import MlcBuildError

DAY = 86400.0
BLOB = 100_000


@dataclass
class Cache:
    """Actions a, b, c ... of one blob each, used 1, 2, 3 ... days after each other, the last one now."""

    store: Store
    keys: dict[str, str]

    def add(self, name: str, *contents: str, age: float = 0) -> Action:
        files = {}
        for number, content in enumerate(contents or (name,)):
            file = self.store.root / "incoming"
            file.write_bytes(content.encode().ljust(BLOB))
            files[f"file-{number}"] = self.store.ingest(file)
        self.keys[name] = f"{len(self.keys):064x}"
        action = Action(self.keys[name], "toy", f"toy:{name}", "code", {}, {}, {}, 1.0, Tree(files))
        self.store.commit(action)
        self.used(name, age)
        return action

    def used(self, name: str, age: float) -> None:
        path = self.store.root / "ac" / self.keys[name][:2] / f"{self.keys[name]}.json"
        os.utime(path, (time.time() - age, time.time() - age))

    def plan(self, limit: float, hold: tuple[Hold, ...] = (), since: float | None = None) -> Plan:
        return plan(inventory(self.store.root), int(limit), hold, since, time.time())

    def gc(self, limit: float, hold: tuple[Hold, ...] = (), since: float | None = None) -> set[str]:
        """The names of the actions that are still there, whole."""
        collect(self.store.root, self.plan(limit, hold, since))
        return self.here()

    def here(self) -> set[str]:
        return {name for name, key in self.keys.items() if self.store.action(key) is not None}

    def blobs(self) -> int:
        return len(list((self.store.root / "cas").glob("*/*")))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(Store(tmp_path / "cache"), {})


@pytest.fixture
def four(cache: Cache) -> Cache:
    for age, name in enumerate("dcba"):
        cache.add(name, age=age * DAY)
    return cache


def test_the_least_recently_used_goes_first(four: Cache) -> None:
    assert four.gc(2.5 * BLOB) == {"c", "d"}
    assert four.blobs() == 2
    four.used("c", 0)
    four.used("d", 3 * DAY)
    assert four.gc(1.5 * BLOB) == {"c"}
    assert four.gc(0) == set()
    assert four.blobs() == 0


def test_enough_room_removes_nothing(four: Cache) -> None:
    todo = four.plan(10 * BLOB)
    assert (todo.records, todo.files, todo.reached) == ((), (), True)


def test_a_plan_says_what_the_deed_does(four: Cache) -> None:
    before = inventory(four.store.root).size
    todo = four.plan(2.5 * BLOB)
    assert four.blobs() == 4
    assert collect(four.store.root, todo) == todo.before - todo.after
    assert (todo.before, todo.after) == (before, inventory(four.store.root).size)


def test_a_shared_blob_goes_with_its_last_user(cache: Cache) -> None:
    cache.add("old", "shared", "own", age=2 * DAY)
    cache.add("new", "shared")
    assert cache.gc(1.5 * BLOB) == {"new"}
    assert cache.blobs() == 1


def test_what_nothing_refers_to_goes_always(four: Cache) -> None:
    four.store.forget(four.keys["d"])
    (four.store.root / "ac" / "00" / "half.json").write_text("{")
    (four.store.root / "cas" / "stray").write_text("?")
    log = four.store.root / "logs" / "toy.log"
    log.parent.mkdir()
    log.write_text("old")
    todo = plan(inventory(four.store.root), 10 * BLOB, (), None, time.time() + 30 * DAY)
    collect(four.store.root, todo)
    assert four.here() == {"a", "b", "c"}
    assert four.blobs() == 3
    assert not log.exists()
    assert not (four.store.root / "cas" / "stray").exists()
    assert not (four.store.root / "ac" / "00" / "half.json").exists()


def test_test_runs_and_unfinished_downloads_go_before_anything_that_was_built(four: Cache) -> None:
    loose = [four.store.root / name for name in ("test-run/dist/a/file", "partial/one/half", "partial/two/half")]
    for path in loose:
        path.parent.mkdir(parents=True)
        path.write_bytes(b" " * BLOB)
    enough = inventory(four.store.root).size
    assert four.plan(enough).files == ()
    assert four.gc(enough - BLOB) == {"a", "b", "c", "d"}
    assert [path.exists() for path in loose] == [False, True, True], "the oldest first"
    assert not loose[0].parent.exists()
    assert four.plan(enough, since=0.0).files == (), "a running build may be about to go on with it"
    todo = plan(inventory(four.store.root), enough, (), None, time.time() + 30 * DAY)
    assert {file.path for file in todo.files} == {*loose[1:]}


def test_held_actions_and_blobs_stay(four: Cache) -> None:
    held = (Hold("pin", "x", frozenset({four.keys["a"]})),)
    todo = four.plan(0, held)
    assert not todo.reached
    assert todo.held == {"pin": BLOB}
    assert four.gc(0, held) == {"a"}
    blob = four.add("e").tree.files["file-0"].digest
    four.gc(0, (Hold("dist", "x", frozenset(), frozenset({blob})),))
    assert four.store.blob_path(blob).exists()


def test_what_a_running_build_may_rely_on_stays(four: Cache) -> None:
    """Last use is kept to the hour, so an hour before the build began counts as well."""
    since = time.time() - 1.5 * DAY
    four.used("b", 1.5 * DAY + 3600)
    fresh = four.add("e").tree.path("file-0")
    four.store.forget(four.keys["e"])  # ingested, and the entry yet to come
    assert four.gc(0, since=since) == {"b", "c", "d"}
    assert fresh.exists()


def test_what_is_used_between_the_plan_and_the_deed_stays(four: Cache) -> None:
    todo = four.plan(0)
    assert four.store.action(four.keys["a"]) is not None  # its use is noted
    four.add("again", "b")  # a new action with a blob that was to go
    collect(four.store.root, todo)
    assert four.here() == {"a", "again"}


def test_an_entry_is_read_once(four: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS.md E: only what came or was written again since the plan is read again."""
    read: list[str] = []

    def reading(path: Path) -> Record | None:
        read.append(path.stem)
        return read_record(path)

    monkeypatch.setattr(gc, "read_record", reading)
    todo = four.plan(2.5 * BLOB)
    four.add("again", "b")
    collect(four.store.root, todo)
    assert read == [four.keys["again"]]
    assert four.here() == {"c", "d", "again"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["scandir", "open"])
def test_what_a_failing_disk_does_not_show_is_no_garbage(
    four: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """It counted as not there: the blobs of a folder of entries that could not be listed were removed."""
    pin(four.store, tmp_path, "b", [four.keys["b"]])
    todo, real = four.plan(2.5 * BLOB), getattr(os, call)
    four.add("e", "d", "e")  # after the plan, so that its entry is read

    def failing(path: Any, *arguments: Any, **named: Any) -> Any:
        if f"{os.sep}ac{os.sep}" in str(path) or f"{os.sep}pins{os.sep}" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            four.plan(0)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            collect(four.store.root, todo)
        if call == "open":
            with pytest.raises(OSError, match=re.escape(os.strerror(number))):
                holds(four.store.root)
    assert four.blobs() == 5 and [hold.name for hold in holds(four.store.root)] == ["b"]


def test_borrowed_files_are_never_touched(cache: Cache, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights" * BLOB)
    entry = entry_of(file, cache.store.index)
    cache.store.borrow(entry)
    cache.keys["m"] = "ab" * 32
    cache.store.commit(Action("ab" * 32, "download", "download:m", "", {}, {}, {}, 1.0, Tree({"m": entry})))
    assert inventory(cache.store.root).size < BLOB
    assert cache.gc(0) == set()
    assert file.exists()
    assert cache.blobs() == 0


def test_a_run_is_known_until_it_ends(cache: Cache) -> None:
    root, ended = cache.store.root, list[bool]()
    assert running_since(root) is None
    before = time.time()
    end = begin(root, lambda: ended.append(True))
    since = running_since(root)
    assert since is not None
    assert before - 1 < since <= time.time()
    child = os.fork()
    if child == 0:
        end()  # a forked worker's end is not the run's
        os._exit(0)
    os.waitpid(child, 0)
    assert running_since(root) is not None
    end()
    assert ended == [True]
    assert running_since(root) is None
    assert not list((root / "locks").iterdir())


def test_a_killed_runs_mark_is_removed(cache: Cache) -> None:
    mark = cache.store.root / "locks" / "run-dead"
    mark.parent.mkdir()
    mark.touch()
    os.utime(mark, (0, 0))
    assert running_since(cache.store.root) is None
    assert not mark.exists()


def test_only_one_collects_at_a_time(cache: Cache) -> None:
    another = pytest.raises(MlcBuildError, match="another process is collecting")
    with only_one(cache.store.root), another, only_one(cache.store.root):
        raise AssertionError


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("20G", 20e9), ("1.5 tb", 1.5e12), ("2KiB", 2048), ("7", 7), ("3Mi", 3 << 20)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "20X", "1e9", "20 G G", "I"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(MlcBuildError, match="is not a size: expected a number"):
        parse_size(text)


def test_pins(cache: Cache, tmp_path: Path) -> None:
    pin(cache.store, tmp_path / "one", "stories", ["k1", "k2"])
    pin(cache.store, tmp_path / "two", "stories", ["k3"])
    assert pinned(cache.store.root, tmp_path / "one") == {"stories": Hold("pin", "stories", frozenset({"k1", "k2"}))}
    assert {key for hold in holds(cache.store.root) for key in hold.keys} == {"k1", "k2", "k3"}
    unpin(cache.store, tmp_path / "one", "stories")
    assert [hold.keys for hold in holds(cache.store.root)] == [{"k3"}]
    with pytest.raises(MlcBuildError, match="stories is not pinned; pinned here: nothing"):
        unpin(cache.store, tmp_path / "one", "stories")


def test_a_package_holds_while_it_is_the_one_that_was_installed(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "dist" / "stories"
    folder.mkdir(parents=True)
    manifest = folder / "manifest.json"
    manifest.write_text('{"steps": {"verify": {"key": "k1"}}, "files": {"a": {"sha256": "b1"}}}')
    hold_package(cache.store, folder, ["k1", "k2"])
    assert holds(cache.store.root) == [Hold("dist", str(folder), frozenset({"k1", "k2"}))]
    assert list(installed(tmp_path / "dist")) == [Hold("dist", str(folder), frozenset({"k1"}), frozenset({"b1"}))]
    manifest.write_text("{}")
    assert holds(cache.store.root) == list(installed(tmp_path / "dist")) == []
    assert list((cache.store.root / "pins" / "dist").iterdir())  # it may become that package again
    manifest.unlink()
    assert holds(cache.store.root) == []
    assert not list((cache.store.root / "pins" / "dist").iterdir())


def test_figures(four: Cache, tmp_path: Path) -> None:
    four.store.count_hit(four.add("e", "a", "e"))
    four.store.save_counts()
    four.store.index.add("toy", "built", 5)
    four.store.forget(four.keys["b"])
    found = stats(
        inventory(four.store.root), [Hold("pin", "p", frozenset({four.keys["e"]}))], four.store.index.counts()
    )
    (row,) = found.rows
    assert (row.kind, row.actions, row.size, dict(row.counts)) == ("toy", 4, 4 * BLOB, {"hits": 1, "built": 5})
    assert (found.actions, found.blobs, found.size, found.unused) == (4, 5, 5 * BLOB, BLOB)
    assert found.held == {"pin": (1, 2 * BLOB)}
    assert found.borrowed == (0, 0)


def test_an_interrupted_collection_leaves_only_whole_actions(four: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of files has gone, what is found is whole: entries go first."""
    remove: Callable[[Path], None] = Path.unlink
    left = 3

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        remove(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        four.gc(1.5 * BLOB)
    monkeypatch.undo()
    assert four.here() == {"d"}
    assert four.blobs() == 4
    assert four.gc(10 * BLOB) == {"d"}
    assert four.blobs() == 1
