"""Tables of hashed n-grams (Structure.ngrams): their lengths, and by what numbers tokens find rows.

A layer's table has `heads` parts for each n from 2 to `size`. Their lengths are primes, the first ones from `base` on,
of which no two parts of all layers have the same. A row of a part is the remainder of one hash, an exclusive or of each
token times an odd number that splitmix64 makes of `seed` (Steele et al., OOPSLA 2014). Source of the arithmetic:
transformers modeling_qwen4_exp.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from mlcbuild.models.structure import Structure

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class NGrams:
    """`width` numbers of all parts together; `end` ends a text; the table is in `shards`, padded to `multiple` rows."""

    size: int
    heads: int
    base: int
    multiple: int
    seed: int
    vocab_size: int
    end: int
    width: int
    kernel: int
    shards: int

    @property
    def parts(self) -> int:
        return (self.size - 1) * self.heads

    def lengths(self, table: int) -> tuple[int, ...]:
        """Of the parts of a table; tables are counted from 1."""
        return _primes(self.base, table * self.parts)[-self.parts :]

    def rows(self, table: int) -> int:
        return math.ceil(sum(self.lengths(table)) / self.multiple) * self.multiple

    def factors(self, table: int) -> tuple[int, ...]:
        """What a token, and each one before it, is multiplied with: products are below 2 ** 63."""
        bound = max(1, ((1 << 63) - 1) // self.vocab_size // 2)
        seed, step = self.seed + 10007 * (table - 1), 0x9E3779B97F4A7C15
        return tuple(2 * (_splitmix(seed + step * (n + 2)) % bound) + 1 for n in range(self.size))


def ngrams_of(s: Structure) -> NGrams:
    return NGrams(*s.ngrams)


def _splitmix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@functools.cache
def _primes(first: int, count: int) -> tuple[int, ...]:
    found: list[int] = []
    while len(found) < count:
        if _is_prime(first):
            found.append(first)
        first += 1
    return tuple(found)


def _is_prime(number: int) -> bool:
    """Miller's test, certain up to 3.2e9 (Pomerance et al., Math. Comp. 35, 1980)."""
    if number < 11 or number % 2 == 0:
        return number in (2, 3, 5, 7)
    halvings = ((number - 1) & (1 - number)).bit_length() - 1
    for base in (2, 3, 5, 7):
        power = pow(base, number - 1 >> halvings, number)
        if power not in (1, number - 1) and all(
            (power := power * power % number) != number - 1 for _ in range(halvings - 1)
        ):
            return False
    return True
