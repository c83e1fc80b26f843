"""Every template that ships, rendered as MLC's runtimes render it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlcbuild.chat.conversation import from_data, render
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Template

ROOT = Path(__file__).parents[2]
RENDERED: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "rendered.yaml").read_text(encoding="utf-8"))
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="module")
def templates() -> dict[str, Template]:
    return dict(load(ROOT).templates)


@pytest.mark.parametrize("name", RENDERED)
def test_a_conversation(name: str, templates: dict[str, Template]) -> None:
    prompt = render(from_data(name, templates[name].data), MESSAGES)
    assert (list(prompt.prefix_token_ids), prompt.text) == (RENDERED[name].get("ids", []), RENDERED[name]["text"])


def test_no_template_is_left_out(templates: dict[str, Template]) -> None:
    assert sorted(templates) == sorted(RENDERED)


def test_every_reply_can_end(templates: dict[str, Template]) -> None:
    for name, template in templates.items():
        assert template.data.get("stop_token_ids") or template.data.get("stop_str"), name


def test_every_file_says_where_its_facts_are_from() -> None:
    for path in (ROOT / "recipes" / "templates").iterdir():
        assert re.search(r"^# Source: \S+", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def row(name: str, template: Template) -> str:
    """One template in docs/templates.md: a turn and the beginning of the reply, the first tokens, what ends a reply."""
    conversation = from_data(name, {**template.data, "system_template": "", "messages": [], "function_string": "F"})
    turn = render(conversation, [{"role": "user", "content": "Hi"}]).text
    system = "yes" if template.data.get("system_message") else "–"
    ids, stop_ids = template.data.get("system_prefix_token_ids", []), template.data.get("stop_token_ids", [])
    stops = [code(text) for text in template.data.get("stop_str", [])] + [str(i) for i in stop_ids]
    cells = (code(name), code(turn), system, ", ".join(map(str, ids)) or "–", " ".join(stops))
    return f"| {' | '.join(cells)} |"


def code(text: str) -> str:
    """Text in a cell of a table: `⏎` is a new line, `·` a blank at an end."""
    shown = re.sub("^ +| +$", lambda blanks: "·" * len(blanks[0]), text).replace("\n", "⏎").replace("|", "\\|")
    return f"`{shown}`"


def test_the_table_of_the_docs(templates: dict[str, Template]) -> None:
    page = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8").splitlines()
    start = page.index("| template | a turn | system message | first tokens | a reply ends at |") + 2
    rows = [row(name, templates[name]) for name in sorted(templates, key=str.lower)]
    assert page[start : start + len(rows)] == rows, "the table should be:\n" + "\n".join(rows)
