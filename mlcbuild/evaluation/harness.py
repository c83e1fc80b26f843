"""Tasks of lm-evaluation-harness (EleutherAI), asked of a package; and small ones of our own that need no download."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from mlcbuild.chat.conversation import render
from mlcbuild.errors import MlcBuildError
from mlcbuild.evaluation.likelihood import continuations, first_token, windows
from mlcbuild.runtime.model import Model

_QUESTIONS = Path(__file__).with_name("questions.yaml")
_RESAMPLES = 1000  # for errors that no formula gives
_MAX_TOKENS = 256  # of an answer, where a task does not say; the harness' own models have it


@dataclass(frozen=True)
class Score:
    """One figure of a task, with its standard error where the harness has one."""

    task: str
    metric: str
    value: float
    error: float | None
    questions: int | None  # None: of a group, the mean of others


@dataclass(frozen=True)
class Scores:
    """`lost` are metrics that a task's file asks for (`task: metric`) and the harness gives no figure of."""

    scores: list[Score]
    lost: list[str]


class Harness(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A package as the harness wants a model; `chat`: one that is asked in conversations."""

    def __init__(self, model: Model, chat: bool = False) -> None:
        super().__init__()
        self._model, self._chat = model, chat
        self._first = first_token(model)
        self._seeds = itertools.count()  # where an answer is sampled several times, they shall differ

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has nothing before it. Raises MlcBuildError where the model has no such."""
        if self._first is None:
            raise MlcBuildError(
                "this task begins with nothing, and the model has neither bos_token_id nor eos_token_id"
            )
        return self._first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if self._chat and add_special_tokens is None:  # the template has what stands before a conversation
            prefix = self._model.conversation.system_prefix_token_ids or ()
            return [*prefix, *self._model.tokenizer.encode(string, add_special_tokens=False)]
        ids = self._model.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        # A text may begin with the token already that the tokenizer puts before every text.
        return ids[1:] if add_special_tokens is None and ids[:2] == [self._first] * 2 else ids

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation by the package's template. Without a generation prompt the last message is an answer's
        beginning, which goes on."""
        turns, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        return render(self._model.conversation, turns).text + begun

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._model.conversation.name if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its caches of prompts apart by."""
        return self._model.conversation.name

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        judged = continuations(self._model, [(given, wanted) for _, given, wanted in requests])
        return [(each.log_probability, each.likeliest) for each in judged]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        limit = self._model.context_window_size
        totals = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            pairs = list(windows(ids, limit if limit > 0 else len(ids)))
            totals.append(sum(each.log_probability for each in continuations(self._model, pairs)))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._written(*request.args) for request in requests]

    def _written(self, prompt: str, settings: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(settings, _MAX_TOKENS)
        most, sampled = wanted["max_gen_toks"], wanted["do_sample"]
        sampling = {k: wanted[k] for k in ("temperature", "top_p", "top_k", "min_p") if sampled and k in wanted}
        if sampled:
            sampling = {"temperature": 1.0, **sampling}
        limit = self._model.context_window_size
        ids = self.tok_encode(prompt)
        ids = ids if limit < 0 else ids[-max(1, limit - most) :]
        stops = [text for text in wanted["until"] if text]
        return self._model.generate(ids, max_tokens=most, stop=stops, seed=next(self._seeds), **sampling)


def own_tasks() -> tuple[str, ...]:
    """The names of our own tasks."""
    return tuple(_questions())


def evaluate(
    model: Model,
    tasks: Iterable[str],
    include: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
) -> Scores:
    """The scores of tasks, by name: the harness' own, those of YAML files in `include`, and ours.

    `few_shot` examples stand before each question, and `limit` is the most questions of a task. With `chat`, questions
    are a user's messages in the package's template, and examples are turns before them. Raises MlcBuildError for a name
    that there is no task of.
    """
    if chat:
        model.conversation  # noqa: B018  a package without one says so now
    names = list(dict.fromkeys(tasks))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this process, with its threads
    with contextlib.redirect_stdout(sys.stderr):  # it says there what it does
        try:
            settings = {"num_fewshot": few_shot, "limit": limit}
            settings |= {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat else {}
            found = _found(Harness(model, chat), names, include, **settings)
        except ModuleNotFoundError as error:
            raise MlcBuildError(f"a task needs the package {error.name}, which is not installed") from None
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise MlcBuildError(f"lm-evaluation-harness: {type(error).__name__}: {error}") from error
    scores = [score for task, figures in found["results"].items() for score in _scores(task, figures, found)]
    return Scores(scores, list(_lost(found)))


def _found(harness: Harness, names: Sequence[str], include: Path | None, **settings: Any) -> Mapping[str, Any]:
    others = [name for name in names if name not in _questions()]
    manager = _manager(others, include)
    for name in others:
        if not manager.match_tasks([name]):
            raise MlcBuildError(
                f"no task is called {name}: `lm_eval ls tasks` lists those of lm-evaluation-harness; without a "
                f"download there are {', '.join(own_tasks())}"
            )
    specs = [*(_task(name) for name in names if name in _questions()), *manager.match_tasks(others)]
    found: Mapping[str, Any] = simple_evaluate(
        harness, tasks=specs, task_manager=manager, log_samples=False, bootstrap_iters=_RESAMPLES, **settings
    )
    return found


class _Tasks(TaskManager):  # type: ignore[misc]  # the harness has no types
    """Tasks whose metrics are there: the harness passes over others, or breaks when all is computed."""

    def load(self, *given: Any, **settings: Any) -> Any:
        loaded = super().load(*given, **settings)
        for name, task in loaded["tasks"].items():
            for metric, function in getattr(task, "_metric_fn_list", {}).items():
                if function is None and task.config.process_results is None:
                    raise MlcBuildError(f"{name}: there is no metric {metric}: look at metric_list in the task's file")
        return loaded


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """What knows these tasks. To read all that the harness has takes seconds, so it is done where it is needed."""
    path = str(include) if include else None
    manager = _Tasks(include_path=path, include_defaults=False)
    return manager if all(manager.match_tasks([name]) for name in names) else _Tasks(include_path=path)


def _scores(task: str, figures: Mapping[str, Any], found: Mapping[str, Any]) -> Iterable[Score]:
    questions = found["n-samples"].get(task, {}).get("effective")
    for key, value in figures.items():
        metric, _, how = key.partition(",")
        if how and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{how}")
            name = metric if how == "none" else f"{metric} ({how})"
            yield Score(task, name, float(value), float(error) if isinstance(error, int | float) else None, questions)


def _lost(found: Mapping[str, Any]) -> Iterable[str]:
    """What the harness leaves out without a word: metrics that are not for this kind of task.

    One of `evaluate`'s may give figures of other names.
    """
    for task, figures in found["results"].items():
        given = {key.partition(",")[0] for key in figures}
        for asked in found["configs"].get(task, {}).get("metric_list") or ():
            name = asked["metric"]
            if isinstance(name, str) and name not in given and not asked.get("hf_evaluate"):
                yield f"{task}: {name}"


@functools.cache
def _questions() -> Mapping[str, list[list[str]]]:
    return yaml.safe_load(_QUESTIONS.read_text("utf-8"))  # type: ignore[no-any-return]


def _task(name: str) -> dict[str, Any]:
    """One of our own tasks, as the harness takes it: the answer that is likeliest after the question counts.

    `acc_norm` divides by the answer's length, as the harness defines it.
    """
    rows = [{"question": question, "answers": answers} for question, *answers in _questions()[name]]
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in _METRICS],
    }


_METRICS = ("acc", "acc_norm")
