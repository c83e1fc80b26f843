"""Files made from blobs: what a user does to them must not reach the cache unnoticed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from mlcbuild.cache import materialise as module
from mlcbuild.cache.action import Damaged
from mlcbuild.cache.materialise import BLOB_TIME, materialise
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry
from mlcbuild.errors import MlcBuildError

SMALL, LARGE = b"small", b"large" * 300_000


def damage(path: Path) -> None:
    """Eight other bytes, with size, mode and date as they were."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xffdamage\xff")
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def ingested(folder: Path, content: bytes, mode: int = 0o644) -> tuple[Store, Entry]:
    store = Store(folder / "cache")
    (store.root / "incoming").write_bytes(content)
    (store.root / "incoming").chmod(mode)
    return store, store.ingest(store.root / "incoming")


@pytest.mark.parametrize("content", [SMALL, LARGE])
@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_content_time_and_mode(tmp_path: Path, content: bytes, mode: int) -> None:
    _, entry = ingested(tmp_path, content, mode)
    materialise(entry, tmp_path / "dist" / "file")
    status = (tmp_path / "dist" / "file").stat()
    assert (tmp_path / "dist" / "file").read_bytes() == content
    assert status.st_mode & 0o777 == (0o555 if mode == 0o755 else 0o444)
    assert status.st_mtime == BLOB_TIME


@pytest.mark.parametrize("reflink", [True, False])
@pytest.mark.parametrize("access", [True, False])
def test_damaged_content_never_gets_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reflink: bool, access: bool
) -> None:
    """Whichever way the file is made, and whatever size and date say of the blob. FAULTS.md A2."""
    if reflink:  # as where the file system has them; this one may not
        monkeypatch.setattr(module, "_reflink", lambda source, place: bool(shutil.copyfile(source, place)))
    else:
        monkeypatch.setattr(module, "_reflink", lambda *_: False)
    monkeypatch.setattr(os, "access", lambda *_, **__: access)
    store, entry = ingested(tmp_path, LARGE)
    damage(entry.path)
    assert store.find(entry.digest, entry.size) == entry.path  # nothing is to be seen from outside
    with pytest.raises(Damaged, match=f"{entry.digest}: the content is not what its digest says"):
        materialise(entry, tmp_path / "file")


@pytest.mark.parametrize("content", [SMALL, LARGE])
def test_a_write_into_the_file_never_becomes_the_caches_content(tmp_path: Path, content: bytes) -> None:
    store, entry = ingested(tmp_path, content)
    materialise(entry, tmp_path / "file")
    (tmp_path / "file").chmod(0o644)
    with (tmp_path / "file").open("r+b") as file:
        file.write(b"X")
    found = store.find(entry.digest, entry.size)
    assert found is None or found.read_bytes() == content


def test_large_content_is_not_stored_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only who means it could write to the file: to root, a read-only file is as any other. FAULTS.md A2."""
    monkeypatch.setattr(module, "_reflink", lambda *_: False)
    _, entry = ingested(tmp_path, LARGE)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for folder in tmp_path.parents:
                if folder.stat().st_mode & 0o001 == 0:
                    folder.chmod(0o711)
            if os.geteuid() == 0:
                for path in (tmp_path, *(entry.path, *entry.path.parents)[:4]):
                    os.chown(path, 61001, 61001)  # the kernel links no file that its user cannot write to
                os.setuid(61001)
            materialise(entry, tmp_path / "file")
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "file").samefile(entry.path)
    if os.geteuid() == 0:
        materialise(entry, tmp_path / "roots")
        assert not (tmp_path / "roots").samefile(entry.path)
        with (tmp_path / "roots").open("r+b") as file:
            file.write(b"X")
        assert entry.path.read_bytes() == LARGE


def test_content_that_is_the_users_own_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reflink", lambda *_: False)
    _, entry = ingested(tmp_path, LARGE)
    materialise(entry, tmp_path / "file", link=False)
    assert not (tmp_path / "file").samefile(entry.path)


def test_a_damaged_blob_is_found_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reflink", lambda *_: False)
    _, entry = ingested(tmp_path, SMALL)
    entry.path.chmod(0o644)
    entry.path.write_bytes(b"smell")
    with pytest.raises(MlcBuildError, match=f"{entry.digest}: the content is not what its digest says"):
        materialise(entry, tmp_path / "file")
