"""The pages of docs/, and the fenced blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))

_BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: what follows the first fence (`yaml recipes/x.yaml wrong`), its text, its first line's number."""

    info: tuple[str, ...]
    text: str
    line: int

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""


def blocks(text: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        yield Block(tuple(match["info"].split()), match["text"], text.count("\n", 0, match.start()) + 2)


def table(text: str, *heads: str) -> list[list[str]]:
    """The rows of the one Markdown table with these column heads, cells stripped."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    starts = [number for number, cells in enumerate(lines) if cells == list(heads)]
    assert len(starts) == 1, f"{len(starts)} tables with the heads {heads}, expected one"
    rows = []
    for cells in lines[starts[0] + 2 :]:
        if len(cells) != len(heads):
            break
        rows.append(cells)
    return rows


def code(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)
