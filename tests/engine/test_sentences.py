"""FAULTS.md C: what no program can prevent is a sentence with the path and what to do, never a traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlcbuild.errors import MlcBuildError, bounded, in_words, plainly


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "Permission denied: /"),
        (errno.EPERM, "; this is "),
        (errno.EROFS, ": cannot be written: its file system is read-only"),
        (errno.ELOOP, "a symbolic link leads back to itself"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "check the disk"),
        (errno.EMFILE, "too many files are open"),
        (errno.ENOMEM, "memory ran out"),
        (errno.EXDEV, "nvalid cross-device link: check what lies there"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(tmp_path: Path, number: int, text: str) -> None:
    words = in_words(OSError(number, os.strerror(number), str(tmp_path)))
    assert words is not None and text in words


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "memory ran out"),
        (ImportError("x.so: failed to map segment from shared object"), "memory ran out"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "not UTF-8 text (byte 0)"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "is not UTF-8"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "the connection was lost"),
        (RuntimeError("can't start new thread"), "no more processes or threads"),
    ],
)
def test_other_faults_of_the_surroundings(error: Exception, text: str) -> None:
    with pytest.raises(MlcBuildError, match=text.replace("(", r"\(").replace(")", r"\)")), plainly():
        raise error


def test_a_write_without_a_name_is_told_by_the_file_in_hand(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with path.open("w"):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(MlcBuildError, match=f"^{tmp_path}/report.txt: the disk cannot"), plainly():
        write(tmp_path / "report.txt")


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(ZeroDivisionError), plainly():
        raise ZeroDivisionError
    assert in_words(KeyError("x")) is None


def test_many_of_one_kind_are_counted() -> None:
    """FAULTS B: 26 lines for one cause."""
    many = [f"tensor _orig_mod.model.layers.{i}.weight belongs to no parameter" for i in range(30)]
    lines = bounded("\n".join(["first", *many, "last"])).splitlines()
    assert lines == ["first", *many[:12], "… and 18 more of the same kind, all under `_orig_mod.model.layers.`", "last"]
    assert bounded("\n".join(many[:13])).splitlines() == many[:13]  # one more is no shorter by being counted
    assert bounded("\n".join(f"line {i}" for i in range(14))).endswith("line 11\n… and 2 more of the same kind")


def test_texts_have_a_bound() -> None:
    """FAULTS D: a line of 10 MB, and siblings: 5,000 lines, and many that differ in a number."""
    text = bounded("x" * 10_000_000 + "\n" + "line\n" * 5_000)
    assert text.endswith("… and 4,902 more lines") and len(text) < 5_000
