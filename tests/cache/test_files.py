"""Digests of outside files, remembered by stat."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlcbuild.cache import files
from mlcbuild.cache.files import digest_of, entry_of, tree_of_folder
from mlcbuild.cache.index import Index
from mlcbuild.cache.inventory import read_record
from mlcbuild.cache.layout import action_name, package_path, pin_path
from mlcbuild.cache.pins import holds
from mlcbuild.cache.store import Store, borrowed_places
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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda path: path.symlink_to("blobs/1"),
            ": No such file or directory: it is a symbolic link to blobs/1: ",
        ),
        (lambda path: path.symlink_to(path.name), ": Too many levels of symbolic links"),
        (os.mkfifo, ": it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), ": it is not a regular file"),
    ],
)
def test_what_is_no_file_is_not_as_if_it_were_not_there(
    tmp_path: Path, make: Callable[[Path], None], text: str
) -> None:
    """FAULTS A and D, siblings: where the blob of a linked generation_config.json had gone, its stop tokens were lost
    and the package passed; a pipe was passed over likewise, and waited for where the cache has its files."""
    (tmp_path / "a.json").write_text("{}")
    make(tmp_path / "b.json")
    with pytest.raises(MlcBuildError) as error:
        tree_of_folder(tmp_path, ["*.json"])
    assert str(error.value).startswith(f"{tmp_path}/b.json: cannot be read{text}")
    assert list(tree_of_folder(tmp_path, ["a*"]).files) == ["a.json"], "nobody asked for it"


def test_a_pipe_in_the_place_of_an_entry_is_not_waited_for(tmp_path: Path) -> None:
    """FAULTS D, siblings: an action, a pin and a record of a borrowed blob."""
    store = Store(tmp_path / "cache")
    entry, record = store.root / action_name("ab" * 32), tmp_path / "record"
    for path in (entry, pin_path(store.root, "x", "r"), package_path(store.root, "x"), record):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    assert store.action("ab" * 32) is None and read_record(entry) is None
    assert holds(store.root) == [] and borrowed_places(record) == []
