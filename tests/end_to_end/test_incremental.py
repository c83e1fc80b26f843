"""Only what changed is built again, and a build of what is there does nothing at all."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

import mlcbuild
from mlcbuild import zig
from tests.end_to_end.workspace import Workspace, edit_json, make_workspace

pytestmark = pytest.mark.slow


def kinds(steps: list[str]) -> list[str]:
    return [step.partition(":")[0] for step in steps]


def test_the_second_build_does_nothing_quickly_and_without_tvm(workspace: Workspace, tmp_path: Path) -> None:
    workspace.doit("build")
    before = workspace.digests("tiny-cpu")
    trace = tmp_path / "trace"
    trace.mkdir()
    # Every Python process of the build notes what it imported when it ends.
    (trace / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "atexit.register(lambda: open(os.environ['TRACE'], 'a').write(repr(list(sys.modules))))\n"
    )
    seconds = []  # of processor time: how long it takes depends on what else runs
    for _ in range(3):
        before_it = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = workspace.doit("build", environment={"PYTHONPATH": str(trace), "TRACE": str(tmp_path / "modules")})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before_it.ru_utime - before_it.ru_stime)
    assert "0 done, 11 up to date" in done.stdout
    assert min(seconds) < 1
    modules = (tmp_path / "modules").read_text()
    assert "'doit'" in modules
    for heavy in ("tvm", "tvm_ffi", "numpy", "jsonschema", "tokenizers", "huggingface_hub", "torch"):
        assert f"'{heavy}'" not in modules, heavy
    assert workspace.digests("tiny-cpu") == before
    assert workspace.built("build") == []


def test_editing_a_template_rebuilds_package_and_verify_only(workspace: Workspace) -> None:
    workspace.doit("build")
    stock = Path(mlcbuild.__file__).parents[1] / "recipes" / "templates" / "chatml.yaml"
    text = stock.read_text().replace("helpful and honest", "short and honest")
    workspace.write("recipes/templates/chatml.yaml", text)
    assert kinds(workspace.built("build")) == ["package", "verify"]
    config = workspace.root / "dist/tiny-cpu/tiny-q4f16_1-MLC/mlc-chat-config.json"
    assert "short and honest" in config.read_text()


def test_another_quantization_keeps_download_and_convert(workspace: Workspace) -> None:
    workspace.doit("build")
    workspace.recipe("tiny-cpu", quantization="q8f32_1")  # which no test builds that shares this cache
    assert sorted(kinds(workspace.built("build"))) == ["library", "lower", "measure", "package", "quantize", "verify"]


def test_a_limit_of_the_library_keeps_the_weights(workspace: Workspace) -> None:
    workspace.doit("build")
    with (workspace.root / "recipes/tiny-cpu.yaml").open("a") as file:
        file.write("overrides: {context_window_size: 96}\n")
    built = kinds(workspace.built("build"))
    assert "quantize" not in built and "convert" not in built and "download" not in built
    assert {"lower", "library", "package", "verify"} <= set(built)


def test_a_checkpoint_that_says_the_same_in_other_bytes_stops_early(
    workspace: Workspace, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Early cut-off: what reads config.json runs again and gives what it gave, and nothing after that runs."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    workspace.model("tiny", copy)
    workspace.doit("build")
    edit_json(copy / "config.json", {"transformers_version": "9.9"})
    assert kinds(workspace.built("build")) == ["download", "convert", "package"]


def test_two_models_of_one_structure_share_the_library(
    workspace: Workspace, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    workspace.doit("build")
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    edit_json(other / "generation_config.json", {"temperature": 0.5})
    workspace.model("other", other)
    workspace.recipe("other-cpu", model="other")
    assert not {"lower", "library"} & set(kinds(workspace.built("build")))


def test_a_comment_in_a_step_rebuilds_nothing_and_code_does(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of the program: comments and docstrings change, then one line of a kernel's Python."""
    monkeypatch.delenv(zig.SHARED)  # which the tests' run has: builds keep zig's cache in their own
    program = Path(mlcbuild.__file__).parents[1]
    copy = tmp_path / "program"
    for name in ("mlcbuild", "recipes", "schema"):
        shutil.copytree(program / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    workspace = make_workspace(tmp_path / "workspace", tmp_path / "cache", tiny_checkpoint)

    def built() -> str:
        return workspace.doit("build", environment={"PYTHONPATH": str(copy)}).stdout

    assert "11 done" in built()
    assert list((tmp_path / "cache" / "compiled").rglob("*.o"))
    quantize = copy / "mlcbuild" / "quantization" / "group.py"
    assert "11 up to date" in built()
    quantize.write_text("# A remark.\n" + quantize.read_text().replace('"""', '"""Changed. ', 1))
    kernel = copy / "mlcbuild" / "compiler" / "cpu" / "kernels" / "rows.c"
    kernel.write_text("// A remark.\n" + kernel.read_text())
    assert "11 up to date" in built()
    quantize.write_text(quantize.read_text() + "\nUNUSED = 1\n")
    assert "ok quantize:tiny-q4f16_1" in built()


def test_why_names_the_field_that_changed(workspace: Workspace) -> None:
    workspace.doit("build")
    assert "miss" not in workspace.run("mlcbuild", "why", "tiny-cpu").stdout
    stock = Path(mlcbuild.__file__).parents[1] / "recipes" / "quantizations" / "q4f16_1.yaml"
    workspace.write("recipes/quantizations/q4f16_1.yaml", stock.read_text().replace("group_size: 32", "group_size: 40"))
    answer = workspace.run("mlcbuild", "why", "tiny-cpu").stdout
    lines = answer.splitlines()
    quantize = next(i for i, line in enumerate(lines) if "quantize:" in line)
    assert lines[quantize].startswith("miss")
    assert lines[quantize + 1].strip() == "quantization.weights.group_size 32 → 40"
    assert next(line for line in lines if "convert:" in line).startswith("hit")


def test_debug_dump_writes_the_compiler_phases_and_changes_no_key(workspace: Workspace) -> None:
    workspace.doit("build")
    dump = workspace.root / "dump"
    assert workspace.built("build", f"debug_dump={dump}") == []
    workspace.doit("library", "-a", f"debug_dump={dump}")
    written = {path.name for path in dump.rglob("*.py")}
    assert {"0-model.py", "1-kernels.py", "2-memory.py", "3-runtime.py"} <= written
    (library,) = dump.glob("library/*")
    assert {path.name for path in (library / "kernels").iterdir()} >= {"attention.c", "linear.c", "rows.c", "common.h"}
    *compile_, link = (library / "commands.sh").read_text().splitlines()
    assert all(" -c " in command for command in compile_) and len(compile_) >= 3
    assert " -shared " in link and all(f"{name}.o" in link for name in ("attention", "rows"))
    assert workspace.built("build") == []


@pytest.mark.skipif(os.name != "posix" or sys.platform != "linux", reason="hard links are checked on Linux")
def test_weights_are_not_copied_into_dist(workspace: Workspace) -> None:
    """A package of 40 GB must not need 80: its shards are the cache's own files (a reflink, or else a hard link).

    Root gets copies where there are no reflinks: a link would be a way into the cache (FAULTS.md A2). That others get
    links is shown in tests/cache/test_materialise.py.
    """
    workspace.doit("build")
    shard = workspace.root / "dist/tiny-cpu/tiny-q4f16_1-MLC/params_shard_0.bin"
    cached = workspace.cache / "cas"
    same = [p for p in cached.rglob("*") if p.is_file() and p.stat().st_size == shard.stat().st_size]
    assert same
    if os.geteuid() == 0:
        assert not any(shard.samefile(path) for path in same)
        return
    if shard.stat().st_nlink == 1:
        pytest.skip("this file system has reflinks: nothing to see in the link count")
    assert any(shard.samefile(path) for path in same)
