"""The shipped model for GPUs that are not here: every library is built, checked for what it is, and the same twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from mlcbuild.compiler.gpu import cuda
from mlcbuild.verify import engine_calls
from tests.end_to_end.workspace import Workspace, make_workspace
from tests.support.tools import missing

pytestmark = pytest.mark.slow

STORIES = Path(__file__).parents[2] / "recipes" / "models" / "stories"
# What each library is, as `library_file` says it, and the language of its kernels where it holds source.
TARGETS = {
    "opencl": ("ELF x86-64", b"__kernel void"),
    "android": ("tar", b"__kernel void"),
    "metal": ("Mach-O arm64", b"simdgroup_multiply_accumulate"),
    "rocm": ("ELF x86-64", None),
    "vulkan": ("ELF x86-64", (0x07230203).to_bytes(4, "little")),  # what a SPIR-V module begins with
}


# Built too, which includes the check of what they are; their packages would say nothing new.
LIBRARIES = ("mali", "metal_x86_64", "iphone", "vulkan-windows")


def workspace_in(folder: Path, cache: Path, checkpoint: Path) -> Workspace:
    workspace = make_workspace(folder, cache, checkpoint)
    text = os.path.relpath(STORIES / "evaluation.txt", workspace.root / "recipes" / "models")  # what it was trained for
    workspace.model("stories", STORIES, f"verify: {{text: {text}}}\n")
    for target in (*TARGETS, *LIBRARIES, "cuda"):
        workspace.recipe(f"stories-{target}", model="stories", target=target)
    one = "recipes/targets/one-cuda.yaml"  # one architecture: what several are is nvcc's own business
    text = (STORIES.parents[1] / "targets" / "cuda.yaml").read_text()
    workspace.write(
        one, text[: text.index("architectures")] + "architectures: [sm_90]\n" + text[text.index("library") :]
    )
    workspace.recipe("stories-one-cuda", model="stories", target="one-cuda")
    return workspace


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, tiny_checkpoint: Path) -> Workspace:
    workspace = workspace_in(tmp_path_factory.mktemp("gpus"), shared_cache, tiny_checkpoint)
    workspace.doit(
        "build", f"recipe={','.join(f'stories-{target}' for target in TARGETS)}", f"debug_dump={workspace.root}/dump"
    )
    workspace.doit("library", f"recipe={','.join(f'stories-{target}' for target in LIBRARIES)}")
    return workspace


def library(workspace: Workspace, target: str) -> Path:
    (found,) = (workspace.root / "dist" / f"stories-{target}").glob(f"stories-q4f16_1-{target}.*")
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_a_package_says_that_its_library_did_not_run_here(gpus: Workspace, target: str) -> None:
    format_name, source = TARGETS[target]
    quality = json.loads((gpus.root / f"dist/stories-{target}/quality.json").read_text())
    assert quality["status"] in ("passed", "warned") and not quality["library_executed"]
    assert quality["execution"]["reason"].startswith("the emulated device runs whole libraries of kind cuda, ")
    assert quality["static_checks"][0] == f"file format: {format_name}"
    content = library(gpus, target).read_bytes()
    assert source is None or source in content
    assert str(gpus.root).encode() not in content and str(gpus.cache).encode() not in content


def test_static_libraries_can_lie_beside_others(gpus: Workspace) -> None:
    """Every member and every function of machine code has the structure's own prefix."""
    with tarfile.open(library(gpus, "android")) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in archive)
    assert len(members) == 2 and all(name.startswith("llama_q4f16_1_") for name in members)
    prefix = next(iter(members)).removesuffix("devc.o").removesuffix("lib0.o")
    (code,) = (content for name, content in members.items() if name.endswith("lib0.o"))
    names = {name for name in code.split(b"\0") if name.startswith(b"__tvm_ffi_")}
    assert names and all(name.startswith(b"__tvm_ffi_" + prefix.encode()) for name in names)


def test_clang_accepts_the_opencl_kernels(gpus: Workspace) -> None:
    if shutil.which("clang") is None:
        missing("clang")
    sources = list((gpus.root / "dump").rglob("kernels.opencl"))
    assert len(sources) >= 2
    for source in sources:
        command = ["clang", "-x", "cl", "-cl-std=CL2.0", "-target", "spir64", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


def test_the_same_bytes_in_another_place(gpus: Workspace, tmp_path: Path, tiny_checkpoint: Path) -> None:
    other = workspace_in(tmp_path / "elsewhere", tmp_path / "cache", tiny_checkpoint)
    other.doit("library", "recipe=stories-android,stories-metal,stories-vulkan")
    made = {(each.suffix, each.stat().st_size, each.read_bytes()) for each in _blobs(other.cache)}
    for target in ("android", "metal", "vulkan"):
        content = library(gpus, target).read_bytes()
        assert any(content == other_content for _, _, other_content in made), target


def _blobs(cache: Path) -> list[Path]:
    return [path for path in (cache / "cas").rglob("*") if path.is_file() and path.stat().st_size > 100_000]


def test_cuda_libraries_hold_machine_code(gpus: Workspace) -> None:
    if cuda.find_nvcc() is None:
        missing("nvcc of CUDA 13")
    gpus.doit("build", "recipe=stories-one-cuda")
    content = library(gpus, "one-cuda").read_bytes()
    assert b"\x50\xed\x55\xba" in content and b"__global__" not in content
    assert b"cuda_graph_alloc_init" in content
    quality = json.loads((gpus.root / "dist/stories-one-cuda/quality.json").read_text())
    assert quality["static_checks"][0] == "file format: ELF x86-64"
    found = quality["execution"]
    assert quality["library_executed"] == "emulated" and found["kernels"] > 50
    # Kernels of token trees, which no library of ours takes, and of who looks into a cache. And a layer's last
    # product asks for another's matrix at decode only, of two texts: in that form, those for more than eight rows.
    assert found["kernels_not_run"] == [
        *(f"fused_linear3_add_ahead_3_kernel_{number}" for number in (2, 3, 4)),
        *("kv_cache_compact_kv_copy_kernel", "kv_cache_debug_get_kv_kernel"),
    ]
    assert max(found["errors"].values()) < found["bound"] == 0.01
    assert set(found["functions"]) == {call.name for call in engine_calls.calls()}


def test_a_target_whose_tools_are_missing_is_unavailable(gpus: Workspace, tmp_path: Path) -> None:
    """Told before anything is done; left out where more was asked for."""
    nothing = {"PATH": str(tmp_path), "CUDA_HOME": ""}
    done = gpus.doit("library", "recipe=stories-cuda", check=False, environment=nothing)
    text = done.stdout + done.stderr
    wanted = ("no nvcc here: install CUDA 13, or `pip install 'mlcbuild[cuda]'`", "nvcc needs a C++ compiler beside it")
    assert done.returncode and any(each in text for each in wanted), text
    listed = gpus.doit("library", "recipe=stories-opencl,stories-cud*", environment=nothing)
    assert "stories-cuda" in listed.stdout + listed.stderr
