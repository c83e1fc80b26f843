"""`mlcbuild evaluate`: a package's scores, and how likely it finds texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.errors import MlcBuildError
from mlcbuild.evaluation import likelihood
from mlcbuild.runtime.model import Model, load
from mlcbuild.text import table
from mlcbuild.verify.evaluate import read_text

if TYPE_CHECKING:
    from mlcbuild.evaluation.harness import Score


def evaluate(
    folder: Path,
    *,
    tasks: str | None = None,
    text: Sequence[Path] = (),
    include: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    json: bool = False,
    library: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> None:
    """Print the scores of `tasks` (names with commas) and the likelihood of texts; without either, of our own tasks.

    Raises MlcBuildError as `load` does, for a package that writes no text, for a text that cannot be read, an unknown
    task, for metrics that gave no figure (after the others are printed), and where lm-evaluation-harness is not
    installed.
    """
    for name, value, least in (("--few-shot", few_shot, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise MlcBuildError(f"{name} is {value}: expected {least} or more")
    asked = tasks is not None or not text
    for name, given in (
        ("--few-shot", few_shot),
        ("--limit", limit),
        ("--include", include),
        ("--apply-chat-template", apply_chat_template or None),
    ):
        if given is not None and not asked:
            raise MlcBuildError(f"{name} is for tasks, and with --text alone none is asked: name some with --tasks")
    if include is not None and not include.is_dir():
        raise MlcBuildError(f"--include {include}: no such folder; it holds tasks as YAML files")
    texts = {path: read_text(path) for path in text}
    model = load(folder, library, threads, device)
    if model.network.library.metadata.model_task != "chat":
        raise MlcBuildError(f"{folder}: a model of texts gives vectors; tasks are asked of models that write")
    likely = {path: likelihood.of_text(model, content) for path, content in texts.items()}
    scores, lost = _scores(model, tasks, include, few_shot, limit, apply_chat_template) if asked else ([], [])
    _print(likely, scores, json)
    if lost:
        raise MlcBuildError(
            f"{'; '.join(lost)}: lm-evaluation-harness does not compute it for this kind of task: correct metric_list "
            "in the task's file"
        )


def _print(likely: Mapping[Path, likelihood.OfText], scores: Sequence[Score], json: bool) -> None:
    if json:
        found = {
            "texts": [{"text": str(path), **dataclasses.asdict(figures)} for path, figures in likely.items()],
            "scores": [dataclasses.asdict(score) for score in scores],
        }
        print(dumps(found, indent=2))
        return
    for path, figures in likely.items():
        print(
            f"{path}: perplexity {figures.perplexity:.4g}, {figures.bits_per_byte:.4g} bits a byte, "
            f"over {figures.tokens:,} tokens"
        )
    if scores:
        rows = [
            [s.task, s.metric, f"{s.value:.4g}", _error(s), "" if s.questions is None else f"{s.questions:,}"]
            for s in scores
        ]
        print("\n".join(table([["TASK", "METRIC", "VALUE", "ERROR", "QUESTIONS"], *rows])))


def _scores(
    model: Model, tasks: str | None, include: Path | None, few_shot: int | None, limit: int | None, chat: bool
) -> tuple[list[Score], list[str]]:
    try:
        from mlcbuild.evaluation import harness
    except ModuleNotFoundError as error:
        raise MlcBuildError(
            f"tasks are those of lm-evaluation-harness, and {error.name} is not installed: "
            "pip install 'mlcbuild[evaluate]'. A text of your own needs no more: --text FILE"
        ) from None
    names = harness.own_tasks() if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise MlcBuildError("--tasks names no task")
    found = harness.evaluate(model, names, include, few_shot, limit, chat)
    return found.scores, found.lost


def _error(score: Score) -> str:
    return "" if score.error is None else f"± {score.error:.2g}"
