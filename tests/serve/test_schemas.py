"""Answers that fit a JSON schema, checked by jsonschema; whatever the model would like to write."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.serve.test_answers import HI, MODEL

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 4}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


def wanted(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 2, "seed": 5, "n": 3, "top_p": 0.9}], ids=str)
def test_an_answer_fits_its_schema(client: openai.OpenAI, settings: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, response_format=wanted(SCHEMA), **settings)
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and choice.message.content is not None
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_json_object_and_its_stream(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    stream = client.chat.completions.create(model=MODEL, messages=HI, response_format=form, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).startswith("{")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (wanted({"type": "nothing"}), "response_format: Invalid type: nothing"),
        ({"type": "json_schema"}, "response_format.json_schema: Field required"),
        ({"type": "yaml"}, "response_format.type: Input should be 'text', 'json_object' or 'json_schema'"),
    ],
    ids=["schema", "none", "type"],
)
def test_what_is_no_schema_is_said(client: openai.OpenAI, form: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=HI, response_format=form)
    assert error.value.body["message"].startswith(said)  # type: ignore[index]
