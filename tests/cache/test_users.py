"""Several users on one cache folder. As root: two users of one group, who share nothing else."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache.action import Action
from mlcbuild.cache.disk import made_for, room_in
from mlcbuild.cache.gc import collect, plan
from mlcbuild.cache.inventory import inventory
from mlcbuild.cache.locks import locked, sweep_dead, workplace
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.errors import MlcBuildError
from mlcbuild.workspace.install import install

GROUP = 61234
ALICE, BOB = 61001, 61002


def work(root: Path, number: int, *texts: str) -> str:
    """Build action `number` from the texts, unless it is there; which of the two it was."""
    store = Store(root)
    key = f"{number:064x}"
    with locked(root / "locks" / key):
        found = store.action(key)
        if found is None:
            with workplace(root) as place:
                files = {}
                for text in texts:
                    (place.path / "new").write_text(text)
                    files[text] = store.ingest(place.path / "new")
                store.commit(Action(key, "toy", "toy:x", "", {}, {}, {}, 1.0, Tree(files)))
            store.index.add("toy", "built", 1)
        store.index.put("kind", "path", root.parent.stat(), "remembered")
        return f"{'built' if found is None else 'found'} {store.index.get('kind', 'path', root.parent.stat())}"


def watched(root: Path, number: int, *texts: str) -> str:
    """As `work`; before each of its system calls that Python tells of, everything that is there has its rights.

    So whoever else looks meanwhile, or goes on where this process was killed, is never shut out.
    """
    shut: set[str] = set()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith(("os.mkdir", "os.chmod", "os.chown", "os.rename", "os.link", "os.remove", "open")):
            return
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".") and Path(folder).name != "tmp"]
            for name in (*folders, *(name for name in names if not name.startswith("."))):
                status = Path(folder, name).lstat()
                wanted = 0o2070 if stat.S_ISDIR(status.st_mode) else 0o060 if "cas" not in folder else 0o040
                if status.st_mode & wanted != wanted or status.st_gid != GROUP:
                    shut.add(f"{name}: {status.st_mode:o}")

    sys.addaudithook(look)  # in this child only
    return f"{work(root, number, *texts)} {sorted(shut)}"


def clean(root: Path) -> str:
    """Collect everything; how many blobs are left."""
    sweep_dead(root)
    todo = plan(inventory(root), 0, (), None, time.time())
    assert collect(root, todo) == todo.before - todo.after
    return str(len(list((root / "cas").glob("*/*"))))


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, which takes root")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not in pytest's own folder: that is closed to others, again with every other run of pytest that starts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    root = tmp_path / "cache"
    root.mkdir()
    os.chown(root, ALICE, GROUP)
    root.chmod(0o2775)
    return root


def run(user: int, what: Callable[..., str], *arguments: Any, umask: int = 0o022) -> str:
    """What the function returns to this user. The primary group is his own; the shared one is another of his."""
    reader, writer = os.pipe()
    child = os.fork()  # not a new process: the interpreter may lie where only root can read
    if child == 0:
        try:
            os.umask(umask)
            os.setgroups([GROUP])
            os.setgid(user)
            os.setuid(user)
            text = what(*arguments)
        except BaseException:
            text = traceback.format_exc()
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as answer:
        return answer.read().decode()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_users_of_a_group_share_what_they_build(shared: Path, umask: int) -> None:
    assert run(ALICE, work, shared, 1, "one", "both", umask=umask) == "built remembered"
    assert run(BOB, work, shared, 1, "one", "both", umask=umask) == "found remembered"
    assert run(BOB, work, shared, 2, "two", "both", umask=umask) == "built remembered"
    assert run(ALICE, work, shared, 2, umask=umask) == "found remembered"
    assert {path.stat().st_gid for path in shared.rglob("*")} == {GROUP}
    (entry,) = shared.glob(f"ac/*/{1:064x}.json")
    os.utime(entry, (0, 0))
    assert run(BOB, work, shared, 1, umask=umask) == "found remembered"
    assert entry.stat().st_mtime > 0  # another user's use of it counts


def test_nothing_of_a_groups_is_closed_to_it_even_for_a_moment(shared: Path) -> None:
    """FAULTS.md C: `cas/XX` was without the group's rights between being made and being given them."""
    expected = "built remembered []"
    assert run(ALICE, watched, shared, 1, "one", "both", umask=0o077) == expected
    assert run(BOB, watched, shared, 2, "two", "both", umask=0o077) == expected
    assert not list(shared.rglob(".*"))


def test_one_user_collects_what_another_left(shared: Path) -> None:
    run(ALICE, work, shared, 1, "one", "both")
    dead = shared / "tmp" / "dead" / "output"
    dead.mkdir(parents=True)
    for folder in (dead.parent, dead):
        os.chown(folder, ALICE, GROUP)
        folder.chmod(0o2775)
    assert run(BOB, clean, shared) == "0"
    assert not dead.exists()


def test_one_user_replaces_what_another_tried(shared: Path) -> None:
    """Test runs are not the store's: they are installed packages, in a folder of the cache."""
    place = shared / "test-run" / "dist" / "tiny"

    def make(text: str) -> str:
        shutil.rmtree(place, ignore_errors=True)
        with made_for(shared):
            place.mkdir(parents=True)
            (place / "quality.json").write_text(text)
            (place / "quality.json").chmod(0o444)
        return (place / "quality.json").read_text()

    assert run(ALICE, make, "alice", umask=0o077) == "alice"
    assert run(BOB, make, "bob", umask=0o077) == "bob"


def test_what_belongs_to_another_is_said(tmp_path: Path, shared: Path) -> None:
    """FAULTS.md C: other users' cache/ and dist/."""
    shared.chmod(0o755)
    dist = tmp_path / "dist"
    dist.mkdir()

    def lock() -> str:
        with room_in(shared), locked(shared / "locks" / "key"):
            return "locked"

    def put() -> str:
        install(dist, "r", {"a/b": Entry("ab" * 32, 1, 0o644, tmp_path)}, b"{}", Store(shared))
        return "installed"

    def told(what: Callable[[], str]) -> str:
        try:
            return what()
        except MlcBuildError as error:
            return str(error)

    said = run(BOB, told, lock)
    whose = f"{shared} belongs to user {ALICE} and has mode 755; this is user {BOB}. Have it given to you (`chown -R`)"
    assert said.startswith(f"{shared}/locks: Permission denied: {whose}"), said
    assert "or use another folder (cache=DIR for the cache)" in said
    said = run(BOB, told, put)
    assert said.startswith(f"{dist}/.new-r: Permission denied: {dist} belongs to root and has mode 755; this is "), said


def test_a_folder_of_ones_own_stays_so(tmp_path: Path, shared: Path) -> None:
    shared.chmod(0o755)
    run(ALICE, work, shared, 1, "one")
    assert not [path for path in shared.rglob("*") if path.stat().st_mode & 0o022]


def test_a_changed_blob_of_anothers_is_never_believed(shared: Path) -> None:
    run(ALICE, work, shared, 1, "one")
    (blob,) = shared.glob("cas/*/*")
    os.utime(blob, (1, 1))  # touched only: read again, and believed
    assert run(BOB, work, shared, 1).startswith("found")
    blob.chmod(0o644)
    blob.write_text("eno")
    assert run(BOB, work, shared, 1, "one").startswith("built")
