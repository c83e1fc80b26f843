"""A host that is no Linux on x86-64: what Linux alone has is hidden from every process of a build."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

import mlcbuild
from mlcbuild.compiler import targets
from mlcbuild.errors import Unavailable
from mlcbuild.recipes.load import load
from tests.end_to_end.workspace import Workspace
from tests.engine.workspace import REPOSITORY, make_workspace

PACKAGE = Path(mlcbuild.__file__).parent
# What other systems lack, or have under another number.
_LINUX_ALONE = re.compile(
    r"sched_[gs]etaffinity|prctl\(|renameat2|FICLONE|memfd_|\.madvise\(|posix_fadvise|[\"']/(proc|sys)\b|epoll|inotify"
)
HIDE = """
import mmap, os
from pathlib import Path
del os.sched_getaffinity, os.sched_setaffinity
for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
    delattr(mmap, name)
from mlcbuild import host
host.LINUX, host.PROC, host.SYS = False, Path({proc!r}), Path("/nowhere")
Path({mark!r}).touch()
"""


@pytest.fixture
def hidden(tmp_path: Path) -> dict[str, str]:
    """An environment whose processes find none of it; but what kind of processor there is, as any system tells."""
    proc, folder = tmp_path / "proc", tmp_path / "hide"
    proc.mkdir()
    folder.mkdir()
    shutil.copy("/proc/cpuinfo", proc / "cpuinfo")
    code = HIDE.format(proc=str(proc), mark=str(folder / "was-hidden"))
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}


def test_one_module_has_what_is_linux_alone() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if _LINUX_ALONE.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"host.py"}


def test_a_build_goes_on_without_it(tmp_path: Path, hidden: dict[str, str]) -> None:
    """Planned, run in processes, kept, installed, and found up to date."""
    workspace = make_workspace(tmp_path)
    workspace.doit("build", PYTHONPATH=hidden["PYTHONPATH"])
    assert "tiny-q4f16_1-cpu/manifest.json" in workspace.digests()
    workspace.ran()
    workspace.doit("build", PYTHONPATH=hidden["PYTHONPATH"])
    assert not workspace.ran() and (tmp_path / "hide" / "was-hidden").exists()


def test_a_system_that_runs_no_library_of_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(Unavailable) as error:
        targets.resolve(load(REPOSITORY).targets["cpu"])
    assert str(error.value) == (
        "target cpu: `mcpu: native` builds for Linux, this machine runs Darwin: build on Linux, where what is built "
        "for other systems is verified, too"
    )


@pytest.mark.slow
def test_weights_are_quantized_and_answer_without_it(
    workspace: Workspace, tiny_checkpoint: Path, hidden: dict[str, str]
) -> None:
    """And verified: the library is loaded, and its threads are started."""
    workspace.model("elsewhere", tiny_checkpoint)
    workspace.recipe("elsewhere-cpu", model="elsewhere")
    workspace.doit("build", "recipe=elsewhere-cpu", environment=hidden)
    said = ("generate", "dist/elsewhere-cpu", "--prompt", "Once", "--max-tokens", "3")
    assert workspace.run("mlcbuild", *said, environment=hidden).stdout
