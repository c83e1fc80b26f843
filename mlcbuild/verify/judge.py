"""A package judged: bounds make the verdict of its figures, its template and files are looked at; quality.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.chat.compare import TemplateReport, check
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import library_file, package, weights
from mlcbuild.runtime.model import conversation
from mlcbuild.verify import bounds, vector_bounds
from mlcbuild.verify.tokens import token_ids

# By method: the module whose `bounds`, `judge` and `advice` are for such figures.
_CRITERIA: Mapping[str, Any] = {"whole": bounds, "layers": bounds, "embeddings": vector_bounds}


def judge(
    fields: Mapping[str, Any],
    folder: Path,
    measured: Mapping[str, Any],
    execution: Mapping[str, Any] | None,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """The content of quality.json for the package in `folder`, whose figures.json is `measured`.

    `execution` is of the library's kernels, where they were tried apart.

    Raises MlcBuildError for logits or hidden states that are not finite, and with `gate: fail` for a miss.
    """
    method, gate, executed = fields["method"], fields["gate"], fields["executed"]
    files, criteria = package.find_weights(folder), _CRITERIA[method]
    name = files.name.removesuffix("-MLC")
    if "not_finite" in measured:
        raise MlcBuildError(measured["not_finite"])
    figures = measured["figures"]
    static_checks = [] if executed else _static_checks(folder, files)
    limits = criteria.bounds(fields, figures)
    status, problems = criteria.judge(figures, limits)
    template, stops = TemplateReport({"checked": False, "reason": "a model of texts"}), list[str]()
    if method != "embeddings":
        chat = conversation(package.read_config(files))
        template, stops = check(chat, files)
        ids, differing = token_ids(chat, files)
        template = TemplateReport({**template.report, "ids": ids}, (*template.warnings, *differing))
    status, problems = "failed" if stops else status, [*stops, *problems]
    notes = [*fields["notes"], *measured["notes"]]
    if status == "failed" and gate == "fail":
        advice = criteria.advice(figures, limits, fields)
        raise MlcBuildError(f"{name} does not pass verification: {'; '.join(problems)}.\n{advice}")
    for text in (*fields["notes"], *problems, *(f"warning: {warning}" for warning in template.warnings)):
        note(f"{name}: {text}")
    return {
        "status": status,
        "gate": gate,
        "method": method,
        **figures,
        **measured["details"],
        "thresholds": dataclasses.asdict(limits),
        "problems": problems,
        **({"notes": notes} if notes else {}),
        **_execution(fields, execution),
        "static_checks": static_checks,
        "template": template.report,
    }


def _execution(fields: Mapping[str, Any], execution: Mapping[str, Any] | None) -> dict[str, Any]:
    """Whether the library was run: true for this very one with these weights, else what ran its kernels."""
    if execution is not None:
        found = dict(execution)
        return {"library_executed": found.pop("executed"), "execution": found}
    reason = fields.get("not_executed")
    return {"library_executed": fields["executed"], **({"execution": {"reason": reason}} if reason else {})}


def _static_checks(folder: Path, files: Path) -> list[str]:
    """What can be said of a library that does not run here."""
    suffixes = (*package.LOADABLE, *package.OTHER_LIBRARIES)
    libraries = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes]
    if len(libraries) != 1:
        raise MlcBuildError(f"the package holds {len(libraries)} libraries, expected one")
    return library_file.check(libraries[0], weights.read_index(files), libraries[0].name)
