"""A tiny SentencePiece model with byte fallback, as the Llama 1 and 2 families have."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    """folder/tokenizer.model, of 330 pieces; `options` are the trainer's."""
    import sentencepiece

    text = folder / "text"
    text.write_text("Once upon a time there was a small house by the sea.\nThe sea was green.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"
