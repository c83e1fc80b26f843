"""The `name=value` words of doit's command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.select import Wanted

_SELECTING = ("recipe", "model", "quantization", "target", "changed")
_NAMES = (
    *_SELECTING,
    "cache",
    "debug_dump",
    "log_json",
    "report",
    "summary",
    "strict",
    "locked",
    "remote",
    "remote_write",
    "cores",
    "memory",
    "scheduler",
    "namespace",
    "libraries",
    "upload",
    "private",
)
_SWITCHES = {"1": True, "0": False}


@dataclass(frozen=True)
class Variables:
    wanted: Wanted
    cache: Path | None
    debug_dump: Path | None
    log_json: Path | None
    report: Path | None
    summary: Path | None
    strict: bool
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


def read_variables(given: Mapping[str, str], where: Path) -> Variables:
    """The variables that mlcbuild knows; relative paths are relative to `where`, the folder that doit was called in.

    MLCBUILD_CACHE and the like in the environment stand in for the variables of that name. Raises MlcBuildError for an
    unknown name (or doit would build everything), for a switch that is neither 0 nor 1, and for what is no number.
    """
    for name in given:
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f": did you mean {close[0]}=?" if close else ""
            raise MlcBuildError(f"unknown variable {name}={hint} Known are {', '.join(_NAMES)}")

    def path(name: str, variable: str) -> Path | None:
        value = given.get(name) or os.environ.get(variable, "")
        return (where / value).absolute() if value else None

    remote, write = read_remote(given.get("remote"), where, given.get("remote_write"))
    return Variables(
        wanted=Wanted(**{name: given[name] for name in _SELECTING if name in given}),
        cache=path("cache", "MLCBUILD_CACHE"),
        debug_dump=path("debug_dump", "MLCBUILD_DEBUG_DUMP"),
        log_json=path("log_json", "MLCBUILD_LOG_JSON"),
        report=path("report", "MLCBUILD_REPORT"),
        summary=path("summary", "MLCBUILD_SUMMARY"),
        strict=_switch(given, "strict"),
        locked=_switch(given, "locked"),
        remote=remote,
        remote_write=write,
        cores=_cores(given.get("cores") or os.environ.get("MLCBUILD_CORES", "")),
        memory=_memory(given.get("memory") or os.environ.get("MLCBUILD_MEMORY", "")),
        scheduler=_scheduler(given.get("scheduler") or os.environ.get("MLCBUILD_SCHEDULER", ""), remote, write),
        namespace=given.get("namespace") or os.environ.get("MLCBUILD_NAMESPACE") or None,
        libraries=given.get("libraries") or None,
        upload=_switch(given, "upload"),
        private=_switch(given, "private"),
    )


def keeps_going(words: Sequence[str]) -> bool:
    """Whether a build with this command line goes on after a failure: unless it is told not to (`--no-continue`), or
    asks for one recipe or one step by its own name and is not told to (`--continue`)."""
    told = [word in ("--continue", "-c") for word in words if word in ("--continue", "-c", "--no-continue")]
    if told:
        return told[-1]
    recipes = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    tasks = [word for word in words if ":" in word and "=" not in word and not word.startswith("-")]
    named = recipes[-1:] or tasks
    return len(named) != 1 or bool(set(named[0]) & set(",*?["))


def on_cluster(words: Sequence[str]) -> bool:
    """Whether doit's command line, or the environment, names a scheduler."""
    return bool(os.environ.get("MLCBUILD_SCHEDULER")) or any(word.startswith("scheduler=") for word in words)


def read_remote(url: str | None, where: Path, write: str | None = None) -> tuple[str | None, bool]:
    """The shared cache's URL and whether this run may write there; a plain path is a folder.

    MLCBUILD_REMOTE and MLCBUILD_REMOTE_WRITE stand in for what is None. Raises MlcBuildError.
    """
    url = os.environ.get("MLCBUILD_REMOTE", "") if url is None else url
    if write is None:
        write = os.environ.get("MLCBUILD_REMOTE_WRITE") or "0"
    may = _switch({"remote_write": write}, "remote_write")
    if not url:
        return None, False
    return (url if "://" in url else f"file://{(where / url).absolute()}"), may


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


def _scheduler(address: str, remote: str | None, write: bool) -> str | None:
    if address and (remote is None or not write):
        raise MlcBuildError(
            f"scheduler={address}: workers and this machine exchange files through the shared cache, so it needs "
            "remote=URL and remote_write=1"
        )
    return address or None


def _cores(text: str) -> int | None:
    if text and (not text.isdigit() or not int(text)):
        raise MlcBuildError(f"cores={text}: expected how many cores the steps may use together, 1 or more")
    return int(text) if text else None


def _memory(text: str) -> int | None:
    if not text:
        return None
    from mlcbuild.cache.gc import parse_size

    try:
        size = parse_size(text)
    except MlcBuildError as error:
        raise MlcBuildError(f"memory={text}: {error}") from None
    if not size:
        raise MlcBuildError(f"memory={text}: expected how much memory the steps may use together, like 24G")
    return size


def _switch(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "0")
    if value not in _SWITCHES:
        raise MlcBuildError(f"{name}={value}: expected {name}=1 or {name}=0")
    return _SWITCHES[value]
