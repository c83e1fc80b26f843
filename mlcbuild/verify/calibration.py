"""The text that a model is calibrated on, as windows of tokens, and the library that it goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlcbuild.runtime.tokenizer import load_tokenizer
from mlcbuild.verify import evaluate
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.tensors import Windows

TOKENS = 16384  # of a text; more would hardly change what is measured


def opened(
    blocks: Path, tokenizer: Path, text: Path, context: int, note: Callable[[str], None]
) -> tuple[Pieces, Windows]:
    """The library in the folder `blocks`, and what it takes of a text: at most `TOKENS` tokens, `context` at once."""
    (library,) = blocks.glob("model.*")
    pieces = Pieces(library)
    documents = evaluate.documents(evaluate.read_text(text), load_tokenizer(tokenizer))
    windows, tokens = [], 0
    for window in evaluate.windows(documents, min(pieces.window, context)):
        windows.append(window[: TOKENS - tokens])
        tokens += len(windows[-1])
        if tokens >= TOKENS - 1:
            note(f"the calibration text is long: its first {tokens} tokens are enough")
            break
    return pieces, windows
