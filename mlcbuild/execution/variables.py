"""The `name=value` words of doit's command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.errors import MlcBuildError

_NAMES = ("recipe", "cache", "debug_dump", "log_json", "strict", "locked")
_SWITCHES = {"1": True, "0": False}


@dataclass(frozen=True)
class Variables:
    recipe: str | None  # names and globs, with commas; None: all
    cache: Path | None
    debug_dump: Path | None
    log_json: Path | None
    strict: bool
    locked: bool


def read_variables(given: Mapping[str, str], where: Path) -> Variables:
    """The variables that mlcbuild knows; relative paths are relative to `where`, the folder that doit was called in.

    MLCBUILD_CACHE and MLCBUILD_LOG_JSON in the environment stand in for `cache` and `log_json`. Raises MlcBuildError
    for an unknown name (or doit would build everything) and for a switch that is neither 0 nor 1.
    """
    for name in given:
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f": did you mean {close[0]}=?" if close else ""
            raise MlcBuildError(f"unknown variable {name}={hint} Known are {', '.join(_NAMES)}")

    def path(name: str, variable: str) -> Path | None:
        value = given.get(name) or os.environ.get(variable, "")
        return (where / value).absolute() if value else None

    return Variables(
        recipe=given.get("recipe"),
        cache=path("cache", "MLCBUILD_CACHE"),
        debug_dump=path("debug_dump", "MLCBUILD_DEBUG_DUMP"),
        log_json=path("log_json", "MLCBUILD_LOG_JSON"),
        strict=_switch(given, "strict"),
        locked=_switch(given, "locked"),
    )


def _switch(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "0")
    if value not in _SWITCHES:
        raise MlcBuildError(f"{name}={value}: expected {name}=1 or {name}=0")
    return _SWITCHES[value]
