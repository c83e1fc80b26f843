"""Trains `stories`, the small language model that ships with mlcbuild, from a seed and nothing else.

    python scripts/train_stories.py --out recipes/models/stories

writes the text (`stories/corpus.py`), the tokenizer, the weights, the evaluation texts and the model card. It needs
torch, transformers and tokenizers, and 20 to 30 minutes of two CPU cores. No test or build runs it. `--steps 50` is a
rehearsal.
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

from stories.corpus import documents, read_sources
from stories.publish import publish
from stories.tokenizer import train_tokenizer
from stories.training import Recipe, train

TOKENIZER_DOCUMENTS = 12000  # the first of the training documents: enough that every word has been seen many times


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the stories model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in Hugging Face format")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=Recipe.threads)
    arguments = parser.parse_args()
    recipe = replace(Recipe(), seed=arguments.seed, steps=arguments.steps, threads=arguments.threads)

    sources = read_sources()
    sample = itertools.islice(documents(sources, "training", recipe.seed), TOKENIZER_DOCUMENTS)
    tokenizer = train_tokenizer(document.text for document in sample)
    start = time.monotonic()
    model = train(sources, tokenizer, recipe)
    minutes = (time.monotonic() - start) / 60
    report = publish(arguments.out, model, tokenizer, sources, recipe, minutes)
    print(report)


if __name__ == "__main__":
    main()
