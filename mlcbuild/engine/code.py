"""What a step's code is, as far as its results can depend on it.

The digest covers every module that the step's module can reach by imports, those inside functions included, and the
files that these modules name beside themselves (`Path(__file__).parent / "kernels"`). So nothing can be forgotten. Of
a module it is the syntax tree that counts, without comments, docstrings and formatting, so that editing a comment
rebuilds nothing. Modules are found by path and parsed, never imported.

What carries a step's work in and out (`MACHINERY`) cannot change the bytes that it makes, and does not count. Other
distributions are not looked into: a step names those whose versions count in `TOOLS`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from mlcbuild.cache.index import Index
from mlcbuild.cache.tree import digest_json
from mlcbuild.errors import MlcBuildError

MACHINERY = ("mlcbuild.cache", "mlcbuild.engine", "mlcbuild.errors", "mlcbuild.reporting")
_PROGRAM = "mlcbuild"
_ROOT = Path(__file__).parents[2]  # the folder that the package `mlcbuild` lies in
_REQUIRED = ("VERSION", "TOOLS")
_CONSTANTS = (*_REQUIRED, "CODE_COUNTS")
_INSTALLED = ("site-packages", "dist-packages")  # where everything lies beside everything
_IGNORED = {".pyc", ".pyi", ".md"}
_C = {".c", ".cuh", ".h", ".inc"}
_C_COMMENT = re.compile(rb"//[^\n]*|/\*.*?\*/", re.DOTALL)  # our kernels hold no string with either in it
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BESIDE = ast.dump(ast.parse("Path(__file__).parent", mode="eval").body)


@dataclass(frozen=True)
class Declaration:
    """A step module's constants, the digest of its code, and the modules that this is made of."""

    version: int
    tools: tuple[str, ...]
    digest: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """One file: `imports` are names of modules, or of what is in them; `data` are paths relative to its folder."""

    path: Path
    digest: str
    constants: Mapping[str, Any]
    imports: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


_KIND = "source-1"  # of memories in the index; another number where `_facts` finds other things


class Sources:
    """Source files as they are now; each is read once, and remembered in the index by its stat."""

    def __init__(self, index: Index | None = None) -> None:
        self._index = index
        self._modules: dict[tuple[Path, str], _Source | None] = {}
        self._files: dict[Path, _Source] = {}

    def read(self) -> list[Path]:
        """The files that have been read so far."""
        return [*self._files]

    def declaration(self, module: str, entry: str = "") -> Declaration:
        """What the step module declares, and the digest of its code, that of `entry` (`module:function`) included.

        A module with `CODE_COUNTS = False` counts alone, without what it imports. Raises MlcBuildError when a module
        is missing, cannot be parsed, or lacks a constant.
        """
        own = self._module(module, folder_of(module))
        if own is None or own.path.name == "__init__.py":
            raise MlcBuildError(f"{module}: a step is a module, not a package")
        missing = [name for name in _REQUIRED if name not in own.constants]
        if missing:
            raise MlcBuildError(f"{own.path}: a step module declares {', '.join(missing)} as a plain literal")
        counted = {module: own}
        if own.constants.get("CODE_COUNTS", True):
            counted = self._reached(filter(None, (module, entry.partition(":")[0])), module)
        if entry and entry.partition(":")[0] not in counted:
            raise MlcBuildError(f"{entry}: its code lies where {module} cannot count it: put both into one package")
        digests = {name: source.digest for name, source in counted.items()}
        for name, source in counted.items():
            digests |= {f"{name}/{file}": each.digest for file, each in self._beside(source)}
        version, tools = own.constants["VERSION"], tuple(own.constants["TOOLS"])
        digest = digest_json({"version": version, "entry": entry, "files": digests})
        return Declaration(version, tools, digest, tuple(sorted(digests)))

    def _reached(self, names: Iterable[str], step: str) -> dict[str, _Source]:
        """The modules with these names and all that they import, packages that they lie in included."""
        found: dict[str, _Source] = {}
        waiting, seen = [*names], set[str]()
        while waiting:
            parts = waiting.pop().split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                folder = _folder(name, step)
                if name in MACHINERY or folder is None:
                    break
                if name not in seen:
                    seen.add(name)
                    source = self._module(name, folder)
                    if source is not None and name != _PROGRAM:  # which holds the version, and nothing that runs
                        found[name] = source
                        waiting += source.imports
                if name in found and found[name].path.name != "__init__.py":
                    break  # what follows is a name in a module
        return found

    def _module(self, name: str, folder: Path) -> _Source | None:
        """The module's file; None for a folder without one, and for what is no module."""
        key = (folder, name)
        if key not in self._modules:
            place = folder / name.replace(".", "/")
            files = (place.with_name(f"{place.name}.py"), place / "__init__.py")
            path = next((file for file in files if file.is_file()), None)
            self._modules[key] = self._read(path, name) if path is not None else None
        return self._modules[key]

    def _beside(self, source: _Source) -> Iterator[tuple[str, _Source]]:
        for name in source.data:
            top = source.path.parent / name
            for file in [top] if top.is_file() else sorted(top.rglob("*")):
                if file.is_file() and file.suffix not in _IGNORED and file.name != "py.typed":
                    yield file.relative_to(source.path.parent).as_posix(), self._read(file)

    def _read(self, path: Path, module: str = "") -> _Source:
        if path not in self._files:
            stat = path.stat()
            known = self._index.get(_KIND, path, stat) if self._index else None
            facts = json.loads(known) if known is not None else _facts(path, module)
            if self._index and known is None:
                self._index.put(_KIND, path, stat, json.dumps(facts))
            self._files[path] = _Source(path, **facts)
        return self._files[path]


def declaration(module: str, index: Index | None = None, entry: str = "") -> Declaration:
    """`Sources.declaration` of the files as they are at this moment."""
    return Sources(index).declaration(module, entry)


def toolchain(distributions: Iterable[str]) -> dict[str, str]:
    """The installed version of each distribution, by name. Raises MlcBuildError for one that is not installed."""
    return {name: _version(name) for name in sorted(distributions)}


def normalised(source: str) -> str:
    """A spelling of the program that changes only when the program does, the same for every Python version.

    Raises SyntaxError.
    """
    return _spell(ast.parse(source))


def folder_of(module: str) -> Path:
    """The folder from which a step module is imported. Raises MlcBuildError for one that is not there."""
    relative = module.replace(".", "/")
    for folder in [_ROOT, *(Path(entry) for entry in sys.path)]:
        if (folder / f"{relative}.py").is_file() or (folder / relative).is_dir():
            return folder
    raise MlcBuildError(f"{module}: no such module (declared as a step)")


def _folder(name: str, step: str) -> Path | None:
    """Where a module that a step reaches would lie; None where that is another distribution."""
    top = name.partition(".")[0]
    if top == _PROGRAM:
        return _ROOT
    if step.partition(".")[0] == _PROGRAM:
        return None
    folder = folder_of(step)
    return folder if top == step.partition(".")[0] or folder.name not in _INSTALLED else None


def _facts(path: Path, module: str) -> dict[str, Any]:
    """What `_Source` says of a file, but for its path."""
    content = path.read_bytes()
    if path.suffix in _C:
        lines = [line.rstrip() for line in _C_COMMENT.sub(b"", content).splitlines()]
        content = b"\n".join(filter(None, lines))
    if path.suffix != ".py":
        return {"digest": hashlib.sha256(content).hexdigest(), "constants": {}}
    try:
        tree = ast.parse(content)
    except SyntaxError as error:
        raise MlcBuildError(f"{path}, line {error.lineno}: {error.msg}") from None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    nodes = [*_running(tree)]
    inner = {node.left for node in nodes if isinstance(node, ast.BinOp)}  # of `a / "b" / "c"` the first part
    return {
        "digest": hashlib.sha256(_spell(tree).encode()).hexdigest(),
        "constants": _constants(tree),
        "imports": sorted({name for node in nodes for name in _imported(node, package)}),
        "data": sorted({name for node in nodes if node not in inner and (name := _named_beside(node)) is not None}),
    }


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a program but those under `if TYPE_CHECKING:`, which never run."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        only_checked = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        waiting += node.orelse if isinstance(node, ast.If) and only_checked else ast.iter_child_nodes(node)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
        yield from (f"{origin}.{alias.name}" for alias in node.names)


def _named_beside(node: ast.AST) -> str | None:
    """`kernels/group.c` for `Path(__file__).parent / "kernels" / "group.c"`."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.right, ast.Constant):
        return None
    before = "" if ast.dump(node.left) == _BESIDE else _named_beside(node.left)
    name = node.right.value
    return f"{before}/{name}".lstrip("/") if before is not None and isinstance(name, str) else None


def _constants(tree: ast.Module) -> dict[str, Any]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in _CONSTANTS:
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


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise MlcBuildError(f"{name} is not installed: pip install {name}") from None
