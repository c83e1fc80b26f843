"""LiteLLM as a client: what many tools ask such servers through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlcbuild.runtime import Model
from tests.serve.conftest import KEY


@pytest.mark.slow  # to import it takes seconds
def test_litellm_reads_what_is_served(address: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices
    import litellm

    def ask(**settings: Any) -> Any:
        return litellm.completion(
            model="openai/tiny-cpu",
            messages=[{"role": "user", "content": "Hi"}],
            api_base=f"{address}/v1",
            api_key=KEY,
            temperature=0,
            max_tokens=12,
            num_retries=0,
            **settings,
        )

    expected = tiny.chat("Hi", max_tokens=12)
    answer = ask()
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(tiny.chat_prompt("Hi"))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)) == expected
    fitting = ask(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}})
    assert json.loads(fitting.choices[0].message.content) == 7
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        ask(top_p=7)
    with pytest.raises(litellm.NotFoundError, match="no model `other` here"):
        litellm.completion(
            model="openai/other", messages=[{"role": "user", "content": "Hi"}], api_base=f"{address}/v1", api_key=KEY
        )
