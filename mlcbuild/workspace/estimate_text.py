"""The estimate of a build as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlcbuild.text import amount, count, duration, table
from mlcbuild.workspace.estimate import BuildEstimate

_SHOWN = 40  # steps that are listed one by one


def render(coming: BuildEstimate) -> str:
    """What `mlcbuild plan` prints."""
    run = coming.to_run
    lines = [
        f"recipes  {count(len(coming.recipes), 'recipe')}, {len(coming.to_install)} to install",
        f"steps    {count(len(coming.steps), 'step')}, each once: "
        f"{len(coming.steps) - len(run)} cached, {len(run)} to run",
        f"shared   {count(coming.libraries, 'library', 'libraries')} and {count(coming.weights, 'set')} of weights "
        f"for {count(len(coming.recipes), 'recipe')}",
        f"disk     {amount(coming.new)} estimated, {amount(coming.free)} free"
        + ("" if coming.new <= coming.free else ": NOT ENOUGH"),
        f"time     {duration(coming.seconds)} estimated, one step after another",
    ]
    if coming.unknown:
        lines.append(
            f"         ({count(coming.unknown, 'step')} of a kind that never ran with this cache: not counted)"
        )
    lines += [f"??       {name}: unavailable: {text}" for name, text in coming.unavailable.items()]
    if coming.unlocked:
        lines.append(f"??       {count(len(coming.unlocked), 'recipe')} unknown until locked, in no figure above:")
        lines += [f"         {name}: {text}" for name, text in [*coming.unlocked.items()][:_SHOWN]]
        if len(coming.unlocked) > _SHOWN:
            lines.append(f"         … and {len(coming.unlocked) - _SHOWN} more")
    rows = [("kind", "steps", "cached", "to run", "new bytes", "time")]
    for kind in dict.fromkeys(step.kind for step in coming.steps):
        each = [step for step in coming.steps if step.kind == kind]
        todo = [step for step in each if not step.cached]
        facts = (_sum([step.new for step in todo], amount), _sum([step.seconds for step in todo], duration))
        rows.append((kind, str(len(each)), str(len(each) - len(todo)), str(len(todo)), *facts))
    lines += ["", *table(rows)]
    if run:
        listed = [(step.name, _about(step.new, amount), _about(step.seconds, duration)) for step in run[:_SHOWN]]
        lines += ["", *table([("to run", "new bytes", "time"), *listed])]
        if len(run) > _SHOWN:
            lines.append(f"… and {len(run) - _SHOWN} more")
    return "\n".join(lines) + "\n"


def _sum(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """What is known of them together; nothing of none."""
    known = [value for value in values if value is not None]
    return _about(sum(known) if known else None, show) if values else ""


def _about(value: float | None, show: Callable[[float], str]) -> str:
    return "unknown" if value is None else show(value)
