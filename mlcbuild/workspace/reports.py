"""What logs and reports say beyond what the screen shows: the matrix, figures of packages, why steps run, log excerpts.

None of it is worked out, and no page is rendered, unless a log or a report was asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.select import Cell, cells
from mlcbuild.redact import redactor
from mlcbuild.regular import read_regular
from mlcbuild.reporting.events import Event, PackageInstalled, RecipePlanned, StepFinished
from mlcbuild.text import executed

if TYPE_CHECKING:
    from mlcbuild.reporting.history import Run
    from mlcbuild.workspace.session import Session


def planned(recipes: Mapping[str, Cell], steps: Callable[[str], Iterable[str]]) -> Iterator[RecipePlanned]:
    """An event for each recipe; `steps` gives the tasks that it needs."""
    for name, cell in recipes.items():
        yield RecipePlanned(name, *cell, tuple(steps(name)))


def planned_in(session: Session) -> Iterator[RecipePlanned]:
    """`planned` for all recipes of the session; one that cannot be planned has no steps."""
    graph, known = session.graph, session.catalog.recipes
    chosen = {name: known[name] for name in (*graph.goals, *graph.unavailable, *graph.unlocked, *graph.broken)}
    return planned(cells(chosen), lambda name: session.needed(name) if name in graph.goals else ())


def reasons(session: Session, names: Iterable[str]) -> dict[str, str]:
    """Why these steps have to run, as far as that can be said before the build."""
    from mlcbuild.engine.why import why

    return {answer.step: "\n".join(answer.reasons) for answer in why(session.lookup, names) if not answer.hit}


def annotator(dist: Path, why_so: Mapping[str, str]) -> Callable[[Event], Event]:
    """A function that adds to an event what only logs and reports want, and takes out what nobody should read."""
    redact = redactor()

    def annotate(event: Event) -> Event:
        more: dict[str, Any] = {}
        if isinstance(event, StepFinished) and event.outcome != "hit":
            more["why"] = why_so.get(event.step, "")
        elif isinstance(event, PackageInstalled):
            more = _figures(dist / event.recipe)
        texts = {name: value for name, value in {**vars(event), **more}.items() if isinstance(value, str)}
        return dataclasses.replace(event, **more | {name: redact(text) for name, text in texts.items()})

    return annotate


def write_report(path: Path, runs: Sequence[Run]) -> None:
    """The runs as a page of the kind that the name's ending says. Raises MlcBuildError."""
    from mlcbuild.reporting.html import html
    from mlcbuild.reporting.summary import markdown

    render = {".html": html, ".htm": html, ".md": markdown}.get(path.suffix)
    if render is None:
        raise MlcBuildError(f"{path}: expected a name that ends in .html or .md")
    write_page(path, render(runs))


def write_page(path: Path, text: str) -> None:
    """Put the text there, whole or not at all. Raises MlcBuildError where it cannot be written."""
    from mlcbuild.recipes.files import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        raise MlcBuildError(f"{path}: the report cannot be written: {os.strerror(error.errno or 0)}") from None


def _figures(folder: Path) -> dict[str, Any]:
    """A package's size and quality, from its manifest."""
    try:
        manifest = json.loads(read_regular(folder / "manifest.json"))
        quality = manifest["quality"]
        known = {"kl": quality.get("kl"), "status": quality.get("status", ""), "executed": executed(quality)}
        return {"size": manifest["size"], **known}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
