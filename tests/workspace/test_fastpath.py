"""What is remembered of recipes that are up to date, and everything that makes the memory be looked past."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlcbuild.planning import planner as graph
from mlcbuild.workspace.fastpath import Memory, _inside, recall
from tests.engine.workspace import REPOSITORY, Workspace

F16, F32 = "tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"


@pytest.fixture
def settled(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace of which everything is remembered."""
    monkeypatch.setattr(graph, "STEPS", "tests.engine.toysteps")
    time.sleep(0.03)  # what was written in the last clock tick is not relied on
    copied.doit()
    return copied


def memory(workspace: Workspace) -> Memory | None:
    return recall(workspace.root, workspace.cache)


def holds(workspace: Workspace, *names: str) -> bool:
    known = memory(workspace)
    return known is not None and known.holds(names)


def test_a_build_with_nothing_to_do_is_remembered(settled: Workspace) -> None:
    assert holds(settled, F16, F32)
    known = memory(settled)
    assert known is not None
    assert len({*known.tasks[F16], *known.tasks[F32]}) == 16
    assert known.recipes[F16] == ("tiny", "q4f16_1", "cpu")


def test_packages_are_remembered_by_the_build_that_installs_them(settled: Workspace) -> None:
    shutil.rmtree(settled.root / "dist")
    settled.doit()
    assert holds(settled, F16, F32)


def test_the_output_is_the_same_with_and_without_the_memory(settled: Workspace) -> None:
    quick = settled.doit("build").splitlines()
    for file in (settled.cache / "unchanged").iterdir():
        file.unlink()
    slow = settled.doit("build").splitlines()
    assert sorted(quick[:-1]) == sorted(slow[:-1])
    assert quick[-1].startswith("0 done, 18 up to date")


def append(workspace: Workspace, name: str) -> None:
    with (workspace.root / name).open("a") as file:
        file.write("\n")


def same_size_and_time(workspace: Workspace) -> None:
    path = workspace.root / "recipes/models/tiny/model.safetensors"
    status = path.stat()
    path.write_bytes(b"T" + path.read_bytes()[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def damage(folder: Path) -> None:
    for file in folder.iterdir():
        replace(file, b"{}\n{}")


def an_entry(workspace: Workspace) -> Path:
    return next((workspace.cache / "ac").glob("*/*.json"))


def a_blob(workspace: Workspace) -> Path:
    return next(path for path in (workspace.cache / "cas").glob("*/*") if path.suffix != ".at")


CHANGES: dict[str, Callable[[Workspace], object]] = {
    "a matrix edited": lambda w: append(w, "recipes/matrix/tiny.yaml"),
    "a model edited": lambda w: append(w, "recipes/models/tiny.yaml"),
    "dodo.py edited": lambda w: append(w, "dodo.py"),
    "a recipe added": lambda w: w.write("recipes/new.yaml", "model: tiny\nquantization: q0f16\ntarget: cpu\n"),
    "a stock file shadowed": lambda w: w.write("recipes/quantizations/q4f16_1.yaml", "class: q4\n"),
    "a folder added": lambda w: w.write("recipes/modles/x.yaml", ""),
    "a lock file added": lambda w: w.write("recipes/recipes.lock", '{"version": 1, "repos": {}}'),
    "the config edited": lambda w: append(w, "recipes/models/tiny/config.json"),
    "weights edited behind the clock": same_size_and_time,
    "a checkpoint file added": lambda w: w.write("recipes/models/tiny/vocab.txt", ""),
    "a checkpoint file removed": lambda w: (w.root / "recipes/models/tiny/tokenizer.json").unlink(),
    "an action entry forgotten": lambda w: an_entry(w).unlink(),
    "a blob evicted": lambda w: a_blob(w).unlink(),
    "a blob written to": lambda w: replace(a_blob(w), a_blob(w).read_bytes()),
    "a package removed": lambda w: (w.dist / F16).rename(w.root / "elsewhere"),
    "a package's file edited": lambda w: replace(w.dist / F16 / "quality.json", b"{}"),
    "a package's manifest edited": lambda w: replace(w.dist / F16 / "manifest.json", b"{}"),
    "a file added to a package": lambda w: w.write(f"dist/{F16}/weights/more", ""),
    "an install that was killed": lambda w: (w.dist / f".new-{F16}").mkdir(),
    "the memory damaged": lambda w: damage(w.cache / "unchanged"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_noticed(settled: Workspace, change: str) -> None:
    CHANGES[change](settled)
    assert not holds(settled, F16, F32)


def test_a_touched_file_with_the_same_content_is_no_change(settled: Workspace) -> None:
    """FAULTS.md E: one touched YAML file of thousands, and all was planned again."""
    for name in ("recipes/matrix/tiny.yaml", "recipes/models/tiny.yaml", "dodo.py"):
        (settled.root / name).touch()
    assert holds(settled, F16, F32)


def test_subfolders_of_a_checkpoint_are_watched(tmp_path: Path) -> None:
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text("{}")
    (tmp_path / "linked").symlink_to(tmp_path)
    assert {*_inside(tmp_path)} == {tmp_path, pooling.parent, pooling}


@pytest.mark.parametrize("change", ["PATH", "tools", "program"])
def test_another_program_machine_or_tool_is_noticed(
    settled: Workspace, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "PATH":
        monkeypatch.setenv("PATH", "/elsewhere")
    if change == "tools":
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    if change == "program":
        monkeypatch.setattr("mlcbuild.__version__", "0.0")
    assert memory(settled) is None


def copy_of_the_program(folder: Path) -> Path:
    for name in ("mlcbuild", "tests/engine", "tests/support"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "tests/__init__.py", folder / "tests")
    for name in ("recipes", "schema"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def test_an_edited_copy_of_the_same_version_elsewhere_is_noticed(settled: Workspace, tmp_path: Path) -> None:
    """FAULTS A5: `PYTHONPATH=clone doit build` was told what the first program had found."""
    clone = copy_of_the_program(tmp_path / "clone")
    step = clone / "tests/engine/toysteps/quantize.py"
    step.write_text(step.read_text().replace("VERSION = 1", "VERSION = 2"))
    settled.doit("build", PYTHONPATH=str(clone))
    assert settled.ran()["quantize"] == 2


@pytest.mark.parametrize("change", ["program", "steps"])
def test_the_memory_belongs_to_a_program_and_to_where_its_steps_lie(
    settled: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """FAULTS A5."""
    assert memory(settled) is not None
    clone = copy_of_the_program(tmp_path / "clone")
    if change == "program":
        monkeypatch.setattr("mlcbuild.__file__", str(clone / "mlcbuild/__init__.py"))
    else:
        monkeypatch.setattr("mlcbuild.workspace.fastpath._folder_of", lambda module: clone / "tests/engine/toysteps")
    assert memory(settled) is None


def test_every_source_file_of_the_program_and_of_the_steps_is_watched(settled: Workspace) -> None:
    known = memory(settled)
    assert known is not None
    files = {*(REPOSITORY / "mlcbuild").rglob("*.[pc]*"), *(REPOSITORY / "tests/engine/toysteps").glob("*.py")}
    files = {file for file in files if "__pycache__" not in str(file)}
    assert len(files) > 100
    assert {str(file) for file in files} <= known.world.keys()
    assert {str(file.parent) for file in files} <= known.world.keys()


LACKING = """
import shutil
from mlcbuild.compiler import targets
from mlcbuild.errors import Unavailable

real = targets.resolve

def resolve(target):
    if target.name != "cpu" and not shutil.which("foreign-cc"):
        raise Unavailable("this machine lacks foreign-cc")
    return real(target)

targets.resolve = resolve
"""


def test_what_a_recipe_lacked_is_looked_for_again_when_something_was_installed(built: Workspace) -> None:
    """The memory said that it was lacking still."""
    programs = built.root / "bin"
    programs.mkdir()
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    built.write("dodo.py", (built.root / "dodo.py").read_text() + LACKING)
    built.write("recipes/foreign.yaml", "model: tiny\nquantization: q4f16_1\ntarget: cpu-x86_64\n")
    time.sleep(0.03)
    for _ in range(2):
        assert "?? foreign: unavailable: this machine lacks foreign-cc" in built.doit("build", PATH=path)
    assert built.ran() == {}
    (programs / "foreign-cc").write_text("#!/bin/sh\n")
    (programs / "foreign-cc").chmod(0o755)
    assert "ok build:foreign" in built.doit("build", PATH=path)


@pytest.mark.slow
def test_an_edit_while_the_build_runs_is_not_taken_for_what_was_built(built: Workspace) -> None:
    built.trick("all.sleep", "0.2")
    with built.start("-a") as process:
        time.sleep(1.5)
        append(built, "recipes/matrix/tiny.yaml")
        process.communicate(timeout=120)
    assert not list((built.cache / "unchanged").glob("*")) or not holds(built, F16)


def test_one_recipe_is_forgotten_and_built_while_the_other_stays_known(settled: Workspace) -> None:
    settled.doit("forget", f"verify:{F16}")
    assert not holds(settled, F16)
    assert holds(settled, F32)
    settled.doit("build")
    assert settled.ran() == {"verify": 1}
    assert holds(settled, F16, F32)


def test_an_entrys_last_use_is_noted(settled: Workspace) -> None:
    entry, long_ago = an_entry(settled), time.time() - 86_400
    os.utime(entry, (long_ago, long_ago))
    settled.doit("build")
    assert time.time() - entry.stat().st_mtime < 3600
