"""What is served is what `generate` writes, alone or with others at the same time: asked for by OpenAI's client."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from mlcbuild.runtime import Model
from mlcbuild.runtime.session import common
from mlcbuild.serve.engine import Engine
from tests.serve.conftest import held

MODEL = "tiny-cpu"
PROMPTS = ["The sea was", "Zoë and", "5 € a", "She sat by", "grey", "cup", "green and the sky", "日本", "T", "Å"]
HI: Any = [{"role": "user", "content": "Hi"}]


def complete(client: openai.OpenAI, prompt: Any, **settings: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 20, **settings})


def wait_until(true: Any) -> None:
    while not true():
        time.sleep(0.01)


def test_a_completion_is_generate_s_text(client: openai.OpenAI, tiny: Model) -> None:
    answer = complete(client, PROMPTS[0])
    ids = tiny.tokenizer.encode(PROMPTS[0])
    assert answer.choices[0].text == tiny.generate(PROMPTS[0], max_tokens=20) == complete(client, ids).choices[0].text
    writer = tiny.writer(PROMPTS[0], 20)
    assert "".join(tiny.pieces(writer)) and answer.choices[0].finish_reason == writer.finish_reason
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(writer.tokens))


def test_a_conversation_is_chat_s_text(client: openai.OpenAI, tiny: Model) -> None:
    messages: Any = [
        {"role": "developer", "content": "Sing."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None, "audio": None},
        {"role": "system", "content": "Loud."},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_completion_tokens=9, n=None
    )
    told = [{"role": "system", "content": "Sing.\n\nLoud."}, *HI]
    assert answer.choices[0].message.content == tiny.chat(told, max_tokens=9)
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI, tiny: Model) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, temperature=0, max_tokens=9, **options))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == tiny.chat("Hi", max_tokens=9) and len(texts) > 3
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
    pieces = [chunk.choices[0].text for chunk in complete(client, PROMPTS[1], stream=True)]
    assert "".join(pieces) == tiny.generate(PROMPTS[1], max_tokens=20)


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI, engine: Engine, tiny: Model) -> None:
    """Ten clients, three places: texts begin as others end, prompts of several chunks go in between."""
    prompts = [*PROMPTS, "sea " * 15]
    steps, tokens = engine.counts["steps"], engine.counts["completion_tokens"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        with held(engine):
            waiting = [pool.submit(complete, client, prompt) for prompt in prompts]
            wait_until(lambda: engine.waiting == len(prompts))
        texts = [each.result().choices[0].text for each in waiting]
    assert texts == [tiny.generate(prompt, max_tokens=20) for prompt in prompts]
    assert engine.counts["steps"] - steps < (engine.counts["completion_tokens"] - tokens) / 2
    assert engine.running == 0


def test_the_next_turn_computes_only_what_is_new(client: openai.OpenAI, engine: Engine, tiny: Model) -> None:
    """Other texts in between, as long as there is a place for all."""

    def answered(messages: Any) -> Any:
        return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=4)

    first: Any = [{"role": "user", "content": "b"}]
    reply = answered(first).choices[0].message.content
    complete(client, "grey")
    second: Any = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "c"}]
    computed = engine.counts["prompt_tokens"]
    answer = answered(second)
    assert answer.choices[0].message.content == tiny.chat(second, max_tokens=4)
    reused = answer.usage.prompt_tokens_details.cached_tokens
    assert reused > len(tiny.chat_prompt(first)) / 2
    assert engine.counts["prompt_tokens"] - computed == answer.usage.prompt_tokens - reused
    again = answered(second)  # all of it is there, and the last token is computed again
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_what_conversations_have_in_common_is_computed_once(client: openai.OpenAI, engine: Engine, tiny: Model) -> None:
    """A system message before other questions, one after another and all at once, more of them than places."""
    system = {"role": "system", "content": "Zoë and Åsa sat by the sea."}
    told: Any = [[system, {"role": "user", "content": text}] for text in ("a", "b", "c sea", "d", "a b", "€", "c s")]

    def answered(messages: Any) -> tuple[str, int]:
        found: Any = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=5)
        return found.choices[0].message.content, found.usage.prompt_tokens_details.cached_tokens

    expected = [tiny.chat(messages, max_tokens=5) for messages in told]
    prompts = [tiny.chat_prompt(messages) for messages in told]
    head = min(common(prompts[0], ids) for ids in prompts[1:])
    assert head > 20
    complete(client, ["grey", "cup", "日本"], max_tokens=1)  # nothing of this is there
    computed = engine.counts["prompt_tokens"]
    with ThreadPoolExecutor(len(told)) as pool:
        with held(engine):
            waiting = [pool.submit(answered, messages) for messages in told]
            wait_until(lambda: engine.waiting == len(told))
        found = [each.result() for each in waiting]
    assert [text for text, _ in found] == expected
    assert sum(reused >= head - 1 for _, reused in found) == len(told) - 1
    assert engine.counts["prompt_tokens"] - computed <= head + sum(len(ids) - head + 1 for ids in prompts)
    for messages, text in zip(told, expected, strict=True):
        again, reused = answered(messages)
        assert again == text and reused >= head - 1


def test_several_prompts_and_several_texts_of_each(client: openai.OpenAI, tiny: Model) -> None:
    answer = complete(client, PROMPTS[:2], n=2, temperature=1.5, seed=4, max_tokens=6)
    drawn = [tiny.generate(p, max_tokens=6, temperature=1.5, seed=s) for p in PROMPTS[:2] for s in (4, 5)]
    assert [choice.text for choice in answer.choices] == drawn
    assert answer.usage.prompt_tokens == sum(len(tiny.tokenizer.encode(prompt)) for prompt in PROMPTS[:2])
    streamed = ["", "", "", ""]
    for chunk in complete(client, PROMPTS[:2], n=2, temperature=1.5, seed=4, max_tokens=6, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == drawn


def test_stops_and_settings_reach_the_sampler(client: openai.OpenAI, tiny: Model) -> None:
    text = tiny.generate("The", max_tokens=20)
    answer = complete(client, "The", stop=["never", text[6:9]])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(text[6:9])], "stop")
    first = tiny.writer("The", 1)
    list(tiny.pieces(first))
    other = complete(client, "The", logit_bias={str(first.tokens[0]): -100}).choices[0].text
    assert other == tiny.generate("The", max_tokens=20, logit_bias={first.tokens[0]: -100}) != text
    drawn = complete(client, "The", temperature=2, seed=1, frequency_penalty=1.5, extra_body={"top_k": 9})
    assert drawn.choices[0].text == tiny.generate(
        "The", max_tokens=20, temperature=2, seed=1, frequency_penalty=1.5, top_k=9
    )


def test_log_probabilities_are_those_of_transformers(client: openai.OpenAI, reference: Any, tokenizer: Any) -> None:
    import torch

    answer = client.chat.completions.create(
        model=MODEL, messages=HI, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        expected = reference(torch.tensor([tokenizer.encode(text).ids])).logits[0, -1].log_softmax(0).topk(2)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    entry = answer.choices[0].logprobs.content[0]
    assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert entry.token == tokenizer.decode([int(expected.indices[0])]) == entry.top_logprobs[0].token
    assert len(answer.choices[0].logprobs.content) == 3
    banned: Any = {str(i): -100 for i in range(300) if i not in tokenizer.encode("日").ids[:1]}
    part = client.chat.completions.create(
        model=MODEL, messages=HI, temperature=0, max_tokens=1, logprobs=True, top_logprobs=0, logit_bias=banned
    )
    assert part.choices[0].logprobs.content[0].bytes is None  # type: ignore[index, union-attr]  # no whole character
    old = complete(client, "The", max_tokens=2, logprobs=1).choices[0].logprobs
    assert len(old.tokens) == 2 and old.top_logprobs[0][old.tokens[0]] == old.token_logprobs[0]
