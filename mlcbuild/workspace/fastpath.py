"""The fast path: recipes that were found up to date, remembered with the stamp of everything that this rests on.

"Up to date" follows from the program, the workspace's files, the tools, the checkpoints, the cache's entries and blobs,
and dist/. While none of these has another stamp than when it was found, finding it again would give the same: what is
skipped is the work, not the question. Whatever differs is looked at in full.

A stamp is what a stat must still be: a blob's size (its time is the store's), an action entry's size and inode (its
time is that of its last use), any other file's or folder's `signature`; "" for what is not there. A file that was
written to so lately that a further write could leave its stat alone is never relied on (as git does with its index):
its stamp is one that no file has. Deleting the file of memories costs one slower build.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlcbuild
from mlcbuild.cache import layout
from mlcbuild.cache.index import note_use, signature
from mlcbuild.cache.materialise import BLOB_TIME
from mlcbuild.compiler.targets import cpu_flags
from mlcbuild.recipes.files import stock
from mlcbuild.recipes.select import Cell, Selection, cells, manual
from mlcbuild.regular import read_regular

if TYPE_CHECKING:  # loading these takes longer than recalling
    from mlcbuild.cache.store import Store
    from mlcbuild.workspace.session import Session

Stamp = str | int | list[int]

_FORMAT = 5  # raise it when memories are written differently
_SETTLED = 0.02  # seconds: more than a tick of a file system's clock
_UNRELIABLE = "?"  # the stamp of what may have been written to again
_SEARCHING = ("PATH", "CUDA_HOME", "TVM_SOURCE_DIR")  # variables that say where compilers are looked for
_stat = os.stat  # of strings: ten thousand Paths would take longer than all the questions that are asked of them


@dataclass
class Memory:
    """What is remembered of one workspace with one cache."""

    world: Mapping[str, Stamp]  # the workspace's YAML files and the program
    contents: Mapping[str, str]  # sha256 of those that are files: one that was only touched is the same
    recipes: Mapping[str, Cell]
    manual: Sequence[str]
    unavailable: dict[str, str] = field(default_factory=dict)  # recipe -> what this machine lacks for it
    searched: Mapping[str, Stamp] = field(default_factory=dict)  # the folders where that would be
    tools: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # of steps that are not the program's own
    stamps: list[tuple[str, Stamp]] = field(default_factory=list)  # of paths, each pair once
    rests_on: dict[str, list[int]] = field(default_factory=dict)  # recipe -> places in `stamps`
    tasks: dict[str, list[str]] = field(default_factory=dict)  # recipe -> the tasks of everything that it needs

    def up_to_date(self, selection: Selection) -> tuple[list[str], list[str]] | None:
        """The selected recipes, and those among them that cannot be built here; None where a build has to look."""
        if selection.changed is not None:
            return None
        chosen = selection.chosen(self.recipes, self.manual)
        missing = [name for name in chosen if name in self.unavailable]
        names = [name for name in chosen if name not in self.unavailable]
        if selection.demanded(missing) or not self.holds(names):
            return None
        if missing and any(_stamp(path) != known for path, known in self.searched.items()):
            return None  # what was lacking may be there now
        return names, missing

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all these recipes are known to be up to date, and nothing that this rests on has changed."""
        try:
            needed = set().union(*(self.rests_on[name] for name in names))
        except KeyError:
            return False
        return all(_stamp(path, known) == known for path, known in (self.stamps[number] for number in needed))


def recall(root: Path, store: Path) -> Memory | None:
    """What is remembered of the workspace at `root`; None where its recipes, the program or a tool has changed."""
    try:
        seal, _, body = read_regular(_file(root, store)).partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != seal:
            return None
        data = json.loads(body)
        memory = Memory(**data["memory"])
        memory.recipes = {name: (model, quant, target) for name, (model, quant, target) in memory.recipes.items()}
        if data["head"] != _head(root, memory):
            return None
        if any(_stamp(path) != known and not _same(path, memory) for path, known in memory.world.items()):
            return None
        return memory
    except (OSError, ImportError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(session: Session, began: float) -> None:
    """Note which recipes of the session are up to date. `began`: the time before the workspace was read.

    Nothing is noted where something changed meanwhile, and nothing is said where the memory cannot be written.
    """
    _wait_until_settled(session.dist)
    now = time.time()
    root, store, graph = session.root, session.store, session.graph
    modules = {step.module for step in graph.steps.values() if not step.module.startswith(f"{_program().name}.")}
    foreign = (path for path in session.lookup.sources_read() if not path.is_relative_to(_program()))
    world = {str(path): _settled(str(path), began) for path in (*_world(root, modules), *foreign)}
    memory = recall(root, store.root)
    if memory is None or memory.world != world:
        contents = {path: digest for path, stamp in world.items() if (digest := _content(path, stamp))}
        memory = Memory(world, contents, cells(session.catalog.recipes), manual(session.catalog.recipes))
    memory.modules = sorted({*memory.modules, *modules})
    tools = {tool for step in graph.steps.values() for tool in session.lookup.versions(step)}
    memory.tools = sorted({*memory.tools, *tools})
    if graph.unavailable:
        folders = (*os.environ.get("PATH", "").split(os.pathsep), f"{os.environ.get('CUDA_HOME', '')}/bin", *sys.path)
        searched = {folder: _settled(folder, began) for folder in folders}
        older = memory.unavailable if memory.searched == searched else {}
        memory.unavailable, memory.searched = {**older, **graph.unavailable}, searched
    steps = {name: _step(session, name, began) for name in graph.steps}
    known: dict[str, list[tuple[str, Stamp]]] = {
        name: [memory.stamps[number] for number in places] for name, places in memory.rests_on.items()
    }
    for name in (*graph.goals, *graph.unavailable):
        known.pop(name, None)
    for name in graph.goals:
        memory.unavailable.pop(name, None)
        tasks = session.needed(name)
        rests_on = [steps[task] for task in tasks]
        if all(rests_on) and session.is_installed(name):
            memory.tasks[name] = tasks
            known[name] = [pair for each in (*rests_on, _package(session.dist, name, now)) for pair in each.items()]
    _write(root, store, memory, known)


def _write(root: Path, store: Store, memory: Memory, known: Mapping[str, list[tuple[str, Stamp]]]) -> None:
    """Write the memory, with what each recipe of `known` rests on; most of that several recipes share."""
    memory.stamps, memory.rests_on = [], {}
    places: dict[tuple[str, str], int] = {}
    for name, pairs in known.items():
        for path, stamp in pairs:
            if (path, str(stamp)) not in places:
                places[path, str(stamp)] = len(memory.stamps)
                memory.stamps.append((path, stamp))
        memory.rests_on[name] = sorted({places[path, str(stamp)] for path, stamp in pairs})
    memory.tasks = {name: memory.tasks[name] for name in known}
    body = json.dumps({"head": _head(root, memory), "memory": vars(memory)}, separators=(",", ":")).encode()
    with contextlib.suppress(OSError):
        store.write(_file(root, store.root), hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _step(session: Session, name: str, began: float) -> dict[str, Stamp]:
    """The stamps that the step's being up to date rests on; none where it is not."""
    store, action = session.store, session.lookup.known(name)
    if action is None:
        return {}
    outside = {str(path) for item in session.graph.steps[name].inputs if item.path for path in _inside(item.path)}
    entry = f"{store.root}/{layout.action_name(action.key)}"
    stamps = {entry: _stamp(entry, like=[])}
    for file in action.tree.files.values():
        if store.owns(file.path):
            stamps[f"{store.root}/{layout.blob_name(file.digest)}"] = file.size
        else:
            outside.add(str(file.path))
            record = f"{store.root}/{layout.borrowed_name(file.digest)}"
            stamps[record] = _stamp(record)
    stamps |= {path: _settled(path, began) for path in outside}
    return {} if "" in stamps.values() else stamps  # something is gone by now: it would be up to date while it is


def _package(dist: Path, recipe: str, now: float) -> dict[str, Stamp]:
    """The stamps of a package that was just found whole. A folder's is another where a file in it was replaced; a file
    that does not have the blobs' time was hashed, and has to be hashed again."""
    from mlcbuild.workspace.install import staging
    from mlcbuild.workspace.manifest import NAME

    stamps: dict[str, Stamp] = {str(staging(dist, recipe)): ""}
    for folder, _, names in os.walk(dist / recipe):
        stamps[folder] = _settled(folder, now)
        for name in names:
            stamps[f"{folder}/{name}"] = _stamp(f"{folder}/{name}", like=0)
    manifest = f"{dist}/{recipe}/{NAME}"
    return stamps | {manifest: _settled(manifest, now)}


def _stamp(path: str, like: Stamp = "") -> Stamp:
    """The path's stamp of now, of the same kind as `like`; "" where nothing is there, or a blob was written to."""
    try:
        status = _stat(path)
    except OSError:
        return ""
    if isinstance(like, int):
        return status.st_size if status.st_mtime == BLOB_TIME else ""
    if isinstance(like, list):
        note_use(path, status, time.time())
        return [status.st_size, status.st_ino]
    return signature(status)


def _same(path: str, memory: Memory) -> bool:
    """Whether a file with another stamp has the content that it had."""
    known = memory.contents.get(path)
    return known is not None and known == _content(path, _stamp(path))


def _content(path: str, stamp: Stamp) -> str:
    """sha256 of a file while it has this stamp; "" of what is no file, or had another one."""
    with contextlib.suppress(OSError):
        digest = hashlib.sha256(read_regular(Path(path))).hexdigest()
        return digest if _stamp(path) == stamp else ""
    return ""


def _settled(path: str, since: float) -> Stamp:
    """The path's stamp, if it was last written to long enough before `since`."""
    with contextlib.suppress(OSError):
        status = _stat(path)
        if max(status.st_mtime, status.st_ctime) >= since - _SETTLED:
            return _UNRELIABLE
    return _stamp(path)


def _head(root: Path, memory: Memory) -> list[Any]:
    """What "up to date" depends on besides files, as it is now. The program is known by its folder: another copy of
    the same version (`PYTHONPATH=clone`) may have been edited."""
    flags = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()
    machine = [sys.version, platform.machine(), flags, *map(os.environ.get, _SEARCHING)]
    tools = {name: importlib.metadata.version(name) for name in memory.tools}
    modules = {module: str(_folder_of(module)) for module in memory.modules}
    return [_FORMAT, mlcbuild.__version__, str(_program()), str(root), *machine, tools, modules]


def _program() -> Path:
    """The folder that mlcbuild was imported from."""
    return Path(mlcbuild.__file__).parent


def _world(root: Path, modules: Iterable[str]) -> Iterator[Path]:
    """Every file that decides what the recipes are and what is planned for them, and the folders that they are in."""
    yield root / "dodo.py"
    yield root / "recipes" / "recipes.lock"
    for recipes in dict.fromkeys((root / "recipes", stock().recipes)):
        for folder in (recipes, *sorted(entry for entry in recipes.iterdir() if entry.is_dir())):
            yield folder
            yield from sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    for top in {stock().schema, _program(), *filter(None, map(_folder_of, modules))}:
        yield from _sources(top)


def _sources(top: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(top):
        folders[:] = sorted(folder for folder in folders if folder != "__pycache__")
        yield Path(parent)
        yield from (Path(parent, name) for name in sorted(names) if not name.endswith(".pyc"))


def _folder_of(module: str) -> Path | None:
    """Where the file of a step lies that is not the program's own."""
    relative = Path(*module.split(".")).with_suffix(".py")
    places = [Path(entry) for entry in (str(_program().parent), *sys.path)]
    return next(((place / relative).parent for place in places if (place / relative).is_file()), None)


def _inside(path: Path) -> Sequence[Path]:
    """A file, or a folder with what is in it: what an input outside the cache is. Of subfolders a pattern may name one
    (`1_Pooling/config.json`), so all are looked at; linked ones are not, as no input reaches into them."""
    if not path.is_dir():
        return [path]
    found = [path]
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            found += _inside(entry)
        elif entry.is_file():
            found.append(entry)
    return found


def _wait_until_settled(folder: Path) -> None:
    """Wait a moment after the last package was put into `folder`: else all are looked at in full the next time."""
    with contextlib.suppress(OSError):
        status = _stat(folder)
        left = max(status.st_mtime, status.st_ctime) + _SETTLED - time.time()
        time.sleep(min(max(left, 0.0), _SETTLED))


def _file(root: Path, store: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return store / layout.UNCHANGED / f"{name}.json"
