"""The `name=value` words of doit's command line, and the environment variables that stand in for them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.select import Selection

_SELECTING = ("recipe", "model", "quantization", "target", "changed")
_SWITCHES = {"1": True, "0": False, None: False}


@dataclass(frozen=True)
class Variables:
    selection: Selection
    cache: Path | None
    debug_dump: Path | None
    log_json: Path | None
    report: Path | None
    summary: Path | None
    locked: bool
    remote: str | None  # a URL
    remote_write: bool
    cores: int | None
    memory: int | None  # bytes
    scheduler: str | None  # of a Dask cluster: an address such as tcp://host:8786
    namespace: str | None  # of the hub: a user or an organisation
    libraries: str | None
    upload: bool
    private: bool


def read_variables(given: Mapping[str, str], where: Path, tasks: Selection | None = None) -> Variables:
    """The variables that mlcbuild knows; relative paths are relative to `where`, the folder that doit was called in.

    `tasks` is what the other words select. MLCBUILD_CACHE and the like in the environment stand in for the variables of
    that name. Raises MlcBuildError for an unknown name (or doit would build everything), for a switch that is neither 0
    nor 1, and for what is no number.
    """
    for name in given:
        if name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, n=1)
            hint = f": did you mean {close[0]}=?" if close else ""
            raise MlcBuildError(f"unknown variable {name}={hint} Known are {', '.join(VARIABLES)}")
    values: dict[str, Any] = {}
    for name, (variable, read) in VARIABLES.items():
        values[name] = read(name, given[name] if name in given else os.environ.get(variable) or None)
        if isinstance(values[name], Path):
            values[name] = (where / values[name]).absolute()
    if values["remote"] is not None and "://" not in values["remote"]:
        values["remote"] = f"file://{(where / values['remote']).absolute()}"
    if values["scheduler"] and not (values["remote"] and values["remote_write"]):
        raise MlcBuildError(
            f"scheduler={values['scheduler']}: workers and this machine exchange files through the shared cache, so it "
            "needs remote=URL and remote_write=1"
        )
    selecting = {name: values.pop(name) for name in (*_SELECTING, "strict")}
    return Variables(replace(tasks or Selection(), **selecting), **values)


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


def _word(name: str, text: str | None) -> str | None:
    return text


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


# name: the environment variable that stands in for it, and how its text is read
VARIABLES: dict[str, tuple[str, Callable[[str, str | None], object]]] = {
    **dict.fromkeys(_SELECTING, ("", _word)),  # an empty one is refused where recipes are chosen
    "cache": ("MLCBUILD_CACHE", _path),
    "debug_dump": ("MLCBUILD_DEBUG_DUMP", _path),
    "log_json": ("MLCBUILD_LOG_JSON", _path),
    "report": ("MLCBUILD_REPORT", _path),
    "summary": ("MLCBUILD_SUMMARY", _path),
    "strict": ("", _switch),
    "locked": ("", _switch),
    "remote": ("MLCBUILD_REMOTE", _text),
    "remote_write": ("MLCBUILD_REMOTE_WRITE", _switch),
    "cores": ("MLCBUILD_CORES", _cores),
    "memory": ("MLCBUILD_MEMORY", _memory),
    "scheduler": ("MLCBUILD_SCHEDULER", _text),
    "namespace": ("MLCBUILD_NAMESPACE", _text),
    "libraries": ("", _text),
    "upload": ("", _switch),
    "private": ("", _switch),
}
