"""From sampled tokens to text: characters in pieces, stop strings in pieces, draws that can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

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


def test_a_long_stop_string_costs_no_more_than_the_text() -> None:
    """All its beginnings were tried at every token, and a server's other texts waited."""
    long = "b" * 200_000
    assert "".join(streamed(lambda ids: "".join("ab"[i] for i in ids), [0, 1] * 50, [long])) == "ab" * 50
