"""A template beside the checkpoint's own: what quality.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.chat.checkpoint import CheckpointChat, read_checkpoint_chat
from mlcbuild.chat.compare import check, compare, stop_problems
from mlcbuild.chat.conversation import Conversation, from_data
from mlcbuild.chat.derive import derive
from mlcbuild.chat.jinja import ChatTemplate, read_chat_template
from mlcbuild.inspect.template import guess
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Template
from tests.chat import chats

ROOT = Path(__file__).parents[2]
TEMPLATES = load(ROOT).templates


def stock(name: str, **changed: Any) -> Conversation:
    return from_data(name, {**TEMPLATES[name].data, **changed})


def test_a_template_that_is_the_checkpoints_own() -> None:
    for source in (chats.CHATML_DEFAULT, chats.GEMMA):
        checkpoint = chats.chat(source)
        found = compare(derive(checkpoint).conversation, checkpoint)
        assert (found.report, found.warnings) == ({"checked": True}, ())


def test_another_template_is_a_warning_with_a_diff() -> None:
    found = compare(stock("vicuna_v1.1"), chats.chat(chats.CHATML))
    assert found.report["differs"].startswith("--- tokenizer_config.json: chat_template\n+++ template vicuna_v1.1\n@@ ")
    assert "\n-<|im_start|>system\n-Answer in one sentence.<|im_end|>\n" in found.report["differs"]
    assert found.report["stop_tokens"] == {"checkpoint": ["<|im_end|>", "</s>"], "template": ["</s>", "<|im_start|>"]}
    assert found.warnings == (
        "template vicuna_v1.1: it does not write conversations as tokenizer_config.json: chat_template does "
        "(quality.json has the difference)",
        "template vicuna_v1.1: it does not stop at `<|im_end|>`, which ends this model's replies",
    )


def test_a_blank_is_a_difference() -> None:
    """MLC's llama-2 lets the model begin its reply after a blank, Llama's own template does not."""
    found = compare(stock("llama-2", system_prefix_token_ids=[0]), chats.chat(chats.LLAMA_2))
    before, after = found.report["differs"].splitlines()[-2:]
    assert before.endswith(" </s><s>[INST] And a planet? [/INST]")
    assert after.endswith(" </s><s>[INST] And a planet? [/INST]·")


def test_stories_is_chatml() -> None:
    """The model that ships. Where a conversation has no system message, MLC's chatml brings one of its own."""
    folder = ROOT / "recipes" / "models" / "stories"
    checkpoint = read_checkpoint_chat({path.name: path for path in folder.iterdir()})
    assert checkpoint is not None
    found = compare(stock("chatml"), checkpoint)
    assert found.warnings == () and "differs" not in found.report
    assert "+A conversation between a user and an LLM-based AI assistant." in found.report["differs_by_default"]
    assert found.report["stop_tokens"] == {"checkpoint": ["<|im_end|>", "<|endoftext|>"], "template": ["<|im_end|>"]}
    assert stop_problems(stock("chatml"), checkpoint.tokenizer) == []


def test_a_template_that_is_exact_without_a_system_message_comes_first() -> None:
    """FAULTS.md A15: `auto` wrote two extra new lines in every chat without one, and yet won."""
    checkpoint = chats.chat(chats.GEMMA_3)
    data = {**TEMPLATES["gemma3_instruction"].data, "system_prefix_token_ids": [0], "stop_token_ids": [6, 1]}
    found = guess(checkpoint, {"gemma3_instruction": Template("gemma3_instruction", data)}, "gemma-3-1b-it")
    assert found.name == "gemma3_instruction"
    named, auto = (compare(each, checkpoint).report for each in (from_data("x", data), derive(checkpoint).conversation))
    assert named["differs_in"] == ["system message, one turn", "system message, two turns"]
    assert auto["differs_in"] == ["one turn", "two turns", "three turns"] and "differs_by_default" in auto


def test_a_system_message_of_its_own_is_no_reason_to_take_a_named_template_that_has_another() -> None:
    """A sibling: ChatML with a default system message. The named one is right with a system message only."""
    found = guess(chats.chat(chats.CHATML_DEFAULT), {"chatml": Template("chatml", TEMPLATES["chatml"].data)}, "qwen")
    assert found.name == "auto"


def test_a_template_that_leaves_marks_out_does_not_come_first() -> None:
    """A sibling: without a system message `chatml_nosystem` is exact, but it would write one as if nobody said it."""
    names = ("chatml", "chatml_nosystem")
    templates = {name: Template(name, {**TEMPLATES[name].data, "stop_token_ids": [3]}) for name in names}
    assert guess(chats.chat(chats.CHATML), templates, "tale").name == "chatml"


def test_a_package_is_checked_by_its_own_files(tmp_path: Path) -> None:
    """What verification does: the chat template is packaged, and mlc-chat-config.json has the ends of text."""
    assert check(stock("chatml"), tmp_path)[0].report == {"checked": False, "reason": "there is no tokenizer"}
    tokens = [{"id": i, "content": text, "special": True} for i, text in enumerate(chats.SPECIAL)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": tokens}))
    (tmp_path / "chat_template.jinja").write_text(chats.CHATML)
    (tmp_path / "mlc-chat-config.json").write_text('{"eos_token_id": 3}')
    found, problems = check(stock("chatml", system_message="", stop_token_ids=[3, 70]), tmp_path)
    assert found.report["checked"] and not found.warnings and "stop_tokens" not in found.report
    assert len(problems) == 1 and "stop token id 70 is not in the tokenizer (7 tokens)" in problems[0]


def test_what_cannot_be_compared_says_why() -> None:
    assert compare(stock("chatml"), chats.chat(None)).report == {
        "checked": False,
        "reason": "the checkpoint has no chat_template",
    }
    broken = compare(stock("chatml"), chats.chat("{% if %}")).report
    assert broken["checked"] is False and "chat_template, line 1: Expected an expression" in broken["reason"]


def test_stop_tokens_of_another_tokenizer() -> None:
    """ids 2 and 32000 of MLC's open_hermes_mistral: another special token here, and none."""
    (problem,) = stop_problems(stock("open_hermes_mistral"), chats.TOKENIZER)
    assert problem == (
        "template open_hermes_mistral: stop token id 32000 is not in the tokenizer (11 tokens): "
        "choose the template that the model was trained with"
    )
    (problem,) = stop_problems(stock("chatml", stop_token_ids=[7]), chats.TOKENIZER)
    assert "stop token id 7 is 'a' in this tokenizer, not `<|im_end|>`" in problem
    assert stop_problems(stock("minigpt", stop_token_ids=[8, 9]), chats.TOKENIZER) == []


def test_a_beginning_of_another_tokenizer() -> None:
    """FAULTS A9: the ids before a conversation are looked at as those that end it are."""
    for i, known in ((7, "'a' in this tokenizer"), (99, "not in the tokenizer")):
        (problem,) = stop_problems(stock("chatml", system_prefix_token_ids=[i]), chats.TOKENIZER)
        assert problem.startswith(f"template chatml: a conversation begins with token id {i}, which is {known}: ")
    assert stop_problems(stock("chatml", system_prefix_token_ids=[0]), chats.TOKENIZER) == []


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    files = {"tokenizer_config.json": config}
    config.write_text('{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "rag", "template": "r"}, '
                      '{"name": "default", "template": "d"}]}')  # fmt: skip
    assert read_chat_template(files) == ChatTemplate("d", "tokenizer_config.json", {"bos_token": "<s>"})
    (tmp_path / "chat_template.jinja").write_text("j")
    files["chat_template.jinja"] = tmp_path / "chat_template.jinja"
    assert read_chat_template(files) == ChatTemplate("j", "chat_template.jinja", {"bos_token": "<s>"})
    assert read_chat_template({}) is None


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Ü"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Ü"}]'),
        ("{% for m in [1, 2] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("  {% if tools %}\n{% endif %}\n{{ pad_token }}x", "x"),
    ],
)
def test_the_helpers_that_transformers_gives(source: str, text: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "user", "content": "Ü"}]
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=source)
    assert theirs.apply_chat_template(messages, tokenize=False) == text
    assert ChatTemplate(source, "x").render(messages) == text


def test_a_checkpoints_ends_of_text(tmp_path: Path) -> None:
    def ends(**configs: str) -> tuple[int, ...]:
        files = {}
        for name, text in {"tokenizer": '{"model": {"vocab": {"a": 0, "</s>": 1}}}', **configs}.items():
            files[f"{name}.json"] = tmp_path / f"{name}.json"
            files[f"{name}.json"].write_text(text)
        found: CheckpointChat | None = read_checkpoint_chat(files)
        assert found is not None
        return found.end_ids

    assert ends(generation_config='{"eos_token_id": [4, 5]}', config='{"eos_token_id": 6}') == (4, 5)
    assert ends(generation_config="{}", config='{"eos_token_id": 6}') == (6,)
    assert ends(config='{"eos_token_id": null}', tokenizer_config='{"eos_token": "</s>"}') == (1,)
