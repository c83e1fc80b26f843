"""What logs and reports say beyond what the screen shows: the matrix, figures of packages, why steps run, log excerpts.

None of it is worked out unless a log or a report was asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.recipes.select import Cell, cells
from mlcbuild.reporting.events import Event, PackageInstalled, RecipePlanned, StepFinished

if TYPE_CHECKING:
    from mlcbuild.workspace.session import Session

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 6  # characters: a shorter value would blot out half of the text
_HIDDEN = "[hidden]"


def planned(recipes: Mapping[str, Cell], steps: Callable[[str], Iterable[str]]) -> Iterator[RecipePlanned]:
    """An event for each recipe; `steps` gives the tasks that it needs."""
    for name, cell in recipes.items():
        yield RecipePlanned(name, *cell, tuple(steps(name)))


def planned_in(session: Session) -> list[RecipePlanned]:
    """`planned` for all recipes of the session; one that cannot be planned has no steps."""
    graph, known = session.graph, session.catalog.recipes
    goals = graph.goals
    chosen = {name: known[name] for name in (*goals, *graph.unavailable, *graph.unlocked, *graph.broken)}

    def steps(name: str) -> Iterable[str]:
        return session.graph.closure(goals[name].steps.values()) if name in goals else ()

    return list(planned(cells(chosen), steps))


def reasons(session: Session, names: Iterable[str]) -> dict[str, str]:
    """Why these steps have to run, as far as that can be said before the build."""
    from mlcbuild.engine.why import why

    return {answer.step: "\n".join(answer.reasons) for answer in why(session.lookup, names) if not answer.hit}


def completed(dist: Path, why_so: Mapping[str, str]) -> Callable[[Event], Event]:
    """A function that adds to an event what only logs and reports want, and hides what nobody should read."""

    def complete(event: Event) -> Event:
        if isinstance(event, StepFinished) and event.outcome != "hit":
            event = dataclasses.replace(event, why=why_so.get(event.step, ""))
        elif isinstance(event, PackageInstalled):
            event = dataclasses.replace(event, **_figures(dist / event.recipe))
        return hidden(event)

    return complete


def hidden(event: Event) -> Event:
    """The event without the values of environment variables that are called tokens, passwords and the like."""
    secrets = [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST]
    texts = {
        name: value
        for name, value in vars(event).items()
        if isinstance(value, str) and any(secret in value for secret in secrets)
    }
    for secret in sorted(secrets, key=len, reverse=True):
        texts = {name: value.replace(secret, _HIDDEN) for name, value in texts.items()}
    changes: Any = texts
    return dataclasses.replace(event, **changes) if texts else event


def _figures(folder: Path) -> dict[str, Any]:
    """A package's size and quality, from its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        quality = manifest["quality"]
        return {"size": manifest["size"], "kl": quality.get("kl"), "status": quality.get("status", "")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
