"""Events as JSON lines in a file, for machines."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.reporting.events import Event, Report, to_json


def json_log(path: Path) -> Report:
    """A report that appends one line per event, with `time` (seconds since 1970) in front.

    Each line is one write, so that several processes may share the file. Raises MlcBuildError when it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise MlcBuildError(f"{path}: the log cannot be written: {error.strerror}") from None

    def report(event: Event) -> None:
        line = json.dumps({"time": round(time.time(), 3), **to_json(event)})
        os.write(descriptor, line.encode() + b"\n")

    return report
