"""zig compiles a source once for all who share a cache of it, and a broken cache is no reason to fail."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from mlcbuild import zig
from mlcbuild.errors import MlcBuildError


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(zig.SHARED, str(tmp_path / "shared"))
    return tmp_path / "shared"


def compiled(folder: Path, text: str = "int one(void) { return 1; }") -> bytes:
    """The object of a source that lies beside `folder`, compiled there."""
    folder.mkdir()
    source, output = folder.parent / f"{len(text)}.c", folder / "source.o"
    if not source.exists():
        source.write_text(text)
    zig.run_zig(["cc", "-c", "-g0", "-target", "x86_64-linux-gnu.2.28", "-o", str(output), str(source)], folder / "zig")
    return output.read_bytes()


def test_what_one_compiled_another_finds(shared: Path, tmp_path: Path) -> None:
    first = compiled(tmp_path / "a")
    objects = {path: path.stat().st_ctime_ns for path in shared.rglob("*.o")}
    time.sleep(0.01)
    assert compiled(tmp_path / "b") == first
    assert objects and objects == {path: path.stat().st_ctime_ns for path in shared.rglob("*.o")}
    assert not (tmp_path / "a" / "zig").exists() and not (tmp_path / "b" / "zig").exists()


def test_a_broken_cache_is_left_and_goes(shared: Path, tmp_path: Path) -> None:
    """zig finds by itself that files are damaged, but not what to do with a file where a folder should be."""
    first = compiled(tmp_path / "a")
    shutil.rmtree(shared / "local")
    (shared / "local").write_text("")
    assert compiled(tmp_path / "b") == first
    assert not shared.exists()
    assert compiled(tmp_path / "c") == first and list(shared.rglob("*.o"))


def test_a_source_that_does_not_compile_leaves_the_cache(shared: Path, tmp_path: Path) -> None:
    compiled(tmp_path / "a")
    with pytest.raises(MlcBuildError, match="zig cc failed"):
        compiled(tmp_path / "b", "int one(void) { return; nothing }")
    assert list(shared.rglob("*.o"))
