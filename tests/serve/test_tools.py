"""Functions that a model may call: told by the checkpoint's template, their calls read out of what is written."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import load
from mlcbuild.serve.engine import Engine, Limits
from mlcbuild.serve.grammar import Grammars
from mlcbuild.serve.protocol import Tool
from mlcbuild.serve.tools import Calls, grammar
from tests.serve.conftest import KEY, serving

TAGS = (
    "{% for t in tools or [] %}{{ t.function.name }}: <tool_call>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OBJECT = '{# {"name": …, "parameters": …} #}' + TAGS.replace("<tool_call>", "")
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
NAMES = frozenset({"f", "g"})
HI: Any = [{"role": "user", "content": "Hi"}]
CALLED: Any = [
    *HI,
    {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "€"},
]


@pytest.fixture(scope="module")
def clients(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, openai.OpenAI]]:
    """Servers of the tiny model, with a template for each habit of calling."""
    found = {}
    with contextlib.ExitStack() as stack:
        for name, template in (("tags", TAGS), ("object", OBJECT)):
            package = tmp_path_factory.mktemp(name) / "tiny-cpu"
            shutil.copytree(tiny_package, package)
            (weights,) = package.glob("*-MLC")
            (weights / "chat_template.jinja").write_text(template)
            url = stack.enter_context(serving(Engine(load(package, threads=1), Limits(chunk=16)), "tiny-cpu"))
            found[name] = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0))
        yield found


def ask(client: openai.OpenAI, messages: Any = HI, **settings: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 50, **settings}
    return client.chat.completions.create(model="tiny-cpu", messages=messages, **options)


def read(calls: Calls, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    deltas = [delta for piece in pieces for delta in calls.feed(piece)] + list(calls.end())
    made = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in made] == list(range(len(made)))
    assert len({call["id"] for call in made}) == len(made)
    said = "".join(delta.get("content", "") for delta in deltas)
    return said, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in made]


ONE = '<tool_call>\n{"name": "f", "arguments": {"x": "<tool"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("tags", "text", "said", "made"),
    [
        (True, "a <b> c", "a <b> c", []),
        (True, f"Wait.\n{ONE}\n{ONE}\n", "Wait.\n", [("f", {"x": "<tool"})] * 2),
        (True, f"{ONE}Done.", "Done.", [("f", {"x": "<tool"})]),
        (True, ONE.removesuffix("</tool_call>"), "", [("f", {"x": "<tool"})]),  # it forgot to close it
        (True, "<tool_call>{oops}</tool_call>", "<tool_call>{oops}</tool_call>", []),
        (True, '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        (True, "it ends <tool_c", "it ends <tool_c", []),
        (True, '<tool_call>{"name": "g"}</tool_call>', "", [("g", {})]),
        (True, f"{ONE}\nHello \n world \n{ONE}\n", "\nHello \n world", [("f", {"x": "<tool"})] * 2),
        (
            True,
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
            "",
            [("f", {"x": "</tool_call>"})],
        ),
        (True, f"<tool_call>{{oops}}</tool_call> {ONE}", "<tool_call>{oops}</tool_call> ", [("f", {"x": "<tool"})]),
        (True, '<tool_call>{"name": "other"}</tool_call>', '<tool_call>{"name": "other"}</tool_call>', []),
        (
            True,
            '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
            '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
            [],
        ),
        (True, '<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>', "", [("f", {"x": "\ud83d"})]),
        (False, '{"name": "Alice", "age": 30}', '{"name": "Alice", "age": 30}', []),
        (False, '{"name": "f"}', '{"name": "f"}', []),
        (False, "[" * 5000, "[" * 5000, []),
        (False, '\n{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        (False, 'See {"name": "f"}', 'See {"name": "f"}', []),
        (False, '{"x": 1}', '{"x": 1}', []),
        (False, '{"name": "f", "parameters": 3}', '{"name": "f", "parameters": 3}', []),
        (False, " \n", " \n", []),
    ],
)
def test_calls_are_read_however_the_text_comes(tags: bool, text: str, said: str, made: list[Any]) -> None:
    dice = random.Random(0)
    for _ in range(20):
        cuts = sorted(dice.sample(range(1, len(text)), dice.randint(0, len(text) - 1)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(Calls(tags, NAMES), pieces) == (said, made), pieces


@pytest.mark.parametrize("tags", [True, False])
def test_a_call_that_must_be_made_is_no_text_whatever_is_in_it(tags: bool) -> None:
    """The tags of calls in its texts, numbers past float64, and others behind it."""
    arguments = '{"x": "a</tool_call>\\n<tool_call>{</tool_call>", "y": [1e999, -1E+400, 7, 1.50]}'
    one = f'{{"name": "f", "{"arguments" if tags else "parameters"}": {arguments}}}'
    text = f"<tool_call>\n{one}\n</tool_call>\n{ONE}" if tags else one
    values = {"x": "a</tool_call>\n<tool_call>{</tool_call>", "y": [math.inf, -math.inf, 7, 1.5]}
    made = [("f", values), ("f", {"x": "<tool"})][: 1 + tags]
    for size in (1, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        assert read(Calls(tags, NAMES, forced=True), pieces) == ("", made)
    calls = Calls(tags, NAMES, forced=True)
    call = [*calls.feed(text), *calls.end()][0]["tool_calls"][0]
    assert call["function"]["arguments"] == arguments


def test_a_template_that_gives_no_text_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlcbuild.chat.jinja._PATIENCE", 0.01)
    with pytest.raises(MlcBuildError, match=r"^here: chat_template: no text within 0.01 seconds$"):
        ChatTemplate(TAGS, "here").with_tools(HI, TOOLS)


def test_one_call_at_a_time() -> None:
    assert read(Calls(True, NAMES, several=False), [ONE, "\n", ONE, " and "]) == ("", [("f", {"x": "<tool"})])


def test_text_is_not_held_back_that_cannot_be_a_call() -> None:
    calls = Calls(True, NAMES)
    assert [list(calls.feed(text)) for text in ("a <", "b <tool", "s")] == [
        [{"content": "a "}],
        [{"content": "<b "}],
        [{"content": "<tools"}],
    ]


def test_the_prompt_is_the_checkpoint_s_template(
    clients: Mapping[str, openai.OpenAI], tiny: Any, tokenizer: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for messages, settings, tools in (
        (HI, {"tools": TOOLS}, TOOLS),
        (CALLED, {"tools": TOOLS}, TOOLS),
        (CALLED, {}, None),
    ):
        known = [{"content": "", **message} for message in messages]
        for message in known:
            if "tool_calls" in message:
                message["tool_calls"] = [{"function": {"name": "f", "arguments": {"x": 5}}}]
        ids = theirs.apply_chat_template(
            known, tools=tools, chat_template=TAGS, add_generation_prompt=True, return_dict=False
        )
        answer = ask(clients["tags"], messages, max_tokens=6, **settings)
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.choices[0].message.content == tiny.generate(ids, max_tokens=6)
    unheard = ask(clients["tags"], tools=TOOLS, tool_choice="none", max_tokens=6)
    assert unheard.usage.prompt_tokens < len(ids)


def test_a_call_that_is_written_is_told_as_one(clients: Mapping[str, openai.OpenAI]) -> None:
    """A schema makes the tiny model, which knows nothing, write what a good one would."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"const": "f"},
            "parameters": {"type": "object", "properties": {"x": {"const": 7}}, "required": ["x"]},
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    settings: Any = {
        "tools": TOOLS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}},
    }
    (choice,) = ask(clients["object"], **settings).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)["x"]) == ("function", "f", 7)
    chunks = [chunk.choices[0] for chunk in ask(clients["object"], **settings, stream=True)]
    made = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name, json.loads(call.function.arguments)) for call in made] == [
        (0, "f", {"x": 7})
    ]
    assert chunks[-1].finish_reason == "tool_calls"
    (choice,) = ask(clients["object"], **settings, tool_choice="none").choices
    assert choice.message.tool_calls is None and json.loads(choice.message.content)["name"] == "f"
    assert not any(chunk.delta.content for chunk in chunks)


def named(function: str) -> Any:
    return {"type": "function", "function": {"name": function}}


def test_a_call_that_must_be_is_one_that_fits(clients: Mapping[str, openai.OpenAI]) -> None:
    """Whatever the model would rather write. References are to what a tool's own schema defines."""

    def tool(name: str, values: list[int]) -> Any:
        schema = {"properties": {"x": {"$ref": "#/$defs/one"}}, "required": ["x"], "$defs": {"one": {"enum": values}}}
        return {"type": "function", "function": {"name": name, "parameters": {**schema, "additionalProperties": False}}}

    settings: Any = {"tools": [tool("f", [1, 2]), tool("é", [3])], "parallel_tool_calls": False}
    for choice, possible in ((named("é"), {3}), (named("f"), {1, 2}), ("required", {1, 2, 3})):
        (answer,) = ask(clients["object"], **settings, tool_choice=choice).choices
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        made = json.loads(call.function.arguments)["x"]
        assert made in possible and call.function.name == ("f" if made < 3 else "é")
    chunks = [c.choices[0].delta for c in ask(clients["object"], **settings, tool_choice="required", stream=True)]
    assert sum(len(delta.tool_calls or ()) for delta in chunks) == 1 and not any(delta.content for delta in chunks)


def test_calls_between_tags_are_what_the_grammar_takes(tiny: Any) -> None:
    def taken(text: str, several: bool) -> bool:
        lark = grammar(ChatTemplate(TAGS, "x.jinja"), [Tool.model_validate(tool) for tool in TOOLS], several)
        followed = Grammars(tiny).following(lark)
        for token in tiny.tokenizer.encode(text):
            if not followed.allowed()[token]:
                return False
            followed.accept(token)
        return bool(followed.allowed()[0] or not followed.allowed().any())  # it may end here

    call = '<tool_call>\n{"name": "f", "arguments": {"x": 5}}\n</tool_call>'
    assert taken(call, False) and taken(f"{call}\n{call}", True)
    assert not taken(f"{call}\n{call}", False) and not taken("5", True)
    assert not taken(call.replace("5", '"a"'), True) and not taken(call.replace('"f"', '"g"'), True)


def test_what_cannot_be_is_refused(clients: Mapping[str, openai.OpenAI], client: openai.OpenAI) -> None:
    wrong = [{**CALLED[1], "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1"}}]}]
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"a": schema}
    deep = [{"type": "function", "function": {**FUNCTION, "parameters": schema}}]
    large = [{"type": "function", "function": {**FUNCTION, "description": "x" * 300_000}}]
    strict = {"type": "function", "function": {**FUNCTION, "strict": True}}
    odd = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    unknown = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "$ref": "#/no such thing"}},
    }
    long = [{"type": "function", "function": {**FUNCTION, "name": "f" * 64}}] * 128
    for asked, settings, said in (
        (client, {"tools": TOOLS}, "tools: the chat template of this package's checkpoint has no place for them"),
        (clients["tags"], {"tool_choice": "required"}, "tool_choice: `required` needs `tools`: name at least one"),
        (
            clients["tags"],
            {"tools": TOOLS, "tool_choice": named("g")},
            "tool_choice: no tool is called g; there are: f",
        ),
        (
            clients["tags"],
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice: an answer that must be a call cannot fit a response_format as well",
        ),
        (clients["tags"], {"tools": [strict]}, "tools: `strict` needs a `tool_choice` of `required`"),
        (clients["tags"], {"tools": [odd], "tool_choice": "required"}, "tools: the parameters of f must be of type"),
        (
            clients["tags"],
            {"tools": [unknown], "tool_choice": "required"},
            "tool_choice: .*no such thing",
        ),
        (clients["tags"], {"tools": deep}, "tools: more than 32 levels in each other"),
        (clients["tags"], {"tools": large}, "tools: .* characters as JSON; at most 262,144 are taken"),
        (clients["tags"], {"tools": long}, "the prompt has .* characters, too many for this server's window of 96"),
        (clients["tags"], {"messages": [*HI, *wrong]}, "messages: the arguments of a call of f are no JSON object"),
        (clients["tags"], {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: "),
    ):
        with pytest.raises(openai.BadRequestError, match=said.replace("(", r"\(")):
            ask(asked, **settings)
