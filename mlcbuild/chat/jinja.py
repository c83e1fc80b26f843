"""A tokenizer's own `chat_template`: Jinja, run in the sandbox and with the helpers that transformers gives it.

Names and their meaning are those of transformers' `apply_chat_template` (its documentation, "Chat templates").
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlcbuild.chat.apart import text_of
from mlcbuild.chat.tokenizer_info import CONFIG, read_json, special_tokens
from mlcbuild.errors import MlcBuildError

CHAT_TEMPLATE = "chat_template.jinja"
LONGEST_TEMPLATE = 1 << 20  # bytes of its file
_PATIENCE = 60  # seconds for a process of its own, which may compute for five of them

# A package is the same whenever it is built, so a template that asks for the day always gets this one: the day that
# Llama 3.1's template itself falls back to.
DAY = datetime.datetime(2024, 7, 26)


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source, the file it is from, and the texts of `bos_token` and the like that it may name."""

    source: str
    origin: str
    special: Mapping[str, str] = field(default_factory=dict)
    # What was rendered: every named template is compared with the same few conversations.
    known: dict[str, str | MlcBuildError] = field(default_factory=dict, compare=False, repr=False)

    @property
    def asks_for_the_day(self) -> bool:
        return "strftime_now" in self.source

    def render(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> str:
        """The text of `messages`; with `reply`, up to where the assistant is to write.

        Raises MlcBuildError where the template refuses these messages, where it is no valid Jinja, and where it takes
        more time or memory than any conversation does.
        """
        asked = json.dumps([messages, reply], default=dict)
        if asked not in self.known:
            try:
                self.known[asked] = text_of(lambda: self._render(messages, reply), f"{self.origin}: chat_template")
            except MlcBuildError as error:
                self.known[asked] = error
        found = self.known[asked]
        if isinstance(found, MlcBuildError):
            raise MlcBuildError(str(found))
        return found

    def with_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """The text of `messages` up to where the assistant is to write, and of functions that it may call (JSON schemas
        as OpenAI and transformers have them).

        In a new process, as a server with its threads must not fork: it takes a tenth of a second. Raises MlcBuildError
        as `render` does.
        """
        asked = {"source": self.source, "origin": self.origin, "special": dict(self.special)}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", __name__],
                input=json.dumps([asked, messages, tools]),
                capture_output=True,
                text=True,
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise MlcBuildError(f"{self.origin}: chat_template: no text within {_PATIENCE} seconds") from None
        try:
            text, refused = json.loads(done.stdout)
        except ValueError:
            said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise MlcBuildError(f"{self.origin}: chat_template: {said[-1]}") from None
        if refused:
            raise MlcBuildError(text)
        return str(text)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], reply: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        names = {**self.special, "tools": tools or None, "documents": None}
        try:
            template = _environment().from_string(self.source)
            return template.render(messages=[dict(m) for m in messages], add_generation_prompt=reply, **names)
        except jinja2.TemplateSyntaxError as error:
            raise MlcBuildError(f"{self.origin}: chat_template, line {error.lineno}: {error.message}") from None
        except MemoryError:
            raise
        # A template can fail as any program can: a missing key, a wrong type, a call that the sandbox refuses.
        except Exception as error:
            raise MlcBuildError(f"{self.origin}: chat_template: {error}") from None


def read_chat_template(files: Mapping[str, Path], names: Sequence[str] = ("default",)) -> ChatTemplate | None:
    """The template of a checkpoint's files (name -> path): chat_template.jinja, or a field of tokenizer_config.json.

    Where that field has several by name, the first of `names` that is there. None where the checkpoint has none (base
    models, and models from before 2023). Raises MlcBuildError.
    """
    config, special = read_json(files[CONFIG]) if CONFIG in files else {}, special_tokens(files)
    if CHAT_TEMPLATE in files:
        return ChatTemplate(_text(files[CHAT_TEMPLATE]), CHAT_TEMPLATE, special)
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name, such as `default` and `tool_use`
        named = (
            i for i in found if isinstance(i, dict) and all(isinstance(i.get(k), str) for k in ("name", "template"))
        )
        known = {item["name"]: item["template"] for item in named}
        found = next((known[name] for name in names if name in known), None)
    return ChatTemplate(found, CONFIG, special) if isinstance(found, str) and found else None


def _text(path: Path) -> str:
    if path.stat().st_size > LONGEST_TEMPLATE:
        raise MlcBuildError(f"{path.name}: {path.stat().st_size:,} bytes; a template has at most {LONGEST_TEMPLATE:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MlcBuildError(f"{path.name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


class _Generation(Extension):
    """`{% generation %}` marks what training counts as the assistant's; the text inside is what it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=DAY.strftime)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _answer() -> None:
    """`with_tools` in this process, and within the bounds of `apart`: JSON comes in and goes out."""
    asked, messages, tools = json.load(sys.stdin)
    template = ChatTemplate(**asked)
    try:
        text = text_of(lambda: template._render(messages, True, tools), f"{template.origin}: chat_template")
        found = (text, False)
    except MlcBuildError as error:
        found = (str(error), True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _answer()
