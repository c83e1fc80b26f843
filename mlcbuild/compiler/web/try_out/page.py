"""A page to try a package with, in a browser."""

from __future__ import annotations

from pathlib import Path

from mlcbuild.looks import dressed

_PAGE = Path(__file__).parent / "chat.html"


def chat_page(model: str, weights: str, library: str) -> str:
    """The page for the folder `weights` and the file `library` beside it. Names are letters, digits and `.-_`."""
    text = dressed(_PAGE.read_text(encoding="utf-8"))
    for name, value in (("MODEL", model), ("WEIGHTS", weights), ("LIBRARY", library)):
        text = text.replace(f"${name}", value)
    return text
