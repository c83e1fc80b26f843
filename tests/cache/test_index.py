"""The memo may be deleted, damaged and shared at any time; that costs time and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import pytest

from mlcbuild.cache.index import Index


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("content")
    return path


def test_what_is_put_is_there_for_the_next_process(tmp_path: Path, file: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    index.put("sha256", file, file.stat(), "digest")
    assert index.get("sha256", file, file.stat()) == "digest"
    index.close()
    again = Index(tmp_path / "index.sqlite")
    assert again.get("sha256", file, file.stat()) == "digest"
    assert again.get("code", file, file.stat()) is None


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 100])
def test_a_damaged_index_is_made_anew(tmp_path: Path, file: Path, damage: bytes) -> None:
    (tmp_path / "index.sqlite").write_bytes(damage)
    index = Index(tmp_path / "index.sqlite")
    index.get("sha256", file, file.stat())
    index.put("sha256", file, file.stat(), "digest")
    index.close()
    assert Index(tmp_path / "index.sqlite").get("sha256", file, file.stat()) == "digest"


def test_no_flipped_bit_is_believed(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "index.sqlite"
    index = Index(path)
    index.put("sha256", file, file.stat(), "digest")
    index.close()
    good = path.read_bytes()
    for seed in range(200):
        damaged = bytearray(good)
        damaged[random.Random(seed).randrange(len(good))] ^= 1 << seed % 8
        path.write_bytes(damaged)
        index = Index(path)
        assert index.get("sha256", file, file.stat()) in ("digest", None)
        index.close()


def test_it_may_vanish_while_it_is_open(tmp_path: Path, file: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    index.get("sha256", file, file.stat())
    (tmp_path / "index.sqlite").unlink()
    index.put("sha256", file, file.stat(), "digest")
    index.close()
    (tmp_path / "readonly").mkdir()
    lost = Index(tmp_path / "no" / "such" / "folder" / "index.sqlite")
    lost.put("sha256", file, file.stat(), "digest")
    assert lost.get("sha256", file, file.stat()) is None


def hammer(path: Path, file: Path, number: int) -> None:
    index = Index(path)
    for round in range(50):
        index.put("sha256", file.with_name(f"{number}-{round}"), file.stat(), "digest")
    index.close()


def test_several_processes_share_it(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "index.sqlite"
    processes = [multiprocessing.Process(target=hammer, args=(path, file, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    index = Index(path)
    found = [index.get("sha256", file.with_name(f"{n}-{r}"), file.stat()) for n in range(4) for r in range(50)]
    assert found == ["digest"] * 200


def test_a_forked_child_opens_its_own_connection(tmp_path: Path, file: Path) -> None:
    index = Index(tmp_path / "index.sqlite")
    index.put("sha256", file, file.stat(), "digest")
    child = os.fork()
    if child == 0:
        os._exit(0 if index.get("sha256", file, file.stat()) == "digest" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert index.get("sha256", file, file.stat()) == "digest"
