"""A checkpoint's own programs, its chat template and its tokenizer, are bounded (FAULTS.md D)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.chat import apart
from mlcbuild.chat.jinja import ChatTemplate, read_chat_template
from mlcbuild.chat.tokenizer_info import read_tokenizer
from mlcbuild.errors import MlcBuildError

MESSAGES = [{"role": "user", "content": "hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def rendered(source: str) -> str:
    return ChatTemplate(source, "x.jinja").render(MESSAGES)


def refusal(source: str) -> str:
    with pytest.raises(MlcBuildError) as error:
        rendered(source)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (LOOP, "takes more than 1 seconds of a processor"),
        ("{{ 'a' * 4000000000 }}", "takes more than 1,073,741,824 bytes of memory"),
        ("{{ 'a'.ljust(4000000000) }}", "takes more than 1,073,741,824 bytes of memory"),
        ("{{ 'a' * 5000000 }}", "makes a text of more than 4,194,304 bytes"),
    ],
)
def test_templates_without_end(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    """FAULTS D: loops and long texts; siblings: `ljust`, and a text that is only long."""
    monkeypatch.setattr(apart, "SECONDS", 1)
    assert refusal(source) == (
        f"x.jinja: chat_template {reason}, for a conversation of a few lines: it is not one that can be used"
    )


@pytest.mark.slow  # it has five seconds of a processor
def test_a_template_without_end_for_tools_alone() -> None:
    template = ChatTemplate("{% if tools %}" + LOOP + "{% endif %}{{ messages[0].content }}\ud800", "x.jinja")
    assert template.with_tools(MESSAGES, []) == "hi\ud800"
    with pytest.raises(MlcBuildError, match=r"^x\.jinja: chat_template takes more than 5 seconds of a processor"):
        template.with_tools(MESSAGES, [{"type": "function"}])
    with pytest.raises(MlcBuildError, match=r"^x\.jinja: chat_template: no$"):
        ChatTemplate("{{ raise_exception('no') }}", "x.jinja").with_tools(MESSAGES, [])


def test_texts_and_refusals_come_back_as_they_are() -> None:
    assert rendered("{{ messages[0].content }}\ud800ä") == "hi\ud800ä"
    assert rendered("") == ""
    assert refusal("{{ raise_exception('no ä') }}") == "x.jinja: chat_template: no ä"
    assert refusal("{% for %}").startswith("x.jinja: chat_template, line 1: ")


def test_a_template_is_rendered_once_for_each_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{{ messages[0].content }}", "x.jinja")
    assert template.render(MESSAGES) == "hi"
    monkeypatch.delattr("os.fork")
    assert template.render(MESSAGES) == "hi"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a" * (1 << 20) + b"a", "chat_template.jinja: 1,048,577 bytes; a template has at most 1,048,576"),
        (b"ab\xff", "chat_template.jinja: byte 2 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_files_that_are_no_templates(tmp_path: Path, content: bytes, text: str) -> None:
    """FAULTS D, a sibling: a template that is megabytes."""
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(content)
    with pytest.raises(MlcBuildError) as error:
        read_chat_template({path.name: path})
    assert str(error.value) == text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_in_place_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    """FAULTS C: it was said to be no JSON."""
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(MlcBuildError) as error:
        read_tokenizer({name: tmp_path / name})
    assert str(error.value) == f"{name}: a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"


def tokenizer(path: Path, normalizer: Any) -> dict[str, Path]:
    content = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer": normalizer}
    path.write_text(json.dumps(content))
    return {"tokenizer.json": path}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = [replace({"String": "a"}, "a" * 10)] * 3


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": GROWING},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": GROWING}]},
        replace({"Regex": "x*"}, "a" * 1000),
        replace({"String": ""}, "a" * 1000),
    ],
)
def test_a_normalizer_that_grows(tmp_path: Path, normalizer: Any) -> None:
    with pytest.raises(MlcBuildError) as error:
        read_tokenizer(tokenizer(tmp_path / "tokenizer.json", normalizer))
    assert str(error.value).startswith("tokenizer.json: its normalizer may make a text ")
    assert str(error.value).endswith(" times as long, of at most 100 times: it is not one that can be used")


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFKC"},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]},
        {"type": "Sequence", "normalizers": [replace({"String": "``"}, '"'), replace({"Regex": " {2,}"}, " ")]},
    ],
)
def test_normalizers_as_they_are(tmp_path: Path, normalizer: Any) -> None:
    assert read_tokenizer(tokenizer(tmp_path / "tokenizer.json", normalizer)) is not None
