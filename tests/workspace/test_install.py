"""dist/<recipe>/ is the old package or the new one, and is known to be what it should be."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mlcbuild.cache.action import Damaged
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry
from mlcbuild.workspace.install import install, is_installed, uninstall

Files = dict[str, Entry]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def files(store: Store, text: str) -> Files:
    found = {}
    for name in ("weights/a.bin", "library.so"):
        (store.root / "incoming").write_text(f"{name} {text}")
        found[name] = store.ingest(store.root / "incoming")
    return found


def test_installed_files_and_manifest(store: Store, tmp_path: Path) -> None:
    package = files(store, "one")
    assert not is_installed(tmp_path / "dist", "r", package, b"{}")
    install(tmp_path / "dist", "r", package, b"{}", store)
    assert is_installed(tmp_path / "dist", "r", package, b"{}")
    assert (tmp_path / "dist" / "r" / "weights" / "a.bin").read_text() == "weights/a.bin one"
    assert not is_installed(tmp_path / "dist", "r", package, b"{'other'}")
    assert not is_installed(tmp_path / "dist", "r", {**package, "more": package["library.so"]}, b"{}")


def test_a_file_with_a_new_date_is_hashed_before_it_is_condemned(store: Store, tmp_path: Path) -> None:
    package = files(store, "one")
    install(tmp_path / "dist", "r", package, b"{}", store)
    library = tmp_path / "dist" / "r" / "library.so"
    os.utime(library)
    assert is_installed(tmp_path / "dist", "r", package, b"{}")
    library.chmod(0o644)
    library.write_text("LIBRARY.SO one")
    assert not is_installed(tmp_path / "dist", "r", package, b"{}")
    library.unlink()
    library.symlink_to(package["library.so"].path)
    assert not is_installed(tmp_path / "dist", "r", package, b"{}")


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_leaves_only_the_new_package(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("mlcbuild.host.exchange", lambda *_: False)
    install(tmp_path / "dist", "r", files(store, "one"), b"1", store)
    install(tmp_path / "dist", "r", files(store, "two"), b"2", store)
    assert is_installed(tmp_path / "dist", "r", files(store, "two"), b"2")
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["r"]
    assert uninstall(tmp_path / "dist", "r")
    assert not uninstall(tmp_path / "dist", "r")
    assert not list((tmp_path / "dist").iterdir())


def test_a_reader_never_sees_a_mixture(store: Store, tmp_path: Path) -> None:
    packages = [files(store, text) for text in ("one", "two")]
    install(tmp_path / "dist", "r", packages[0], b"0", store)
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            folder = os.open(tmp_path / "dist" / "r", os.O_RDONLY)  # a package once opened stays what it is
            try:
                texts = {_read_at(folder, name) for name in ("library.so", "manifest.json")}
            except FileNotFoundError:
                continue  # the opened one has been removed by now
            finally:
                os.close(folder)
            seen.append(b" ".join(sorted(texts)))

    reader = threading.Thread(target=read)
    reader.start()
    for round in range(40):
        install(tmp_path / "dist", "r", packages[round % 2], str(round % 2).encode(), store)
    done.set()
    reader.join()
    assert set(seen) <= {b"0 library.so one", b"1 library.so two"}


def _read_at(folder: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(file, 100)
    finally:
        os.close(file)


def test_what_a_killed_install_left_is_swept(store: Store, tmp_path: Path) -> None:
    package = files(store, "one")
    install(tmp_path / "dist", "r", package, b"{}", store)
    (tmp_path / "dist" / ".new-r" / "weights").mkdir(parents=True)
    assert not is_installed(tmp_path / "dist", "r", package, b"{}")
    install(tmp_path / "dist", "r", package, b"{}", store)
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["r"]


def test_a_blob_that_the_disk_does_not_give_back_is_forgotten_and_nothing_installed(
    store: Store, tmp_path: Path
) -> None:
    package = files(store, "one")
    blob = package["library.so"].path
    blob.unlink()
    blob.symlink_to("/proc/self/mem")  # no byte of it can be read
    with pytest.raises(Damaged, match=f"^{blob}: cannot be read: Input/output error: removed"):
        install(tmp_path / "dist", "r", package, b"{}", store)
    assert not blob.is_symlink() and not (tmp_path / "dist" / "r").exists()
