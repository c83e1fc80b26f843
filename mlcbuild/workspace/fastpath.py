"""Recipes that were found up to date, remembered together with the stat of everything that this depended on.

A verdict "up to date" follows from the workspace's files, the program, the tools, the checkpoints, the cache's entries
and blobs, and dist/. While none of these has another stat than when the verdict was reached, reaching it again would
give the same: what is skipped is the work, not the question. Whatever differs is looked at in full.

A file that was written to so lately that a further write could leave its stat alone is never relied on: what depends on
it is not remembered (as git does with its index). Deleting the file of memories costs one slower build.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlcbuild
from mlcbuild.cache.index import signature
from mlcbuild.cache.materialise import BLOB_TIME
from mlcbuild.compiler.targets import cpu_flags
from mlcbuild.recipes.files import stock
from mlcbuild.recipes.select import Cell, cells, manual

if TYPE_CHECKING:  # loading these takes longer than recalling
    from mlcbuild.cache.store import Action
    from mlcbuild.workspace.session import Session

_FORMAT = 3  # raise it when memories are written differently
_SETTLED = 0.02  # seconds: more than a tick of a file system's clock
_USED = 3600.0  # an entry's last use is kept to the hour, as the store does
_PROGRAM = Path(mlcbuild.__file__).parent
_stat = os.stat  # of strings: ten thousand Paths would take longer than all the questions that are asked of them


@dataclass
class Memory:
    """What is remembered of one workspace with one cache. Steps are named by their keys."""

    store: Path
    dist: Path
    tools: Mapping[str, str]
    world: Mapping[str, str]  # path -> signature: the workspace's YAML files and the program
    recipes: Mapping[str, Cell]
    manual: Sequence[str]
    unavailable: Mapping[str, str]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    goals: dict[str, dict[str, Any]] = field(default_factory=dict)

    def hold(self, names: Iterable[str]) -> bool:
        """Whether all these recipes are known to be up to date, and nothing that this rests on has changed."""
        try:
            installing = {entry.name for entry in os.scandir(self.dist)}
        except OSError:
            return False
        now, sound = time.time(), set[str]()
        for name in names:
            goal = self.goals.get(name)
            if goal is None or f".new-{name}" in installing or not self._is_installed(name, goal):
                return False
            for key in goal["steps"]:
                if key not in sound:
                    if not self._is_whole(key, now):
                        return False
                    sound.add(key)
        return True

    def step_names(self, recipes: Iterable[str]) -> list[str]:
        """The tasks of everything that these recipes need, each once."""
        return list(dict.fromkeys(self.steps[key]["name"] for name in recipes for key in self.goals[name]["steps"]))

    def _is_installed(self, name: str, goal: Mapping[str, Any]) -> bool:
        folder = f"{self.dist}/{name}/"
        try:
            for file, known in goal["stats"].items():
                if signature(os.lstat(folder + file)) != known:
                    return False
            for file, size in goal["files"].items():
                status = os.lstat(folder + file)
                if status.st_size != size or status.st_mtime != BLOB_TIME:
                    return False
        except OSError:
            return False
        return True

    def _is_whole(self, key: str, now: float) -> bool:
        step = self.steps[key]
        blobs = f"{self.store}/cas/"
        try:
            entry = f"{self.store}/ac/{key[:2]}/{key}.json"
            status = _stat(entry)
            if [status.st_size, status.st_ino] != step["entry"]:
                return False
            for digest, size in step["blobs"].items():
                found = _stat(f"{blobs}{digest[:2]}/{digest}")
                if found.st_size != size or found.st_mtime != BLOB_TIME:
                    return False
            for path, known in step["stats"].items():
                if signature(_stat(path)) != known:
                    return False
        except OSError:
            return False
        if now - status.st_mtime > _USED:
            with contextlib.suppress(OSError):  # a cache that is only read is fine
                os.utime(entry)
        return True


def recall(root: Path, store: Path) -> Memory | None:
    """What is remembered of the workspace at `root`; None where its recipes, the program or a tool has changed."""
    try:
        seal, _, body = _file(root, store).read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != seal:
            return None
        data = json.loads(body)
        if data["head"] != _head(root, data["tools"]):
            return None
        if any(_signature(path) != known for path, known in data["world"].items()):
            return None
        recipes = {name: (model, quant, target) for name, (model, quant, target) in data["recipes"].items()}
        return Memory(
            store,
            root / "dist",
            data["tools"],
            data["world"],
            recipes,
            data["manual"],
            data["unavailable"],
            data["steps"],
            data["goals"],
        )
    except (OSError, ImportError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(session: Session, began: float) -> None:
    """Note which recipes of the session are up to date. `began`: the time before the workspace was read.

    Nothing is noted where something changed meanwhile, and nothing is said where the memory cannot be written.
    """
    _wait_until_settled(session.dist)
    now = time.time()
    root, store = session.root, session.store
    world = {str(path): _signature(str(path)) for path in _world(root, session)}
    if not all(_is_settled(path, began) for path in world):
        return
    tools: dict[str, str] = {}
    for step in session.graph.steps.values():
        tools |= session.lookup.versions(step)
    memory = recall(root, store.root)
    if memory is None or memory.world != world:
        recipes = session.catalog.recipes
        memory = Memory(store.root, session.dist, tools, world, cells(recipes), manual(recipes), {})
    memory.tools = {**memory.tools, **tools}
    memory.unavailable = {**memory.unavailable, **session.graph.unavailable}
    known: dict[str, dict[str, Any] | None] = {}
    for name, goal in session.graph.goals.items():
        memory.goals.pop(name, None)
        needed = session.graph.closure(goal.steps.values())
        actions = [session.lookup.known(task) for task in needed]
        for task, action in zip(needed, actions, strict=True):
            if action is not None and action.key not in known:
                known[action.key] = _step(session, task, action, began)
        keys = [action.key for action in actions if action is not None and known[action.key] is not None]
        facts = _goal(session.dist / name, now) if len(keys) == len(needed) and session.is_installed(name) else None
        if facts is not None:
            memory.goals[name] = {"steps": keys, **facts}
    memory.steps |= {key: step for key, step in known.items() if step is not None}
    used = {key for each in memory.goals.values() for key in each["steps"]}
    content = {
        "head": _head(root, memory.tools),
        "tools": memory.tools,
        "world": memory.world,
        "recipes": memory.recipes,
        "manual": memory.manual,
        "unavailable": memory.unavailable,
        "steps": {key: step for key, step in memory.steps.items() if key in used},
        "goals": memory.goals,
    }
    body = json.dumps(content, separators=(",", ":"))
    with contextlib.suppress(OSError):
        store.write(_file(root, store.root), f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode())


def _step(session: Session, name: str, action: Action, began: float) -> dict[str, Any] | None:
    """The stats that the step's being up to date rests on; None where they are not to be relied on."""
    store = session.store
    outside = [item.path for item in session.graph.steps[name].inputs if item.path is not None]
    paths = {str(path) for top in outside for path in _inside(top)}
    blobs = {}
    for entry in action.tree.files.values():
        if store.owns(entry.path):
            blobs[entry.digest] = entry.size
        else:
            paths |= {str(entry.path), f"{store.blob_path(entry.digest)}.at"}
    try:
        status = _stat(store.root / "ac" / action.key[:2] / f"{action.key}.json")
        stats = {path: signature(_stat(path)) for path in sorted(paths)}
    except OSError:
        return None
    if not all(_is_settled(path, began) or path.endswith(".at") for path in paths):
        return None
    return {"name": name, "entry": [status.st_size, status.st_ino], "blobs": blobs, "stats": stats}


def _goal(folder: Path, now: float) -> dict[str, Any] | None:
    """The stats of a package that was just found whole; None where they are not to be relied on."""
    stats, files = {}, {}
    for parent, _, names in os.walk(folder):
        for name in ["", *names]:
            path = Path(parent, name)
            status = path.lstat()
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISDIR(status.st_mode) or relative == "manifest.json":
                if max(status.st_mtime, status.st_ctime) > now - _SETTLED:
                    return None
                stats[relative] = signature(status)
            elif status.st_mtime == BLOB_TIME:
                files[relative] = status.st_size
            else:
                return None  # its content was hashed; the next time it has to be hashed again
    return {"stats": stats, "files": files}


def _head(root: Path, tools: Mapping[str, str]) -> list[Any]:
    """What a verdict depends on besides files; `tools` with their versions of now."""
    flags = hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in sorted(tools)}
    machine = [sys.version, platform.machine(), flags, os.environ.get("PATH", "")]
    return [_FORMAT, mlcbuild.__version__, str(root), *machine, versions]


def _world(root: Path, session: Session) -> Iterator[Path]:
    """Every file that decides what the recipes are and what is planned for them, and the folders that they are in."""
    yield root / "dodo.py"
    yield root / "recipes" / "recipes.lock"
    for recipes in dict.fromkeys((root / "recipes", stock().recipes)):
        yield recipes
        for folder in sorted(entry for entry in recipes.iterdir() if entry.is_dir()):
            yield folder
            yield from _yaml(folder)
        yield from _yaml(recipes)
    yield from _sources(stock().schema)
    yield from _sources(_PROGRAM)
    for module in dict.fromkeys(step.module for step in session.graph.steps.values()):
        if not module.startswith(f"{_PROGRAM.name}."):
            place = _folder_of(module)
            if place is not None:
                yield from _sources(place)


def _yaml(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))


def _sources(top: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(top):
        folders[:] = sorted(folder for folder in folders if folder != "__pycache__")
        yield Path(parent)
        yield from (Path(parent, name) for name in sorted(names) if not name.endswith(".pyc"))


def _folder_of(module: str) -> Path | None:
    """Where the file of a step lies that is not the program's own."""
    relative = Path(*module.split(".")).with_suffix(".py")
    places = [Path(entry) for entry in (str(_PROGRAM.parent), *sys.path)]
    return next(((place / relative).parent for place in places if (place / relative).is_file()), None)


def _inside(path: Path) -> Sequence[Path]:
    """A file, or a folder with the files directly in it: what an input outside the cache is."""
    if not path.is_dir():
        return [path]
    return [path, *sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_file())]


def _signature(path: str) -> str:
    try:
        return signature(_stat(path))
    except OSError:
        return ""


def _is_settled(path: str, since: float) -> bool:
    """Whether the file was last written to long enough before `since`. A missing one is."""
    try:
        status = _stat(path)
    except OSError:
        return True
    return max(status.st_mtime, status.st_ctime) < since - _SETTLED


def _wait_until_settled(folder: Path) -> None:
    """Wait a moment after the last package was put into `folder`: else all are looked at in full the next time."""
    try:
        status = _stat(folder)
    except OSError:
        return
    left = max(status.st_mtime, status.st_ctime) + _SETTLED - time.time()
    if 0 < left <= _SETTLED:
        time.sleep(left)


def _file(root: Path, store: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return store / "unchanged" / f"{name}.json"
