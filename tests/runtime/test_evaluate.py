"""Quality figures against torch's own divergence and cross entropy, and the verdict on them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.tokenizer import JsonTokenizer
from mlcbuild.verify import bounds, evaluate, vector_bounds

VOCAB = 50
TEXTS = [list(range(20)), [3, 1, 4, 1, 5, 9, 2, 6], [7, 8]]
Logits = npt.NDArray[np.float32]


def model(seed: int, noise: float, piece: int) -> Callable[[Sequence[int]], Iterator[Logits]]:
    """A function of ids to random logits, in pieces; `noise` is the distance from the model of noise 0."""
    table = np.random.default_rng(0).normal(0, 3, (VOCAB, VOCAB))
    table += noise * np.random.default_rng(seed).normal(size=table.shape)

    def logits(ids: Sequence[int]) -> Iterator[Logits]:
        for start in range(0, len(ids), piece):
            yield table[list(ids[start : start + piece])].astype(np.float32)

    return logits


def torch_figures(q_of: Any, p_of: Any) -> dict[str, float]:
    import torch
    from torch.nn import functional

    rows = [(np.concatenate(list(q_of(ids)))[:-1], np.concatenate(list(p_of(ids)))[:-1], ids[1:]) for ids in TEXTS]
    q, p = (torch.tensor(np.concatenate([row[i] for row in rows]), dtype=torch.float64) for i in (0, 1))
    target = torch.tensor([token for row in rows for token in row[2]])
    return {
        "kl": functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True).item(),
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).double().mean().item(),
        "perplexity": functional.cross_entropy(q, target).exp().item(),
        "reference_perplexity": functional.cross_entropy(p, target).exp().item(),
        "tokens": len(target),
    }


@pytest.mark.parametrize("pieces", [(100, 100), (3, 5), (1, 100)])
def test_figures_are_torchs(pieces: tuple[int, int]) -> None:
    """However both models cut their rows into pieces."""
    q, p = model(1, 0.5, pieces[0]), model(1, 0, pieces[1])
    ours = evaluate.compare(q, p, TEXTS)
    theirs = torch_figures(q, p)
    assert theirs["kl"] > 0.05 and theirs["tokens"] == 27
    assert {name: getattr(ours, name) for name in theirs} == pytest.approx(theirs, rel=evaluate.error_bound(VOCAB))


def test_a_model_is_no_distance_from_itself() -> None:
    same = evaluate.rounded(evaluate.compare(model(1, 0.5, 4), model(1, 0.5, 7), TEXTS))
    assert (same["kl"], same["top1_agreement"], same["perplexity_increase"]) == (0, 1, 0)
    assert math.copysign(1, same["kl"]) == 1


def test_large_logits_do_not_overflow() -> None:
    def huge(ids: Sequence[int]) -> Iterator[Logits]:
        yield np.eye(VOCAB, dtype=np.float32)[list(ids)] * 3e4

    comparison = evaluate.compare(huge, huge, TEXTS)
    assert comparison.kl == 0 and math.isfinite(comparison.perplexity)


@pytest.mark.parametrize(("value", "whose"), [(math.nan, "package"), (math.inf, "package"), (-math.inf, "reference")])
def test_logits_that_are_not_finite(value: float, whose: str) -> None:
    def broken(ids: Sequence[int]) -> Iterator[Logits]:
        for i, piece in enumerate(model(1, 0, 4)(ids)):
            piece[1, 7] = value if i == 1 else 0
            yield piece

    good = model(1, 0, 100)
    ours, theirs = (broken, good) if whose == "package" else (good, broken)
    with pytest.raises(MlcBuildError, match=f"the {whose}'s logits are NaN or Inf: window 0 of .* text, position 5"):
        evaluate.compare(ours, theirs, TEXTS)


def test_a_text_with_nothing_to_predict() -> None:
    with pytest.raises(MlcBuildError, match="no document of two tokens or more"):
        evaluate.compare(model(1, 0, 4), model(1, 0, 4), list(evaluate.windows([[1], []], 8)))


def test_rounded_figures_do_not_show_another_cpus_noise() -> None:
    """Logits that differ by 1e-6, as two CPUs' float32 kernels do, give the same file."""
    p = model(1, 0, 100)
    figures = evaluate.rounded(evaluate.compare(model(1, 0.5, 100), p, TEXTS))
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 1e-6, (VOCAB, VOCAB)).astype(np.float32)

        def noisy(ids: Sequence[int], noise: Logits = noise) -> Iterator[Logits]:
            for piece in model(1, 0.5, 100)(ids):
                yield piece + noise[list(ids)]

        assert evaluate.rounded(evaluate.compare(noisy, p, TEXTS)) == figures


def test_how_figures_are_rounded() -> None:
    comparison = evaluate.Figures(0.051749, 0.87654, 12.3456, 11.9876, 312.7, 1000)
    assert evaluate.rounded(comparison) == {
        "kl": 0.052,
        "top1_agreement": 0.88,
        "perplexity": 12.3,
        "reference_perplexity": 12.0,
        "unigram_perplexity": 313.0,
        "perplexity_increase": 0.03,
        "tokens": 1000,
    }
    tiny = evaluate.rounded(evaluate.Figures(0.0000123, 0.9999, 12.0, 12.0001, 30.0, 10))
    assert (tiny["kl"], tiny["top1_agreement"], tiny["perplexity_increase"]) == (0, 1, 0)


def test_documents_stand_between_separators_where_these_are_tokens(tmp_path: Any, tokenizer: Any) -> None:
    """A model that was trained on documents behind `<|endoftext|>` has never seen one without."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = list(
        evaluate.documents("The sea<|endoftext|>\nwas green<|endoftext|>\n", JsonTokenizer(tmp_path / "tokenizer.json"))
    )
    assert found == [[0, *tokenizer.encode(text).ids, 0] for text in ("The sea", "was green")]


def test_long_documents_are_cut_into_windows() -> None:
    assert list(evaluate.windows([[1, 2, 3, 4, 5], [6, 7]], 2)) == [[1, 2], [3, 4], [6, 7]]


FIGURES = {
    "kl": 0.06,
    "top1_agreement": 0.9,
    "perplexity": 10.4,
    "reference_perplexity": 10.0,
    "unigram_perplexity": 300.0,
    "perplexity_increase": 0.04,
    "tokens": 1000,
}


Q4 = {"class": "q4", "model_dtype": "float16"}


def limits(kind: str, dtype: str = "float16", figures: dict[str, float] = FIGURES, **own: float) -> bounds.Bounds:
    return bounds.bounds({"class": kind, "model_dtype": dtype, **own}, figures)


def test_classes_have_their_own_bounds() -> None:
    verdicts = {kind: bounds.judge(FIGURES, limits(kind))[0] for kind in ("q0", "q8", "q4", "q3")}
    assert verdicts == {"q0": "failed", "q8": "failed", "q4": "warned", "q3": "passed"}
    assert limits("q0", "float32").fail_kl < limits("q0", "float16").fail_kl


def test_a_models_own_bounds() -> None:
    assert bounds.judge(FIGURES, limits("q4", kl=0.06))[0] == "passed"
    status, problems = bounds.judge(FIGURES, limits("q4", kl=0.05, perplexity_increase=0.02))
    assert status == "failed"
    assert problems == [
        "KL divergence 0.06 nats per token is above 0.05",
        "perplexity rises by 4.0%, more than 2.0%",
    ]


def test_a_miss_names_what_would_lose_less() -> None:
    said = bounds.advice(FIGURES, limits("q4"), Q4)
    assert "`q4f16_1-gptq` loses least in 4.5 bits a number, `q4f16_mixed` has 5 to 8, `q8f16_1` 8.5)" in said


@pytest.mark.parametrize("key", [*bounds.FINER, *bounds.FINER_BY_ITSELF])
def test_a_model_that_is_not_run_layer_by_layer_is_offered_no_rounding_that_does(key: tuple[str, str]) -> None:
    fields = {"class": key[0], "model_dtype": key[1], "by_layer": False}
    said = bounds.advice(FIGURES, bounds.bounds(fields, FIGURES), fields)
    assert "Use a finer quantization (`q" in said and "gptq" not in said and "calibrated" not in said


def test_what_is_named_is_stock() -> None:
    tables = (bounds.FINER, bounds.FINER_BY_ITSELF)
    names = {name for table in tables for said in table.values() for name in re.findall("`(.*?)`", said)}
    files = {path.stem for path in (Path(__file__).parents[2] / "recipes/quantizations").iterdir()}
    assert names | set(vector_bounds.FINER.values()) <= files


def test_a_reference_that_knows_nothing_is_no_reference() -> None:
    """FAULTS.md A3: both sides may be equal and worthless. A model's own bound takes the unigram's place."""
    lost = {**FIGURES, "kl": 0.0, "perplexity_increase": 0.0, "perplexity": 2050.0, "reference_perplexity": 2050.0}
    status, problems = bounds.judge(lost, limits("q4", figures=lost))
    assert (status, problems) == ("failed", ["the unquantized model itself has a perplexity of 2050, above 300"])
    said = bounds.advice(lost, limits("q4", figures=lost), Q4)
    assert "would give a perplexity of 300" in said and "finer quantization" not in said
    for place in (
        "which tensor is which",
        "rope: theta",
        "the tokenizer (another model's?)",
        "verify: {perplexity: ",
        "verify: {text: ",
    ):
        assert place in said
    assert bounds.judge(lost, limits("q4", figures=lost, perplexity=3000))[0] == "passed"
    poor = {**FIGURES, "kl": 0.0, "reference_perplexity": 80.0}
    status, (warning,) = bounds.judge(poor, limits("q4"))
    assert status == "warned" and "perplexity of 80, above 75: does it know this kind of text?" in warning
    assert bounds.judge(FIGURES, limits("q3", perplexity=9.9))[1] == [
        "the unquantized model itself has a perplexity of 10, above 9.9"
    ]


def test_a_text_of_four_words_says_nothing() -> None:
    """FAULTS.md A3."""
    few = {**FIGURES, "kl": 0.0, "tokens": 3}
    status, problems = bounds.judge(few, limits("q4"))
    assert (status, problems) == ("failed", ["the evaluation text gave 3 tokens to score, fewer than 256"])
    assert "Name a longer text in the model's YAML file: `verify: {text: ...}`" in bounds.advice(few, limits("q4"), Q4)


def test_the_unigram_is_that_of_the_tokens_that_are_scored() -> None:
    found = evaluate.compare(model(1, 0, 4), model(1, 0, 4), [[9, 1, 1, 2, 2], [9, 1, 2, 3, 3]])
    assert found.unigram_perplexity == pytest.approx(math.exp(1.5 * math.log(8 / 3) / 2 + math.log(4) / 4))


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_float32_is_within_the_bound_that_is_derived(scale: float) -> None:
    """FAULTS.md F: against float64, position by position, over a vocabulary of 262,144."""
    random = np.random.default_rng(0)
    p = (random.normal(size=(8, 1 << 18)) * scale).astype(np.float32)
    q = (p + random.normal(size=p.shape) * (scale / 10)).astype(np.float32)
    following = random.integers(0, 1 << 18, 8)
    divergence, _, q_surprise, p_surprise = evaluate._rows(q, p, following)

    def exact(logits: Logits) -> npt.NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    p_log, q_log = exact(p), exact(q)
    expected = (np.exp(p_log) * (p_log - q_log)).sum(axis=-1)
    assert np.abs(divergence - expected).max() <= evaluate.error_bound(1 << 18, float(expected.max()))
    for found, logs in ((q_surprise, q_log), (p_surprise, p_log)):
        assert np.abs(found + logs[np.arange(8), following]).max() <= evaluate.error_bound(1 << 18)


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    """FAULTS.md C."""
    path = tmp_path / "text.txt"
    path.write_bytes("Once upon a time\nein M\u00e4rchen".encode("latin-1"))
    with pytest.raises(MlcBuildError, match=r"text.txt, line 2: not UTF-8 \(byte 0xe4\): save the text as UTF-8"):
        evaluate.read_text(path)
