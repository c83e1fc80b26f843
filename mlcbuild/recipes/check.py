"""`mlcbuild check`: everything that is wrong with a workspace's files, in one go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlcbuild.recipes.load import read
from mlcbuild.recipes.lockfile import examine
from mlcbuild.recipes.problems import Problem

_COUNTED = ("recipe", "model", "architecture", "quantization", "target", "template")


@dataclass(frozen=True)
class Report:
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    counts: Mapping[str, int]  # `file`: files read; `recipe`: recipes, cells included (0 with problems); `model` ...

    @property
    def ok(self) -> bool:
        return not self.problems


def check(root: Path, memo: Path | None = None) -> Report:
    """Raises RecipeError only where `root` is no workspace. `memo` is as for `load`."""
    reading = read(root, memo)
    problems = tuple(sorted({*reading.problems, *examine(root.absolute())[1]}))
    recipes = len(reading.catalog.recipes) if reading.catalog else 0
    return Report(
        problems, reading.warnings, {**reading.counts, "file": sum(reading.counts.values()), "recipe": recipes}
    )


def render(report: Report) -> str:
    """The report as text: each problem with its line of YAML, then one line that sums up."""
    parts = [problem.with_source() for problem in report.problems]
    parts += [f"{warning.file}: warning: {warning.text}" for warning in report.warnings]
    counts = report.counts
    if report.problems:
        files = len({problem.file for problem in report.problems})
        parts.append(f"{_number(len(report.problems), 'problem')} in {_number(files, 'file')} of {counts['file']}")
    else:
        parts.append(f"{_number(counts['file'], 'file')} valid: {', '.join(_number(counts[k], k) for k in _COUNTED)}")
    return "\n".join(parts) + "\n"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
