"""How a page looks that one talks to a model on: that of `mlcbuild serve`, and the one in a package for browsers."""

from __future__ import annotations

from pathlib import Path

_STYLES = Path(__file__).parent / "looks.css"


def dressed(page: str) -> str:
    """`page` with the styles in the place of `$STYLES`."""
    return page.replace("$STYLES", _STYLES.read_text(encoding="utf-8").rstrip("\n"))
