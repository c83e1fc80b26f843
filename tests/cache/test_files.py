"""Digests of outside files, remembered by stat."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mlcbuild.cache import files
from mlcbuild.cache.files import digest_of, entry_of, tree_of_folder
from mlcbuild.cache.index import Index
from mlcbuild.errors import MlcBuildError


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, file = Index(tmp_path / "index.sqlite"), tmp_path / "weights"
    file.write_bytes(b"one")
    first, _ = digest_of(file, index)
    assert first == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as context:
        context.setattr(files, "hash_file", lambda _: pytest.fail("hashed again"))
        assert digest_of(file, index)[0] == first
    file.write_bytes(b"two")
    assert digest_of(file, index)[0] != first


def test_an_edit_that_restores_size_and_time_is_noticed(tmp_path: Path) -> None:
    index, file = Index(tmp_path / "index.sqlite"), tmp_path / "weights"
    file.write_bytes(b"one")
    first, stat = digest_of(file, index)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_of(file, index)[0] != first


def test_an_edit_right_after_hashing_is_noticed(tmp_path: Path) -> None:
    index, file = Index(tmp_path / "index.sqlite"), tmp_path / "weights"
    for round in range(20):
        content = f"{round:03}".encode()
        file.write_bytes(content)
        assert digest_of(file, index)[0] == hashlib.sha256(content).hexdigest()


def test_a_folder_as_a_tree(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", ".hidden", "sub/deep.json", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.json").symlink_to(tmp_path / "config.json")
    assert list(tree_of_folder(tmp_path).files) == ["config.json", "link.json", "model.safetensors", "sub/deep.json"]
    assert list(tree_of_folder(tmp_path, ("*.json",), deep=False).files) == ["config.json", "link.json"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match="gone: no such folder"):
        tree_of_folder(tmp_path / "gone")
    with pytest.raises(MlcBuildError, match="gone: cannot be read: No such file"):
        entry_of(tmp_path / "gone", None)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """FAULTS C: a UnicodeEncodeError. Files that nobody asked for may be called what they like."""
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.json")).write_text("{}")
    assert not tree_of_folder(tmp_path, ["*.txt"]).files
    with pytest.raises(MlcBuildError) as error:
        tree_of_folder(tmp_path, ["*.json"])
    assert str(error.value) == f"{tmp_path}: the file name b'odd\\xff.json' is not UTF-8: rename the file"
