"""Text that is not YAML, or that YAML readers would take for something else than was meant."""

from __future__ import annotations

import pytest

from mlcbuild.recipes import syntax
from tests.recipes.conftest import RECIPE, Workspace


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1:1: the file is empty"),
        ("# only a comment\n", "1:1: the file is empty"),
        (
            RECIPE + "overrides: {context_window_size: 64\n",
            "5:1: not valid YAML: did not find expected ',' or '}' while parsing a flow mapping that begins on line 4",
        ),
        ("model: tiny\n\ttarget: cpu\n", "2:1: not valid YAML: a tab is used for indentation; use spaces"),
        ("model: tiny: x\n", "1:12: not valid YAML: a second `: ` on this line; put the text in quotes"),
        ("model: @tiny\n", "1:8: not valid YAML: text cannot begin with this character; put it in quotes"),
        ("model: a\n---\nmodel: b\n", "2:1: not valid YAML: a file holds one document, here a second one begins"),
        ("model: *other\n", "1:8: not valid YAML: found undefined alias"),
        ("model: tiny\ntarget: c\x07pu\n", "2:10: not valid YAML: character U+0007 is not allowed"),
        (b"model: tiny\ntarget: \xffcpu\n", "2:9: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("model: tiny\n".encode("utf-16"), "1:1: byte 0xff is not UTF-8; save the file as UTF-8"),
        (RECIPE + "target: cpu\n", "4:1: key `target` is repeated: it stands on line 3 too; remove one of them"),
        (
            RECIPE + "overrides: {max_batch_size: 1, max_batch_size: 2}\n",
            "4:32: key `max_batch_size` is repeated: it stands on line 4 too; remove one of them",
        ),
        (RECIPE + "? [a]\n: b\n", "4:3: a key must be text, not a list or a mapping"),
        ("- model\n", "1:1: expected a mapping of keys to values"),
        ("just text\n", "1:1: expected a mapping of keys to values"),
        (
            RECIPE + "overrides: {max_batch_size: 1e999}\n",
            "4:29: `overrides.max_batch_size` is `1e999`, expected a whole number",
        ),
        (RECIPE.replace("cpu", "!thing cpu"), "3:9: tag `!thing` is not supported"),
    ],
)
def test_text_that_is_not_accepted(workspace: Workspace, text: str | bytes, problem: str) -> None:
    assert workspace.problem("bad.yaml", text) == problem


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!thing", "!!binary"])
def test_a_tag_is_refused(tag: str) -> None:
    _, faults = syntax.construct(syntax.compose(f"a: {tag} x"))
    assert [fault.text for fault in faults] == [f"tag `{tag}` is not supported"]


def test_an_alias_inside_itself_and_endless_nesting() -> None:
    _, faults = syntax.construct(syntax.compose("a: &x [*x]"))
    assert [fault.text for fault in faults] == ["an alias stands inside what it refers to"]
    with pytest.raises(syntax.Fault) as error:
        syntax.compose("[" * 5000)
    assert "not valid YAML" in error.value.text
    _, faults = syntax.construct(syntax.compose("[" * 900 + "]" * 900))
    assert [fault.text for fault in faults] in ([], ["nested too deeply"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),  # YAML 1.1 reads false
        ("on", "on"),
        ("1e-3", 1e-3),  # YAML 1.1 reads text
        ("12:30", "12:30"),  # YAML 1.1 reads 750
        ("2023-11-05", "2023-11-05"),  # YAML 1.1 reads a date
        ("0x10", "0x10"),
        (".inf", ".inf"),
        ("010", 10),  # YAML 1.1 reads 8
        ("-3", -3),
        (".5", 0.5),
        ("true", True),
        ("'true'", "true"),
        ("~", None),
        ("", None),
    ],
)
def test_what_a_scalar_means(text: str, value: object) -> None:
    data, faults = syntax.construct(syntax.compose(f"key: {text}\n"))
    assert not faults
    assert data == {"key": value} and type(data["key"]) is type(value)


def test_windows_line_ends_and_a_byte_order_mark_are_fine(workspace: Workspace) -> None:
    workspace.write("fine.yaml", b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert workspace.problems() == []
