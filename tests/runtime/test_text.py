"""From sampled tokens to text: characters in pieces, stop strings in pieces, draws that can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mlcbuild.runtime import sampling
from mlcbuild.runtime.text import TextStream
from tests.runtime.conftest import TEXT


def streamed(decode: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(decode, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_characters_that_are_split_over_tokens(tokenizer: Any) -> None:
    """🦀 is three tokens here, none of them a character; nothing is shown before the last, and nothing wrong ever."""
    ids = tokenizer.encode("a🦀b").ids
    assert len(ids) == 5
    assert streamed(tokenizer.decode, ids) == ["a", "", "", "🦀", "b", ""]


def test_any_text_comes_out_as_it_went_in(tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(50):
        text = "".join(draw.choices(TEXT, k=30))
        assert "".join(streamed(tokenizer.decode, tokenizer.encode(text).ids)) == text


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Any) -> None:
    cut = tokenizer.encode("a🙂").ids[:-1]
    assert "".join(streamed(tokenizer.decode, cut)) == tokenizer.decode(cut)


def test_spaces_that_a_decoder_strips_at_the_beginning() -> None:
    """SentencePiece decoders drop the first word's space: a word decoded alone would run into the one before."""
    words = ["▁Once", "▁upon", "▁a", "▁time"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert streamed(decode, range(4)) == ["Once", " upon", " a", " time", ""]


def test_stop_strings_across_tokens() -> None:
    letters = "one\nUsual\nUser: no"
    pieces = streamed(lambda ids: "".join(letters[i] for i in ids), range(len(letters)), ["\nUser:"])
    assert "".join(pieces) == "one\nUsual"
    assert pieces[:4] == ["o", "n", "e", ""]  # the line end may be the beginning of a stop string
    assert pieces[6] == "\nUsu" if pieces[6] else "\nUsu" in pieces


def test_what_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    assert "".join(streamed(lambda ids: "".join("ab"[i] for i in ids), [0, 1], ["bc"])) == "ab"


LOGITS = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))


def draws(temperature: float, top_p: float, count: int = 4000) -> list[float]:
    generator = np.random.default_rng(0)
    tokens = [sampling.sample(LOGITS, temperature, top_p, generator) for _ in range(count)]
    return [tokens.count(i) / count for i in range(4)]


def test_temperature_zero_is_the_likeliest_token() -> None:
    assert draws(0, 1, count=10) == [0, 1, 0, 0]


def test_temperature_one_draws_by_probability() -> None:
    assert draws(1, 1) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)


def test_a_higher_temperature_flattens() -> None:
    flat = np.array([0.1, 0.5, 0.15, 0.25]) ** 0.5
    assert draws(2, 1) == pytest.approx(list(flat / flat.sum()), abs=0.03)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    """0.5 + 0.25 reaches 0.7; the others never come."""
    assert draws(1, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert draws(1, 0.0001) == [0, 1, 0, 0]
