"""Conversations rendered as their models were trained to read them, and as MLC's runtimes render them."""

from __future__ import annotations

from typing import Any

import pytest

from mlcbuild.chat.conversation import Conversation, from_data, render
from mlcbuild.errors import MlcBuildError

CHATML: dict[str, Any] = {
    "system_template": "<|im_start|>system\n{system_message}<|im_end|>\n",
    "system_message": "Be kind.",
    "roles": {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"},
    "seps": ["<|im_end|>\n"],
    "role_content_sep": "\n",
    "role_empty_sep": "\n",
    "stop_str": ["<|im_end|>"],
    "stop_token_ids": [2],
}
LLAMA_2: dict[str, Any] = {
    "system_template": "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n",
    "system_message": "Be kind.",
    "roles": {"user": "<s>[INST]", "assistant": "[/INST]", "tool": "[INST]"},
    "seps": [" ", " </s>"],
    "role_content_sep": " ",
    "role_empty_sep": " ",
    "stop_str": ["[INST]"],
    "stop_token_ids": [2],
    "system_prefix_token_ids": [1],
    "add_role_after_system_message": False,
}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Who are you?"},
]
# The template that ChatML models carry in tokenizer_config.json.
JINJA = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chatml_is_what_transformers_renders() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=JINJA)
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    for reply in (True, False):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        assert render(from_data("chatml", CHATML), messages, reply).text == theirs


def test_the_templates_own_system_message() -> None:
    text = render(from_data("chatml", CHATML), TURNS[:1]).text
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_first_role_inside_the_system_message() -> None:
    """Llama 2: the first user message goes into the brackets that the system message opened; `<s>` is a token id."""
    prompt = render(from_data("llama-2", LLAMA_2), TURNS)
    assert prompt.prefix_token_ids == (1,)
    assert prompt.text == (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Who are you? [/INST] "
    )


def test_no_system_message() -> None:
    plain = from_data(
        "plain", {"roles": {"user": "USER", "assistant": "ASSISTANT"}, "seps": ["\n"], "role_content_sep": ": "}
    )
    assert render(plain, TURNS[:1]).text == "USER: Hi\nASSISTANT"


def test_role_templates_and_example_turns() -> None:
    data = {**CHATML, "role_templates": {"user": "({user_message})"}, "messages": [["user", "1+1"], ["assistant", "2"]]}
    text = render(from_data("x", data), TURNS[:1], reply=False).text
    assert text.endswith(
        "<|im_start|>user\n(1+1)<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n(Hi)<|im_end|>\n"
    )


def test_content_that_looks_like_a_placeholder_is_content() -> None:
    messages = [{"role": "user", "content": "what is {assistant_message} and {system_message}?"}]
    assert "what is {assistant_message} and {system_message}?" in render(from_data("chatml", CHATML), messages).text


def test_reasoning_is_left_out_of_history_but_not_of_the_last_reply() -> None:
    data = {**CHATML, "strip_reasoning_in_history": True}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>\n\nA"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "<think>so</think>\n\nB"},
    ]
    text = render(from_data("qwen3", data), messages, reply=False).text
    assert "assistant\nA<|im_end|>" in text and "<think>so</think>\n\nB" in text


def test_functions_take_the_last_placeholder() -> None:
    data = {
        **CHATML,
        "system_message": "{function_string}",
        "role_templates": {"user": "{user_message} {function_string}"},
    }
    text = render(from_data("gorilla", {**data, "function_string": "[f]"}), TURNS[:1]).text
    assert "system\n<|im_end|>" in text and "user\nHi [f]<|im_end|>" in text


def test_conv_template_has_every_field_in_mlcs_order() -> None:
    fields = from_data("chatml", CHATML).to_json()
    assert list(fields) == [
        *("name", "system_template", "system_message", "system_prefix_token_ids", "add_role_after_system_message"),
        *("roles", "role_templates", "messages", "seps", "role_content_sep", "role_empty_sep"),
        *("stop_str", "stop_token_ids", "strip_reasoning_in_history", "function_string", "use_function_calling"),
    ]
    assert fields["role_templates"] == {
        "user": "{user_message}",
        "assistant": "{assistant_message}",
        "tool": "{tool_message}",
    }
    assert fields["system_prefix_token_ids"] is None and fields["messages"] == []


def test_a_published_conv_template_can_be_read_back() -> None:
    written = from_data("llama-2", LLAMA_2)
    assert render(from_data("llama-2", written.to_json()), TURNS) == render(written, TURNS)
    assert isinstance(from_data("old", {**LLAMA_2, "offset": 0, "separator_style": 0}), Conversation)


def test_mistakes_are_named() -> None:
    with pytest.raises(MlcBuildError, match="template x: `roles` must name user and assistant"):
        from_data("x", {"roles": {"user": "U"}})
    with pytest.raises(MlcBuildError, match="template x: `seps` has 3 entries, expected 1 or 2"):
        from_data("x", {**CHATML, "seps": ["a", "b", "c"]})
    with pytest.raises(MlcBuildError, match="template chatml: no role `tool`; there are user, assistant and system"):
        render(from_data("chatml", CHATML), [{"role": "tool", "content": "4"}])
