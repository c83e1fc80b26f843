"""A full disk: an error in words, and a store that is as good as before."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.cache.disk import room_in
from mlcbuild.cache.store import Store
from mlcbuild.errors import MlcBuildError
from mlcbuild.execution.build import Builder
from mlcbuild.execution.lookup import Lookup
from mlcbuild.graph import Graph, Input, Step
from mlcbuild.reporting.events import Event

_SIZE = 2_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        reason = f"a small tmpfs cannot be mounted: {mounted.stderr.decode().strip()}"
        if os.environ.get("MLCBUILD_TEST_NO_SKIPS"):
            pytest.fail(reason)
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_text_names_the_folder_and_the_bytes(tmp_path: Path) -> None:
    with (
        pytest.raises(MlcBuildError, match=rf"^{tmp_path}: the disk is full: 1,234 bytes are needed, [\d,]+ bytes are"),
        room_in(tmp_path / "not" / "there", 1234),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), room_in(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


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
