"""A full disk: an error in words, and a store that is as good as before."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.cache.action import Action
from mlcbuild.cache.disk import room_in
from mlcbuild.cache.gc import collect, only_one, plan
from mlcbuild.cache.inventory import inventory
from mlcbuild.cache.locks import locked, running_since, sweep_dead
from mlcbuild.cache.pins import hold_package, holds
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.engine.builder import Builder
from mlcbuild.engine.graph import Graph, Input, Step
from mlcbuild.engine.lookup import Lookup
from mlcbuild.errors import MlcBuildError
from mlcbuild.reporting.events import Event
from mlcbuild.workspace.install import install

_SIZE = 2_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_on(tmp_path / "disk", f"size={_SIZE}") as folder:
        yield folder


@contextlib.contextmanager
def mounted_on(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; without the right to mount one, the test is skipped."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        reason = f"a small tmpfs cannot be mounted: {mounted.stderr.decode().strip()}"
        if os.environ.get("MLCBUILD_TEST_NO_SKIPS"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_text_names_the_folder_and_the_bytes(tmp_path: Path) -> None:
    with (
        pytest.raises(MlcBuildError, match=rf"^{tmp_path}: the disk is full: 1,234 bytes are needed, [\d,]+ bytes are"),
        room_in(tmp_path / "not" / "there", 1234),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), room_in(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_no_room_for_more_files_is_not_said_to_be_bytes(tmp_path: Path) -> None:
    """FAULTS.md C: "102,748,160 bytes are free"."""
    with mounted_on(tmp_path / "disk", "size=50m,nr_inodes=20") as folder:
        store = Store(folder / "cache")
        text = rf"{store.root}: the disk can hold no more files: \d+ of its 20 inodes are used, though [\d,]+ bytes are"
        with pytest.raises(MlcBuildError, match=rf"^{text} free\. Remove files there"), room_in(store.root):
            for number in range(20):
                store.write(store.root / "ac" / f"{number:02}" / "entry", b"{}")


def test_what_can_only_be_read_is_said(tmp_path: Path) -> None:
    """FAULTS.md C: a cache and a dist/ on a read-only file system, to root as well."""
    with mounted_on(tmp_path / "disk", "size=1m") as folder:
        store = Store(folder / "cache")
        tree = Tree({"file": Entry("ab" * 32, 1, 0o644, folder)})
        store.index.close()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        said = r"locks: cannot be written: its file system is read-only\. Put the cache elsewhere \(cache=DIR\)"
        with pytest.raises(MlcBuildError, match=said), room_in(store.root), locked(store.root / "locks" / "key"):
            raise AssertionError
        with pytest.raises(MlcBuildError, match="dist: cannot be written: its file system is read-only"):
            install(folder / "dist", "r", tree.files, b"{}", store)
        package = tmp_path / "package"
        package.mkdir()
        (package / "manifest.json").write_text("{}")
        hold_package(store, package, ["key"])  # who may write to the cache has the say of what it keeps


def test_a_step_that_fills_the_disk_fails_and_leaves_the_store_as_it_was(small_disk: Path) -> None:
    source = small_disk.parent / "source"
    source.write_text("x" * 100_000)
    steps = {
        name: Step("copy", name, "tests.cache.copies", {"times": times}, (Input("file", path=source),))
        for name, times in (("copy:small", 1), ("copy:large", 40))
    }
    store = Store(small_disk / "cache")
    events: list[Event] = []
    builder = Builder(Lookup(store, Graph(steps)), events.append)
    small = builder.build("copy:small")
    with pytest.raises(MlcBuildError, match=rf"copy:large: {small_disk}/cache: the disk is full: .* bytes are free"):
        builder.build("copy:large")
    assert store.action(small.key) == small
    assert not list((store.root / "tmp").iterdir())
    assert len(list(store.root.glob("ac/*/*.json"))) == 1
    assert builder.build("copy:small", force=True).tree.digest == small.tree.digest


def test_garbage_is_collected_from_a_full_disk(small_disk: Path) -> None:
    store = Store(small_disk / "cache")
    (store.root / "incoming").write_bytes(b"x" * 500_000)
    tree = Tree({"file": store.ingest(store.root / "incoming")})
    store.commit(Action("ab" * 32, "toy", "toy:x", "", {}, {}, {}, 1.0, tree))
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()
    with only_one(store.root):
        sweep_dead(store.root)
        todo = plan(inventory(store.root), 0, holds(store.root), running_since(store.root), time.time())
        assert collect(store.root, todo) > 500_000
    assert not list(store.root.glob("cas/*/*"))
    assert shutil.disk_usage(small_disk).free > 400_000
