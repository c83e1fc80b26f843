"""What a step's code is, as far as its results can depend on it.

The digest covers the step's own module and what it declares in `CODE`: the syntax trees, without comments, docstrings
and formatting, so that editing a comment rebuilds nothing. Modules are found by path and parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.cache.canonical import digest_json
from mlcbuild.cache.index import Index
from mlcbuild.errors import MlcBuildError

_ROOT = Path(__file__).parents[2]  # the folder that the package `mlcbuild` lies in
_CONSTANTS = ("VERSION", "CODE", "TOOLS")
_IGNORED = {".pyc", ".pyi", ".md"}
_C = {".c", ".h", ".inc"}
_C_COMMENT = re.compile(rb"//[^\n]*|/\*.*?\*/", re.DOTALL)  # our kernels hold no string with either in it
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Declaration:
    """A step module's constants, and the digest of its code."""

    version: int
    tools: tuple[str, ...]
    digest: str


def declaration(module: str, index: Index | None = None) -> Declaration:
    """What the step module declares, and the digest of its code and of the code that it declares.

    Raises MlcBuildError when a module is missing, cannot be parsed, or lacks a constant.
    """
    own = _find(module)
    if not own.is_file():
        raise MlcBuildError(f"{module}: a step is a module, not a package")
    constants = _summary(own, index)["constants"]
    missing = [name for name in _CONSTANTS if name not in constants]
    if missing:
        raise MlcBuildError(f"{own}: a step module declares {', '.join(missing)} as a plain literal")
    files = {f"{module}.py": _summary(own, index)["digest"]}
    for name in constants["CODE"]:
        root = _find(name)
        for file in [root] if root.is_file() else _sources(root):
            files[f"{name}/{file.relative_to(root.parent).as_posix()}"] = _summary(file, index)["digest"]
    digest = digest_json({"version": constants["VERSION"], "files": files})
    return Declaration(constants["VERSION"], tuple(constants["TOOLS"]), digest)


def normalised(source: str) -> str:
    """A spelling of the program that changes only when the program does, the same for every Python version.

    Raises SyntaxError.
    """
    return _spell(ast.parse(source))


def _find(module: str) -> Path:
    relative = module.replace(".", "/")
    for folder in [_ROOT, *(Path(entry) for entry in sys.path)]:
        file = folder / f"{relative}.py"
        if file.is_file():
            return file
        if (folder / relative).is_dir():
            return folder / relative
    raise MlcBuildError(f"{module}: no such module (declared as a step, or in a step's CODE)")


def _sources(package: Path) -> Iterator[Path]:
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix not in _IGNORED and path.name != "py.typed":
            yield path


def _summary(file: Path, index: Index | None) -> dict[str, Any]:
    """`{digest, constants}` of one source file, remembered by stat."""
    stat = file.stat()
    known = index.get("code", file, stat) if index else None
    if known is not None:
        summary: dict[str, Any] = json.loads(known)
        return summary
    content = file.read_bytes()
    summary = {"digest": hashlib.sha256(content).hexdigest(), "constants": {}}
    if file.suffix in _C:
        lines = [line.rstrip() for line in _C_COMMENT.sub(b"", content).splitlines()]
        summary["digest"] = hashlib.sha256(b"\n".join(filter(None, lines))).hexdigest()
    if file.suffix == ".py":
        try:
            tree = ast.parse(content)
        except SyntaxError as error:
            raise MlcBuildError(f"{file}, line {error.lineno}: {error.msg}") from None
        summary = {"digest": hashlib.sha256(_spell(tree).encode()).hexdigest(), "constants": _constants(tree)}
    if index:
        index.put("code", file, stat, json.dumps(summary))
    return summary


def _constants(tree: ast.Module) -> dict[str, Any]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target: ast.expr = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        else:
            continue
        if isinstance(target, ast.Name) and target.id in _CONSTANTS and node.value is not None:
            found[target.id] = ast.literal_eval(node.value)
    return found


def _spell(node: Any) -> str:
    """Like `ast.dump`, but without docstrings, and without empty fields, which differ between Python versions."""
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, _WITH_DOCSTRING) and _is_docstring(value):
                value = value[1:]
            if value is not None and value != [] and name != "type_ignores":
                fields.append(f"{name}={_spell(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_spell, node))}]"
    return repr(node)


def _is_docstring(body: list[ast.stmt]) -> bool:
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
