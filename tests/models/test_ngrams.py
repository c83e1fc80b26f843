"""Hashes of n-grams in 32 bits, against Python's whole numbers; transformers computes them in test_agreement.py."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.ngrams import NGrams
from tests.architectures import hybrid_cases
from tests.architectures.agreement import config_of
from tests.support import llama

BASE = 20_000_000
SIZES = {"heads": 3, "multiple": 128, "seed": 1234, "end": 7, "width": 96, "kernel": 4, "shards": 2}


@pytest.mark.parametrize(("size", "vocab_size", "base"), [(3, 248_320, BASE), (2, 96, 50), (4, 1 << 24, (1 << 26))])
def test_rows_are_those_of_whole_numbers(size: int, vocab_size: int, base: int) -> None:
    """Tokens up to the last of a vocabulary, tables up to those of Qwen4-Exp and beyond."""
    import tvm
    from tvm import te

    from mlcbuild.models.hybrid import ngrams

    g = NGrams(size, base=base, vocab_size=vocab_size, **SIZES)
    ids = np.random.default_rng(2).integers(0, vocab_size, (40, size)).astype(np.int32)
    ids[0] = vocab_size - 1
    seen, factors = te.placeholder(ids.shape, "int32", "seen"), ngrams.limbs(g, 2)
    given = te.placeholder(factors.shape, "int32", "factors")
    lengths = np.array(g.lengths(2), np.int32)
    parts, starts = (te.placeholder(lengths.shape, "int32", name) for name in ("parts", "starts"))
    made = ngrams._products(g, seen, given)
    rows = ngrams._rows(g, made, parts, starts)
    run = tvm.compile(te.create_prim_func([seen, given, parts, starts, rows]), "llvm")
    out = tvm.runtime.tensor(np.zeros(40 * g.parts, np.int32))
    run(*(tvm.runtime.tensor(each) for each in (ids, factors, lengths, np.zeros_like(lengths))), out)
    hashes = partial(_hash, g.factors(2))
    expected = [
        hashes(row[: n + 2]) % int(lengths[n * g.heads + head])
        for row in ids.tolist() for n in range(size - 1) for head in range(g.heads)
    ]  # fmt: skip
    assert out.numpy().tolist() == expected


def _hash(factors: tuple[int, ...], tokens: list[int]) -> int:
    found = 0
    for token, factor in zip(tokens, factors, strict=False):
        assert token * factor < 1 << 63
        found ^= token * factor
    return found


def test_lengths_are_the_next_primes() -> None:
    g = NGrams(2, base=2, vocab_size=96, **{**SIZES, "heads": 400})
    assert g.lengths(1) == tuple(n for n in range(2, 2742) if all(n % d for d in range(2, n)))
    largest = NGrams(2, base=2**31 - 100, vocab_size=96, **{**SIZES, "heads": 4}).lengths(1)
    assert largest[:2] == (2**31 - 99, 2**31 - 85)


def test_numbers_that_no_model_comes_near() -> None:
    case = hybrid_cases.CASES["qwen4_exp_text-ngrams"]
    config = {**config_of(case), "heads_per_ngram": 1_000_000_000}
    with pytest.raises(MlcBuildError) as error:
        resolve(llama.architecture("qwen4_exp_text"), config, {})
    assert "n-grams of 2 to 16 tokens, at most 64 hashes of each length, and none above 2,147,483,647" in str(
        error.value
    )
