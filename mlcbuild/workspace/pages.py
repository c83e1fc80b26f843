"""Reports written to files: HTML pages and Markdown summaries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.files import write_atomically
from mlcbuild.reporting.history import Run
from mlcbuild.reporting.html import html
from mlcbuild.reporting.summary import markdown

_RENDER = {".html": html, ".htm": html, ".md": markdown}


def write_report(path: Path, runs: Sequence[Run]) -> None:
    """The runs as a page of the kind that the name's ending says. Raises MlcBuildError."""
    render = _RENDER.get(path.suffix)
    if render is None:
        raise MlcBuildError(f"{path}: expected a name that ends in .html or .md")
    write_page(path, render(runs))


def write_page(path: Path, text: str) -> None:
    """Put the text there, whole or not at all. Raises MlcBuildError where it cannot be written."""
    try:
        write_atomically(path, text)
    except OSError as error:
        raise MlcBuildError(f"{path}: the report cannot be written: {os.strerror(error.errno or 0)}") from None
