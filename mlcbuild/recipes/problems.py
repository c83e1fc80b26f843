"""What is wrong with a YAML file, where, and what was probably meant."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

_SHOWN_NAMES = 12  # a longer list of what there is helps nobody
_SHOWN_LENGTH = 60
_LONGEST_TEXT = 2_000  # characters
_LONGEST_LINE = 500
_MOST_SHOWN = 1_000  # problems: a file that is no recipe at all can have millions
_MOST_COMPARED = 50_000  # names, about a second of comparing
_FAR = 1 << 30  # letters
_ALIKE = str.maketrans("li|o_s", "1110-5")
_NOT_TEXT = re.compile(r"~|null|true|false|[-+.]?[0-9][0-9.]*", re.IGNORECASE)  # what YAML would not read as text


@dataclass(frozen=True, order=True)
class Problem:
    """One thing to correct. `str()` is a line that editors and terminals can jump to."""

    file: str  # relative to the workspace where it lies inside
    line: int  # from 1
    column: int  # from 1
    text: str
    source: str = ""  # the line of YAML itself
    length: int = 1  # characters that the problem is about

    def __str__(self) -> str:
        text = self.text if len(self.text) <= _LONGEST_TEXT else f"{self.text[:_LONGEST_TEXT]}…"
        return f"{self.file}:{self.line}:{self.column}: {text}"

    def with_source(self) -> str:
        """The same, with the line of YAML and carets under the part that it is about."""
        if not self.source:
            return str(self)
        number = str(self.line)
        margin = " " * len(number)
        # Of a line that no screen holds, what is around the problem.
        first = max(0, self.column - _LONGEST_LINE // 2) if len(self.source) > _LONGEST_LINE else 0
        source = self.source[first : first + _LONGEST_LINE]
        before = "".join("\t" if character == "\t" else " " for character in source[: self.column - 1 - first])
        carets = "^" * max(1, min(self.length, _LONGEST_LINE))
        return f"{self}\n {margin} |\n {number} | {source}\n {margin} | {before}{carets}"


def listed(problems: Sequence[Problem], line: Callable[[Problem], str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = [f"… and {len(problems) - _MOST_SHOWN:,} more problems"] if len(problems) > _MOST_SHOWN else []
    return [line(problem) for problem in problems[:_MOST_SHOWN]] + more


def show(value: object) -> str:
    """A value as an error text quotes it: short, on one line, without control characters."""
    if (
        isinstance(value, str)
        and value.isprintable()
        and value.strip() == value != ""
        and not _NOT_TEXT.fullmatch(value)
    ):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
        if not text.isprintable():
            text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 1] + "…"


def where(path: Sequence[str | int]) -> str:
    """`exclude[0].target` for ("exclude", 0, "target")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def one_of(names: Iterable[object]) -> str:
    """`a`, `b` or `c`."""
    every = names if isinstance(names, Collection) else list(names)
    quoted = [f"`{show(name)}`" for name in itertools.islice(every, _SHOWN_NAMES)]
    if len(every) > _SHOWN_NAMES:
        return f"one of {', '.join(quoted)} … ({len(every)} in all)"
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)


def did_you_mean(word: object, names: Iterable[object]) -> str:
    """`; did you mean `x`?` for the nearest of `names`, else nothing."""
    near = nearest(word, names)
    return f"; did you mean `{near}`?" if near is not None else ""


class Hints:
    """`did_you_mean` for any number of mistakes: a workspace in which thousands of names are wrong is told so at once,
    the first ones with suggestions."""

    def __init__(self) -> None:
        self._left = _MOST_COMPARED

    def __call__(self, word: object, names: Collection[object]) -> str:
        if self._left <= 0:
            return ""
        self._left -= len(names)
        return did_you_mean(word, names)


def nearest(word: object, names: Iterable[object]) -> str | None:
    """The name that `word` is most likely a mistyping or a beginning of; None when none is near.

    Of names that are as near, the one that looks most like it, and then the one that most others begin with.
    """
    if not isinstance(word, str) or not word:
        return None
    every = sorted({name for name in names if isinstance(name, str)})
    least, ranked = _FAR, list[tuple[int, str]]()
    # Likely ones first: once the least is small, the others are soon given up.
    for name in sorted(every, key=lambda name: (abs(len(name) - len(word)), name[:1] != word[0])):
        ranked.append((_edits(word.lower(), name.lower(), least), name))
        least = min(least, ranked[-1][0])
    near = [name for edits, name in ranked if edits == least <= max(1, max(len(word), len(name)) // 3)]
    if near:
        return min(near, key=lambda name: (_edits(_seen(word), _seen(name)), -_known(name, every), name))
    beginnings = [name for name in every if len(word) >= 3 and name.lower().startswith(word.lower())]
    return min(beginnings, key=lambda name: (len(name), name), default=None)


def _seen(name: str) -> str:
    """The name with one letter for all that look alike."""
    return name.lower().translate(_ALIKE)


def _known(name: str, ranked: Sequence[str]) -> int:
    """How many of these, which are sorted, begin with the name."""
    first = bisect.bisect_left(ranked, name)
    return bisect.bisect_left(ranked, True, first, key=lambda other: not other.startswith(name)) - first


def _edits(a: str, b: str, most: int = _FAR) -> int:
    """Letters to insert, delete, replace or swap with a neighbour to turn `a` into `b` (optimal string alignment).

    Where it is more than `most`, or more than any suggestion may be away, the length of the longer one.
    """
    longest = max(len(a), len(b))
    far = min(max(1, longest // 3), most)
    if abs(len(a) - len(b)) > far:
        return longest
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
        if min(row) > far:
            return longest
    return row[-1]
