"""How likely continuations and texts are, beside transformers' figures for the same weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.evaluation.commands import evaluate
from mlcbuild.evaluation.likelihood import continuations, first_token, of_text, windows
from mlcbuild.runtime import Model
from tests.runtime.conftest import TEXT

CLOSE = 2e-3  # nats: the library's KV cache is float16


def expected(reference: Any, given: Sequence[int], wanted: Sequence[int]) -> tuple[float, bool]:
    import torch

    with torch.no_grad():
        logits = reference(torch.tensor([[*given, *wanted][:-1]])).logits[0, len(given) - 1 :]
    chosen = torch.log_softmax(logits.double(), -1)[range(len(wanted)), list(wanted)]
    return float(chosen.sum()), bool((logits.argmax(-1) == torch.tensor(wanted)).all())


def test_continuations_are_transformers_whatever_they_share(tiny: Model, reference: Any) -> None:
    ids = tiny.tokenizer.encode(TEXT)
    greedy = tiny.writer(ids[:9], 3)
    list(tiny.pieces(greedy))
    pairs = [
        (ids[:20], ids[20:24]),
        (ids[:20], ids[30:31]),
        (ids[:9], greedy.tokens),
        (ids[:1], ids[1:40]),
        (ids[:20], ids[20:23]),
        (ids[5:7], []),
    ]
    found = continuations(tiny, pairs)
    for judged, (given, wanted) in zip(found[:-1], pairs, strict=False):
        log_probability, likeliest = expected(reference, given, wanted)
        assert judged.log_probability == pytest.approx(log_probability, abs=CLOSE * len(wanted))
        assert judged.likeliest == likeliest
    assert found[2].likeliest and not found[3].likeliest
    assert (found[-1].log_probability, found[-1].likeliest) == (0.0, True)


def test_what_does_not_fit_loses_its_beginning_or_is_refused(tiny: Model, reference: Any) -> None:
    limit = tiny.context_window_size
    ids = (tiny.tokenizer.encode(TEXT) * 3)[: limit + 10]
    (judged,) = continuations(tiny, [(ids[:-3], ids[-3:])])
    log_probability, _ = expected(reference, ids[9:-3], ids[-3:])
    assert judged.log_probability == pytest.approx(log_probability, abs=3 * CLOSE)
    with pytest.raises(
        MlcBuildError, match=rf"^{limit + 1} tokens are to be judged at once, and .* context is {limit}$"
    ):
        continuations(tiny, [(ids[:1], ids[: limit + 1])])
    with pytest.raises(MlcBuildError, match=r"^nothing is given before a text that is to be judged"):
        continuations(tiny, [([], ids[:2])])


@pytest.mark.parametrize(("count", "size"), [(2, 5), (11, 5), (12, 5), (6, 5), (5, 1)])
def test_windows_judge_every_token_once_and_read_as_many_as_they_may(count: int, size: int) -> None:
    pairs = list(windows(range(count), size))
    assert [i for _, wanted in pairs for i in wanted] == list(range(1, count))
    assert all(list(given) + list(wanted) == list(range(given[0], wanted[-1] + 1)) for given, wanted in pairs)
    assert all(len(given) + len(wanted) - 1 == min(size, wanted[-1]) for given, wanted in pairs)


def test_a_text_is_as_likely_as_its_tokens(tiny: Model, reference: Any) -> None:
    figures = of_text(tiny, TEXT)
    first = first_token(tiny)
    assert first is not None
    ids = [first, *tiny.tokenizer.encode(TEXT, add_special_tokens=False)]
    total = sum(expected(reference, *pair)[0] for pair in windows(ids, tiny.context_window_size))
    assert figures.tokens == len(ids) - 1
    assert math.log(figures.perplexity) == pytest.approx(-total / figures.tokens, abs=CLOSE)
    assert figures.bits_per_byte == pytest.approx(-total / math.log(2) / len(TEXT.encode()), abs=CLOSE)
    with pytest.raises(MlcBuildError, match=r"^the text has no token to judge$"):
        of_text(tiny, "")


def test_bad_words_are_told(tiny_package: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for settings, said in (
        ({"few_shot": -1}, "--few-shot is -1: expected 0 or more"),
        ({"limit": 0}, "--limit is 0: expected 1 or more"),
        ({"include": tmp_path / "no"}, f"--include {tmp_path}/no: no such folder; it holds tasks as YAML files"),
        ({"text": [tmp_path / "latin"]}, f"{tmp_path}/latin, line 1: not UTF-8 (byte 0xe9): save the text as UTF-8"),
        (
            {"text": [tmp_path / "latin"], "limit": 3},
            "--limit is for tasks, and with --text alone none is asked: name some with --tasks",
        ),
        ({"tasks": " ,"}, "--tasks names no task"),
    ):
        with pytest.raises(MlcBuildError) as raised:
            evaluate(tiny_package, **settings)
        assert str(raised.value) == said
