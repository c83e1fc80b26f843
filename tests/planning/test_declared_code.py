"""What a step's code is: every module that it can reach, and no more, or changes elsewhere would rebuild it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlcbuild
from mlcbuild.engine.code import MACHINERY, declaration
from mlcbuild.planning.backends import COSTS, PAGES, backend
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Target

PACKAGE = Path(mlcbuild.__file__).parent
STEPS = sorted(path.stem for path in (PACKAGE / "steps").glob("*.py") if path.stem != "__init__")


def targets() -> dict[str, Target]:
    """One of each kind of device among the stock's."""
    return {str(target.device["kind"]): target for target in load(PACKAGE.parent).targets.values()}


def runs() -> list[tuple[str, str]]:
    """Kinds of steps, with every entry that the planner gives them."""
    chosen = {kind: backend(target) for kind, target in targets().items()}
    found = [(kind, "") for kind in STEPS if kind not in ("lower", "library")]
    found += [("lower", each.lower) for each in chosen.values()] + [("library", each.build) for each in chosen.values()]
    return [*dict.fromkeys(found), *(("package", page) for page in PAGES.values())]


def modules(kind: str, entry: str = "") -> set[str]:
    return set(declaration(f"mlcbuild.steps.{kind}", entry=entry).modules)


def source(module: str) -> Path | None:
    path = PACKAGE.parent / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def reachable(module: str) -> set[str]:
    """Worked out another way than by the program: a package's own imports count only where it is named itself."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = source(name)
        machinery = any(name == known or name.startswith(f"{known}.") for known in MACHINERY)
        if name.startswith("mlcbuild.") and path is not None and name not in found and not machinery:
            found.add(name)
            waiting += imports(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "entry"), [run for run in runs() if run[0] != "download"])
def test_a_step_s_code_is_every_module_that_it_can_reach(kind: str, entry: str) -> None:
    wanted = reachable(f"mlcbuild.steps.{kind}") | (reachable(entry.partition(":")[0]) if entry else set())
    found = modules(kind, entry)
    assert wanted <= found
    assert {name for name in found if "/" not in name and source(name).name != "__init__.py"} <= wanted  # type: ignore[union-attr]


def test_the_files_that_a_download_gives_are_given_by_their_digests() -> None:
    assert modules("download") == {"mlcbuild.steps.download"}


def test_a_change_for_one_kind_of_device_rebuilds_no_library_of_another() -> None:
    chosen = {kind: backend(target) for kind, target in targets().items()}
    others = {"llvm": ("gpu", "vulkan", "web"), "cuda": ("cpu", "vulkan"), "vulkan": ("cpu", "web")}
    for kind, folders in others.items():
        found = modules("lower", chosen[kind].lower) | modules("library", chosen[kind].build)
        assert not {name for name in found if name.startswith(tuple(f"mlcbuild.compiler.{each}." for each in folders))}
    assert "mlcbuild.compiler.web.try_out.page/chat.html" not in modules("package")


def test_files_that_modules_read_count_where_they_are_read() -> None:
    for kind, folder in (("llvm", "cpu"), ("cuda", "gpu")):
        kernels = {path.name for path in (PACKAGE / "compiler" / folder / "kernels").iterdir() if path.suffix != ".md"}
        found = modules("library", backend(targets()[kind]).build)
        assert {Path(name).name for name in found if "/kernels/" in name} == kernels
    cpu = backend(targets()["llvm"])
    assert not [name for name in modules("lower", cpu.lower) if "/" in name]
    assert "mlcbuild.quantization.compiled/kernels/group.c" in modules("quantize")
    assert "mlcbuild.quantization.stream" not in modules("lower", cpu.lower)
    assert any(name.endswith("nvtx.h") for name in modules("runtime"))
    assert any(name.endswith("/chat.html") for name in modules("package", PAGES["wasm"]))


@pytest.mark.slow
def test_files_beside_a_module_are_named_in_a_way_that_is_seen() -> None:
    """`Path(__file__).parent / "name"`; what else asks where it lies takes no file from there."""
    reached = {name for run in runs() for name in modules(*run) if "/" not in name}
    asking = {name for name in reached if "__file__" in (source(name) or Path()).read_text()}
    named = {name.partition("/")[0] for run in runs() for name in modules(*run) if "/" in name}
    assert asking - named == {"mlcbuild.compiler.link.binaries"}  # which looks for paths that a binary must not hold


@pytest.mark.parametrize("kind", STEPS)
def test_every_step_declares_its_version_and_the_planner_what_it_costs(kind: str) -> None:
    assert declaration(f"mlcbuild.steps.{kind}").version >= 1
    assert COSTS.keys() == {*STEPS}


def test_only_some_machines_can_compile_for_cuda() -> None:
    assert {kind for kind, target in targets().items() if "nvcc" in backend(target).takes} == {"cuda"}
