"""`template: auto`: the tokenizer's own Jinja as MLC's fields."""

from __future__ import annotations

import pytest

from mlcbuild.chat.compare import full_text
from mlcbuild.chat.conversation import render
from mlcbuild.chat.derive import derive
from mlcbuild.errors import MlcBuildError
from tests.chat import chats

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!\nWhat now?"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        chats.CHATML,
        chats.CHATML_DEFAULT,
        chats.CHATML_REASONING,
        chats.LLAMA_2,
        chats.VICUNA,
        chats.LLAMA_3,
        chats.THINKING,
    ],
)
def test_a_conversation_is_what_the_jinja_makes_of_it(source: str) -> None:
    checkpoint = chats.chat(source)
    conversation = derive(checkpoint).conversation
    assert checkpoint.template is not None
    for messages in ([SYSTEM, *TURNS], [SYSTEM, TURNS[0]]):
        ours = full_text(render(conversation, messages), checkpoint.tokenizer)
        assert ours == checkpoint.template.render(messages)


def test_roles_separators_and_stops() -> None:
    fields = derive(chats.chat(chats.CHATML)).conversation.to_json()
    expected = {
        "name": "auto",
        "system_template": "<|im_start|>system\n{system_message}<|im_end|>\n",
        "system_prefix_token_ids": None,
        "roles": {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"},
        "seps": ["<|im_end|>\n"],
        "role_content_sep": "\n",
        "role_empty_sep": "\n",
        "stop_str": ["<|im_end|>"],
        "stop_token_ids": [3, 1],  # what ends a reply, then the checkpoint's ends of text
    }
    assert {key: fields[key] for key in expected} == expected


def test_two_separators_and_a_first_token() -> None:
    fields = derive(chats.chat(chats.VICUNA)).conversation.to_json()
    assert fields["system_prefix_token_ids"] == [0] and fields["seps"] == [" ", "</s>"]
    assert (fields["role_content_sep"], fields["role_empty_sep"]) == (": ", ":")
    assert fields["roles"] == {"user": "USER", "assistant": "ASSISTANT"}


def test_a_first_role_inside_the_system_message() -> None:
    fields = derive(chats.chat(chats.LLAMA_2)).conversation.to_json()
    assert fields["system_template"] == "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n"
    assert fields["add_role_after_system_message"] is False
    assert fields["roles"]["user"] == "<s>[INST]"


def test_the_jinjas_own_system_message() -> None:
    derived = derive(chats.chat(chats.CHATML_DEFAULT))
    assert derived.conversation.system_message == "You are Qwen."
    assert derived.notes == ()


def test_no_default_system_message_is_noted() -> None:
    """MLC's scheme has no way to leave the frame of an absent system message out."""
    (note,) = derive(chats.chat(chats.CHATML)).notes
    assert note == "without a system message the chat template leaves its frame out; MLC's runtimes write it, empty"


def test_no_system_message_at_all() -> None:
    derived = derive(chats.chat(chats.GEMMA))
    assert "no place for a system message" in derived.notes[0]
    assert render(derived.conversation, TURNS[:1]).text == (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_reasoning_that_leaves_history() -> None:
    assert derive(chats.chat(chats.CHATML_REASONING)).conversation.strip_reasoning_in_history
    assert not derive(chats.chat(chats.CHATML)).conversation.strip_reasoning_in_history


def test_a_reply_that_begins_with_reasoning() -> None:
    conversation = derive(chats.chat(chats.THINKING)).conversation
    assert conversation.roles["assistant"] + conversation.role_empty_sep == "<|im_start|>assistant\n<think>\n"


def test_the_day_is_always_the_same() -> None:
    derived = derive(chats.chat(chats.LLAMA_3))
    assert "Today Date: 26 Jul 2024\n" in derived.conversation.system_template
    assert derived.notes == ("the chat template writes the day; the package always says 26 July 2024",)


def test_plain_text_between_turns_is_what_replies_stop_at() -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
    conversation = derive(chats.chat(plain, end_ids=())).conversation
    assert (conversation.stop_str, conversation.stop_token_ids) == (["\nuser:"], [])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "the checkpoint has no chat_template"),
        (chats.SYSTEM_LAST, "it writes the system message after the first user message"),
        (chats.CHATML.replace("m['content']", "m['content'] + m['content']"), "it repeats the system message"),
        ("{{ messages[-1].content }}", "it leaves out the first user message"),
        (chats.NUMBERED, "it treats messages by what is around them\n--- tokenizer_config.json\n+++ as MLC would"),
        ("{% for m in messages %}", "tokenizer_config.json: chat_template, line 1: Unexpected end of template"),
        ("{{ messages[0].__class__.__mro__ }}", "tokenizer_config.json: chat_template: access to attribute"),
    ],
)
def test_what_mlc_cannot_express_is_refused(source: str | None, reason: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        derive(chats.chat(source))
    assert reason in str(error.value)


def test_an_inexpressible_template_says_what_to_do() -> None:
    with pytest.raises(MlcBuildError) as error:
        derive(chats.chat(chats.SYSTEM_LAST))
    assert str(error.value) == (
        "template auto: the chat template of tokenizer_config.json cannot be written as an MLC template: "
        "it writes the system message after the first user message\n"
        "Choose one of recipes/templates/, or write one there that comes close"
    )
