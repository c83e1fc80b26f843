"""What garbage collection must not take: pinned actions, and those behind installed packages.

A pin (`mlcbuild pin`) has the recipe's actions as they were then. The record of an installed package has its folder,
the digest of its manifest and its actions. It counts while the folder holds that very manifest, so that every
workspace that shares the cache is heard, and a removed package lets go by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.cache.disk import room_in
from mlcbuild.cache.layout import is_absent, package_path, pin_path
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import canonical
from mlcbuild.errors import CLOSED, MlcBuildError
from mlcbuild.regular import read_regular

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Hold:
    """`keys` of actions that stay, with their blobs, and digests of blobs that stay."""

    reason: str  # pin | dist
    name: str
    keys: frozenset[str]
    blobs: frozenset[str] = frozenset()


def pin(store: Store, workspace: Path, recipe: str, keys: Iterable[str]) -> None:
    """Keep these actions until `unpin`. A pin of this recipe that was there before is replaced."""
    record = {"recipe": recipe, "workspace": str(workspace), "keys": sorted(keys)}
    with room_in(store.root):
        store.write(_pin_path(store.root, workspace, recipe), canonical(record))


def unpin(store: Store, workspace: Path, recipe: str) -> None:
    """Let go. Raises MlcBuildError when the recipe is not pinned."""
    try:
        with room_in(store.root):
            _pin_path(store.root, workspace, recipe).unlink()
    except FileNotFoundError:
        names = ", ".join(sorted(pinned(store.root, workspace))) or "nothing"
        raise MlcBuildError(f"{recipe} is not pinned; pinned here: {names}") from None


def pinned(root: Path, workspace: Path) -> dict[str, Hold]:
    """The pins of one workspace, by recipe."""
    return {
        hold.name: hold for hold in map(_pin, _matching(pin_path(root, "*", _short(workspace)))) if hold is not None
    }


def hold_package(store: Store, folder: Path, keys: Iterable[str]) -> None:
    """Note that these actions are behind the package that is installed in `folder`.

    A cache that may only be read is not told: who may write to it has the say of what it keeps.
    """
    path = package_path(store.root, _short(folder))
    record = {"folder": str(folder), "manifest": _digest(folder / MANIFEST), "keys": sorted(keys)}
    content = canonical(record)
    with contextlib.suppress(OSError):
        if read_regular(path) == content:
            return
    try:
        store.write(path, content)
    except OSError as error:
        if error.errno not in CLOSED:
            raise


def holds(root: Path) -> list[Hold]:
    """All pins, and the packages that are still installed. Records of folders that are gone are removed."""
    found = [hold for hold in map(_pin, _matching(pin_path(root, "*", "*"))) if hold is not None]
    for path in _matching(package_path(root, "*")):
        record = _read(path)
        try:
            folder, manifest, keys = Path(record["folder"]), record["manifest"], frozenset(map(str, record["keys"]))
            if _digest(folder / MANIFEST) == manifest:
                found.append(Hold("dist", str(folder), keys))
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:  # another user's, or a disk that is not there today
            found.append(Hold("dist", str(folder), keys))
        except (KeyError, TypeError):
            continue
    return found


def installed(dist: Path) -> Iterator[Hold]:
    """The packages in a workspace's dist/, by what their manifests say."""
    for path in sorted(dist.glob(f"*/{MANIFEST}")):
        record = _read(path)
        try:
            keys = frozenset(str(step["key"]) for step in record["steps"].values())
            blobs = frozenset(str(file["sha256"]) for file in record["files"].values())
        except (KeyError, TypeError, AttributeError):
            continue
        yield Hold("dist", str(path.parent), keys, blobs)


def _pin(path: Path) -> Hold | None:
    record = _read(path)
    try:
        return Hold("pin", str(record["recipe"]), frozenset(map(str, record["keys"])))
    except (KeyError, TypeError):
        return None


def _pin_path(root: Path, workspace: Path, recipe: str) -> Path:
    return pin_path(root, recipe, _short(workspace))


def _matching(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name))


def _short(path: Path) -> str:
    return hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(read_regular(path)).hexdigest()


def _read(path: Path) -> Any:
    try:
        return json.loads(read_regular(path))
    except OSError as error:
        if not is_absent(error):
            raise  # what it holds must not go because a disk fails
        return None
    except ValueError:
        return None
