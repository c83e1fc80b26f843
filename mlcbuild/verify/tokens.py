"""What a package's conversations are in tokens, beside what the checkpoint's own Jinja and tokenizer make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.chat.compare import CONVERSATIONS, FULLEST
from mlcbuild.chat.conversation import Conversation, render
from mlcbuild.chat.jinja import read_chat_template
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.tokenizer import load_tokenizer


def token_ids(conversation: Conversation, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What quality.json says under `template.ids`, and warnings; `folder` has the package's weights and tokenizer.

    `prefix`; `stops`, each with its text; and where the checkpoint has a chat template, `same`: whether a conversation
    (with a system message, where the model takes one) becomes the same tokens; if not, `differs`: the first place where
    it does not, and both ids there (null: the end).
    """
    tokenizer = load_tokenizer(folder)
    texts = {i: text for text, i in tokenizer.tokens().items()}
    prefix = list(conversation.system_prefix_token_ids or ())
    report: dict[str, Any] = {"prefix": prefix, "stops": {str(i): texts.get(i) for i in conversation.stop_token_ids}}
    template = read_chat_template({path.name: path for path in folder.iterdir()})
    if template is None:
        return report, []
    for messages in (CONVERSATIONS[FULLEST], CONVERSATIONS["two turns"]):
        try:
            text = template.render(messages)
            break
        except MlcBuildError:
            continue
    else:
        return report, []
    prompt = render(conversation, messages)
    ours = [*prompt.prefix_token_ids, *tokenizer.encode(prompt.text, add_special_tokens=False)]
    theirs = tokenizer.encode(text, add_special_tokens=False)
    report["same"] = ours == theirs
    if ours == theirs:
        return report, []
    at = next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), min(len(ours), len(theirs))
    )
    package, checkpoint = (ids[at] if at < len(ids) else None for ids in (ours, theirs))
    report["differs"] = {"at": at, "package": package, "checkpoint": checkpoint}
    return report, [_said(conversation, at, {"the package": package, "the checkpoint": checkpoint}, texts)]


def _said(conversation: Conversation, at: int, ids: Mapping[str, int | None], texts: Mapping[int, str]) -> str:
    both = ", ".join(f"{whose} {'ends' if i is None else f'has {i} ({texts.get(i)!r})'}" for whose, i in ids.items())
    return f"template {conversation.name}: a conversation in tokens is not the checkpoint's: at {at}, {both}"
