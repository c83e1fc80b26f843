"""Locks and temporary folders of living, dead and killed holders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlcbuild.cache.locks import locked, workplace

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from mlcbuild.cache.locks import locked, workplace
with locked(Path(sys.argv[1]) / "locks" / "key"), workplace(Path(sys.argv[1])) as place:
    if len(sys.argv) > 2:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[place.lock])
        (place.path / "half").write_text(str(child.pid))
    print("held", flush=True)
    time.sleep(600)
"""
ADDER = """
import sys
from pathlib import Path
from mlcbuild.cache.locks import locked
counter = Path(sys.argv[1]) / "counter"
for _ in range(200):
    with locked(Path(sys.argv[1]) / "locks" / "key"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def hold(root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(root), *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", ADDER, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "800"
    assert not list((tmp_path / "locks").iterdir())


def test_the_lock_and_the_folder_of_a_killed_holder_are_free(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        waited: list[bool] = []
        with workplace(tmp_path):
            assert len(list((tmp_path / "tmp").iterdir())) == 2  # a living process's folder is left alone
        process.send_signal(signal.SIGKILL)
        with locked(tmp_path / "locks" / "key", waiting=lambda: waited.append(True)):
            pass
    with workplace(tmp_path) as place:
        assert list((tmp_path / "tmp").iterdir()) == [place.path]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_folder_is_safe_while_a_child_has_its_lock(tmp_path: Path) -> None:
    """The step's processes inherit the lock: they may live a moment longer than the process that started them."""
    with hold(tmp_path, "child") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with workplace(tmp_path) as place:
            (orphaned,) = set((tmp_path / "tmp").iterdir()) - {place.path}
            os.kill(int((orphaned / "half").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while orphaned.exists() and time.monotonic() < deadline:
        with workplace(tmp_path):
            pass
    assert not orphaned.exists()
