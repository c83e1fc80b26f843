"""Which conversation template a checkpoint was trained with, as far as its files tell."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlcbuild.chat.checkpoint import CheckpointChat
from mlcbuild.chat.compare import compare, stop_problems
from mlcbuild.chat.conversation import Conversation, from_data
from mlcbuild.chat.derive import derive
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.types import AUTO_TEMPLATE, Template

_FAULTS = 6  # parts of a rank that say what is wrong; what follows decides between equals
_PLAIN = "LM"  # text as it is: what a model without a chat template goes on with


@dataclass(frozen=True)
class Guess:
    """`name` is a template of the catalog, or `auto`. `exact`: it writes what the checkpoint's own does, and stops
    where that stops. `remarks` are sentences on what differs, or is not seen."""

    name: str
    exact: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rank:
    """How far a named template is from the checkpoint's own; a smaller one is nearer."""

    order: tuple[Any, ...]
    report: Mapping[str, Any]
    stops: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return self.report.keys() == {"checked"} and not self.stops


def guess(chat: CheckpointChat | None, templates: Mapping[str, Template], like: str) -> Guess:
    """The named template that writes the same as the checkpoint's Jinja; else `auto`, if MLC's scheme can express it;
    else the nearest. `like` is the model's name, which decides between equals."""
    if chat is None:
        return Guess(_PLAIN, False, (f"the checkpoint has no tokenizer: {_PLAIN} is a stand-in for its template",))
    if chat.template is None:
        remark = (
            f"the checkpoint has no chat_template: {_PLAIN} (text as it is) is right for a base model; for a chat "
            "model, name the template that it was trained with"
        )
        return Guess(_PLAIN, False, (remark,))
    ranks = {name: rank for name, each in templates.items() if (rank := _rank(each, chat, like)) is not None}
    best = min(ranks, key=lambda name: ranks[name].order, default=None)
    if best is not None and ranks[best].exact:
        return Guess(best, True)
    nearest = () if best is None else (f"no named template writes the same; the nearest is {best}",)
    try:
        derived = derive(chat)
        own = _ranked(derived.conversation, chat, like)
        if best is not None and own is not None and ranks[best].order[:_FAULTS] <= own.order[:_FAULTS]:
            return Guess(best, True, _differences(ranks[best]))  # what it does not keep, MLC's scheme cannot
        return Guess(AUTO_TEMPLATE.name, True, (*nearest, *derived.notes))
    except MlcBuildError as error:
        if best is None:
            return Guess(_PLAIN, False, (str(error),))
        return Guess(best, False, (*nearest, *_differences(ranks[best]), str(error)))


def differences(template: Template, chat: CheckpointChat | None) -> tuple[str, ...]:
    """What a template that was chosen by hand writes otherwise than the checkpoint's own."""
    if chat is None or template.name == AUTO_TEMPLATE.name:
        return ()
    rank = _rank(template, chat, "")
    return (
        _differences(rank) if rank is not None else ("the checkpoint has no chat_template that it can be checked by",)
    )


def _rank(template: Template, chat: CheckpointChat, like: str) -> _Rank | None:
    """None where the two cannot be compared."""
    return _ranked(from_data(template.name, template.data), chat, like)


def _ranked(conversation: Conversation, chat: CheckpointChat, like: str) -> _Rank | None:
    compared = compare(conversation, chat)
    report = compared.report
    if not report["checked"]:
        return None
    stops = tuple(stop_problems(conversation, chat.tokenizer))
    goes_on = any("does not stop" in warning for warning in compared.warnings)
    # Most conversations have one turn and no system message: a template that is right there comes first, unless it
    # writes others without the marks that say who speaks.
    common = "one turn" in report.get("differs_in", ())
    faults = (compared.lacks, bool(stops), goes_on, common, "differs_by_default" in report, "differs" in report)
    alike = difflib.SequenceMatcher(None, conversation.name.lower(), like.lower()).ratio()
    length = len(report.get("differs", ""))
    order = (*faults, "stop_tokens" in report, length, -alike, conversation.name)
    return _Rank(order, report, stops)


def _differences(rank: _Rank) -> tuple[str, ...]:
    said = []
    if "differs" in rank.report:
        said.append(f"it writes conversations otherwise:\n{rank.report['differs']}")
    if "differs_by_default" in rank.report:
        said.append(f"without a system message it writes otherwise:\n{rank.report['differs_by_default']}")
    if "stop_tokens" in rank.report:
        tokens = rank.report["stop_tokens"]
        said.append(f"it stops at {tokens['template']}, the checkpoint at {tokens['checkpoint']}")
    return (*said, *rank.stops)
