"""The `name=value` words of doit's command line, and the environment variables that stand in for them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.select import Selection

_SELECTING = ("recipe", "model", "quantization", "target", "changed")
_SWITCHES = {"1": True, "0": False, None: False}


def _text(name: str, text: str | None) -> str | None:
    return text or None


def _path(name: str, text: str | None) -> Path | None:
    return Path(text) if text else None


def _switch(name: str, text: str | None) -> bool:
    if text not in _SWITCHES:
        raise MlcBuildError(f"{name}={text}: expected {name}=1 or {name}=0")
    return _SWITCHES[text]


def _cores(name: str, text: str | None) -> int | None:
    if text and (not text.isdigit() or not int(text)):
        raise MlcBuildError(f"{name}={text}: expected how many cores the steps may use together, 1 or more")
    return int(text) if text else None


def _memory(name: str, text: str | None) -> int | None:
    if not text:
        return None
    from mlcbuild.cache.gc import parse_size

    try:
        size = parse_size(text)
    except MlcBuildError as error:
        raise MlcBuildError(f"{name}={text}: {error}") from None
    if not size:
        raise MlcBuildError(f"{name}={text}: expected how much memory the steps may use together, like 24G")
    return size


def _read_by(read: Callable[[str, str | None], object], environment: str = "") -> dict[str, Any]:
    """How the text of a variable is read, and the environment variable that stands in for it."""
    return {"read": read, "environment": environment}


@dataclass(frozen=True)
class Variables:
    """All of them but those that select recipes, in the order of docs/building.md."""

    selection: Selection
    cache: Path | None = field(metadata=_read_by(_path, "MLCBUILD_CACHE"))
    debug_dump: Path | None = field(metadata=_read_by(_path, "MLCBUILD_DEBUG_DUMP"))
    log_json: Path | None = field(metadata=_read_by(_path, "MLCBUILD_LOG_JSON"))
    report: Path | None = field(metadata=_read_by(_path, "MLCBUILD_REPORT"))
    summary: Path | None = field(metadata=_read_by(_path, "MLCBUILD_SUMMARY"))
    strict: bool = field(metadata=_read_by(_switch))
    locked: bool = field(metadata=_read_by(_switch))
    remote: str | None = field(metadata=_read_by(_text, "MLCBUILD_REMOTE"))  # a URL
    remote_write: bool = field(metadata=_read_by(_switch, "MLCBUILD_REMOTE_WRITE"))
    cores: int | None = field(metadata=_read_by(_cores, "MLCBUILD_CORES"))
    memory: int | None = field(metadata=_read_by(_memory, "MLCBUILD_MEMORY"))  # bytes
    scheduler: str | None = field(metadata=_read_by(_text, "MLCBUILD_SCHEDULER"))  # of a Dask cluster: tcp://host:8786
    namespace: str | None = field(metadata=_read_by(_text, "MLCBUILD_NAMESPACE"))  # on the hub: a user or group
    libraries: str | None = field(metadata=_read_by(_text))
    upload: bool = field(metadata=_read_by(_switch))
    private: bool = field(metadata=_read_by(_switch))


_READ = {each.name: each.metadata for each in fields(Variables) if each.metadata}
NAMES = (*_SELECTING, *_READ)


def read_variables(given: Mapping[str, str], where: Path, tasks: Selection | None = None) -> Variables:
    """The variables that mlcbuild knows; relative paths are relative to `where`, the folder that doit was called in.

    `tasks` is what the other words select. MLCBUILD_CACHE and the like in the environment stand in for the variables of
    that name. Raises MlcBuildError for an unknown name (or doit would build everything), for a switch that is neither 0
    nor 1, and for what is no number.
    """
    for name in given:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            hint = f": did you mean {close[0]}=?" if close else ""
            raise MlcBuildError(f"unknown variable {name}={hint} Known are {', '.join(NAMES)}")
    values: dict[str, Any] = {}
    for name, how in _READ.items():
        values[name] = how["read"](name, given[name] if name in given else os.environ.get(how["environment"]) or None)
        if isinstance(values[name], Path):
            values[name] = (where / values[name]).absolute()
    if values["remote"] is not None and "://" not in values["remote"]:
        values["remote"] = f"file://{(where / values['remote']).absolute()}"
    if values["remote"]:
        from urllib.parse import urlsplit

        try:
            urlsplit(values["remote"])
        except ValueError as error:
            raise MlcBuildError(f"remote=: {error}: expected an address (s3://bucket/folder) or a folder") from None
    if values["scheduler"] and not (values["remote"] and values["remote_write"]):
        raise MlcBuildError(
            f"scheduler={values['scheduler']}: workers and this machine exchange files through the shared cache, so it "
            "needs remote=URL and remote_write=1"
        )
    selecting: dict[str, Any] = {name: given[name] for name in _SELECTING if name in given}
    return Variables(replace(tasks or Selection(), strict=values["strict"], **selecting), **values)


def read_patience(name: str = "MLCBUILD_REMOTE_TIMEOUT", default: str = "20") -> float:
    """Seconds that the shared cache, or a scheduler, has for an answer. Raises MlcBuildError."""
    text = os.environ.get(name) or default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise MlcBuildError(f"{name}={text}: expected a number of seconds")
    return seconds
