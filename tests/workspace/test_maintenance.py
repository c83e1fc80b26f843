"""`mlcbuild gc`, `pin`, `unpin` and `cache` in a workspace of toy steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.engine.workspace import REPOSITORY, Workspace


@pytest.fixture
def built(copied: Workspace) -> Workspace:
    """As the other tests have it, and its packages are known to be where they are now."""
    for folder in (copied.cache / "pins", copied.dist):
        shutil.rmtree(folder)
    copied.doit()
    assert copied.ran() == {}
    return copied


ONE, OTHER = "tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"


def mlcbuild(workspace: Workspace, *arguments: str, status: int | None = 0, **environment: str) -> str:
    script = "import sys; from mlcbuild.planning import planner; planner.STEPS = 'tests.engine.toysteps'; "
    done = subprocess.run(
        [sys.executable, "-c", f"{script}from mlcbuild.cli.main import main; sys.exit(main())", *arguments],
        cwd=workspace.root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
    )
    assert status in (None, done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_dist_holds_stays(built: Workspace) -> None:
    digests = built.digests()
    assert "0 actions and 0 files" in mlcbuild(built, "gc", "--max-size", "10G")
    assert "held by installed packages" in mlcbuild(built, "gc", "--max-size", "0", status=1)
    built.doit()
    assert built.ran() == {}
    assert built.digests() == digests


def test_what_dist_no_longer_holds_goes(built: Workspace) -> None:
    built.doit("clean", f"build:{ONE}")
    plan = mlcbuild(built, "gc", "--max-size", "0", "--dry-run", status=1)
    assert "would remove quantize:tiny-q4f16_1, used within the hour\n" in plan
    assert "quantize:tiny-q4f32_1" not in plan
    text = mlcbuild(built, "gc", "--max-size", "0", status=1)
    assert "cannot be reached: the rest is held" in text
    built.doit(f"recipe={OTHER}")
    assert built.ran() == {}
    built.doit()
    assert built.ran() == {"quantize": 1, "lower": 1, "library": 1, "package": 1, "measure": 1, "verify": 1}


def test_a_package_of_another_workspace_is_held_too(built: Workspace) -> None:
    elsewhere = built.root.parent / "elsewhere"
    elsewhere.mkdir()
    away = Workspace(elsewhere, built.tricks)
    mlcbuild(away, "gc", "--max-size", "0", "--cache", str(built.cache), status=1)
    built.doit("-n", "1")
    assert built.ran() == {}


@pytest.mark.slow
def test_pins_hold_what_dist_does_not(built: Workspace) -> None:
    assert mlcbuild(built, "pin", "*f16*") == f"pinned {ONE}\n"
    built.doit("clean")
    assert "held by pins" in mlcbuild(built, "gc", "--max-size", "0", status=1)
    built.doit(f"recipe={ONE}")
    assert built.ran() == {}
    assert "pins: 1, " in mlcbuild(built, "cache", "stats")
    built.doit("clean")
    assert mlcbuild(built, "unpin", "*") == f"unpinned {ONE}\n"
    mlcbuild(built, "gc", "--max-size", "0")
    assert "is not pinned; pinned here: nothing" in mlcbuild(built, "unpin", ONE, status=1)
    expected = f"{ONE} is not built, so there is nothing to pin: doit build recipe={ONE}"
    assert expected in mlcbuild(built, "pin", ONE, status=1)


@pytest.mark.slow
def test_a_running_build_is_left_alone(workspace: Workspace) -> None:
    workspace.trick("quantize.sleep", "0.5")
    with workspace.start() as process:
        for _ in range(8):
            mlcbuild(workspace, "gc", "--max-size", "0", status=None)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def test_figures(built: Workspace) -> None:
    lines = mlcbuild(built, "cache", "stats").splitlines()
    assert lines[0].split() == ["step", "actions", "size", "built", "fetched", "hits"]
    (quantize,) = [line.split() for line in lines if line.startswith("quantize")]
    assert quantize[1] == "2"
    assert quantize[4:6] == ["2", "0"]  # built, fetched
    assert any(line.startswith("borrowed: 3 files outside the cache") for line in lines)
    assert any(line.startswith("installed packages: 2, ") for line in lines)


def test_verify(built: Workspace) -> None:
    assert mlcbuild(built, "cache", "verify") == "every blob is what its name says\n"
    (damaged,) = [path for path in built.cache.glob("cas/*/*") if path.read_bytes() == b'{"kl": 0.0}\n']
    status = damaged.stat()
    damaged.chmod(0o644)
    damaged.write_bytes(b'{"kl": 9.9}\n')
    os.utime(damaged, (status.st_mtime, status.st_mtime))
    output = mlcbuild(built, "cache", "verify", status=1)
    assert f"{damaged}: damaged: its sha256 is " in output
    assert f"removed; runs again when needed: verify:{ONE}, verify:{OTHER}\n1 problems\n" in output
    built.doit()
    assert built.ran() == {"verify": 2}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["gc", "--max-size", "much"], "'much' is not a size"),
        (["cache", "verify", "--cache", "nowhere"], "nowhere: no cache here"),
    ],
)
def test_mistakes(shared: Workspace, arguments: list[str], text: str) -> None:
    assert text in mlcbuild(shared, *arguments, status=1)


def test_what_a_build_makes_in_a_groups_folder_is_the_groups(workspace: Workspace) -> None:
    """Whatever the umask: the next user of this cache goes on with it (as other users: tests/cache/test_users.py)."""
    workspace.cache.mkdir()
    workspace.cache.chmod(0o2775)
    before = os.umask(0o077)
    try:
        workspace.doit()
        workspace.doit()
    finally:
        os.umask(before)
    made = {path: path.stat().st_mode for path in workspace.cache.rglob("*") if path.name != "recipes.memo"}
    assert {path.name for path in made} > {"ac", "cas", "locks", "logs", "pins", "tmp", "unchanged", "index.sqlite"}
    assert not [path for path, mode in made.items() if not mode & 0o040]
    assert not [path for path, mode in made.items() if path.is_dir() and mode & 0o2070 != 0o2070]
