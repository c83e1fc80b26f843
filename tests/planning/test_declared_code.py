"""What a step can run is what it declares: an undeclared module could change without a rebuild."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlcbuild
from mlcbuild.engine.code import declaration

PACKAGE = Path(mlcbuild.__file__).parent
# What carries a step's work in and out, and cannot change the bytes that it makes.
MACHINERY = ("mlcbuild.cache", "mlcbuild.errors", "mlcbuild.reporting", "mlcbuild.engine.job")
STEPS = sorted(path.stem for path in (PACKAGE / "steps").glob("*.py") if path.stem not in ("__init__", "job", "run"))
# The files that a download gives are given by their digests, whatever code fetches them.
FREE = {"download"}


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
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = source(name)
        if not name.startswith("mlcbuild.") or path is None or name in found:
            continue
        found.add(name)
        if not any(name == known or name.startswith(f"{known}.") for known in MACHINERY):
            waiting += imports(path)
    return {name for name in found if source(name) != PACKAGE / name.replace(".", "/") / "__init__.py"}


def constant(module: str, name: str) -> tuple[str, ...]:
    tree = ast.parse((PACKAGE.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == name and node.value is not None:
                return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no {name}")


@pytest.mark.parametrize("kind", [kind for kind in STEPS if kind not in FREE])
def test_a_step_declares_every_module_that_it_can_reach(kind: str) -> None:
    module = f"mlcbuild.steps.{kind}"
    known = (*constant(module, "CODE"), *MACHINERY, module)
    undeclared = {
        name
        for name in reachable(module)
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in known)
        and source(name) is not None
        and (PACKAGE.parent / f"{name.replace('.', '/')}.py").is_file()
    }
    assert not undeclared, f"add to CODE of {module}: {sorted(undeclared)}"


@pytest.mark.parametrize("kind", STEPS)
def test_what_is_declared_exists(kind: str) -> None:
    assert declaration(f"mlcbuild.steps.{kind}").version >= 1


def test_packages_are_empty_so_that_their_modules_say_it_all() -> None:
    """`CODE` may name single modules only because importing their package runs nothing."""
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
        assert all(isinstance(node, allowed) for node in body), path
