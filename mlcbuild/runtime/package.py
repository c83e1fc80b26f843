"""Which files make up a package: one weights folder, one library, one mlc-chat-config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.weights import INDEX_NAMES

CONFIG_NAME = "mlc-chat-config.json"
LOADABLE = (".so", ".dylib", ".dll")
OTHER_LIBRARIES = (".tar", ".wasm")  # linked into an app, or run by a browser


@dataclass(frozen=True)
class PackageFiles:
    weights: Path
    library: Path
    config: Mapping[str, Any]  # mlc-chat-config.json; empty where a weights folder has none


def find(folder: Path, library: Path | None = None) -> PackageFiles:
    """The files of a package folder (`dist/<recipe>`), or of a weights folder with `library` beside it or given.

    Raises MlcBuildError, with the candidates, where there is no or more than one weights folder or library.
    """
    if not folder.is_dir():
        raise MlcBuildError(f"{folder}: no such folder; build the recipe first, or name a package or weights folder")
    weights = find_weights(folder)
    package = folder if weights != folder else folder.resolve().parent
    return PackageFiles(weights, _library(package, weights, library), read_config(weights))


def find_weights(folder: Path) -> Path:
    """`folder` itself if it holds weights, else the one folder in it that does."""
    if _is_weights(folder):
        return folder
    found = sorted(path for path in folder.iterdir() if path.is_dir() and _is_weights(path))
    if not found:
        raise MlcBuildError(
            f"{folder}: no weights here: expected a folder <model>-<quantization>-MLC with {INDEX_NAMES[0]}"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise MlcBuildError(f"{folder}: several weights folders ({names}); name one, and its library")
    return found[0]


def read_config(weights: Path) -> Mapping[str, Any]:
    """mlc-chat-config.json of a weights folder, or an empty mapping."""
    path = weights / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MlcBuildError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise MlcBuildError(f"{path}: expected a JSON object")
    return config


def _is_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in INDEX_NAMES)


def _library(package: Path, weights: Path, named: Path | None) -> Path:
    if named is not None:
        if not named.is_file():
            raise MlcBuildError(f"{named}: no such library")
        if named.suffix not in LOADABLE:
            raise MlcBuildError(f"{named}: not a library that can be loaded here ({', '.join(LOADABLE)})")
        return named
    files = sorted(path for path in package.iterdir() if path.is_file())
    found = [path for path in files if path.suffix in LOADABLE]
    # Beside a weights folder that was named there may be other models' libraries.
    stem = weights.name.removesuffix("MLC")
    found = [path for path in found if path.name.startswith(stem)] or found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise MlcBuildError(f"{package}: several libraries ({names}); choose one with library=PATH")
    others = [path.name for path in files if path.suffix in OTHER_LIBRARIES]
    if others:
        raise MlcBuildError(
            f"{package}: {', '.join(others)} cannot be loaded here: it is for another kind of runtime. "
            "Run these weights on this machine with library=PATH of the cpu target's library"
        )
    raise MlcBuildError(f"{package}: no library here ({', '.join(LOADABLE)}); name one with library=PATH")
