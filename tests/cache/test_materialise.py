"""Files made from blobs: what a user does to them must not reach the cache unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.cache import materialise as module
from mlcbuild.cache.materialise import BLOB_TIME, materialise
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry
from mlcbuild.errors import MlcBuildError

SMALL, LARGE = b"small", b"large" * 300_000


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
    monkeypatch.setattr(module, "_reflink", lambda *_: False)
    _, entry = ingested(tmp_path, LARGE)
    materialise(entry, tmp_path / "file")
    assert (tmp_path / "file").samefile(entry.path)


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
