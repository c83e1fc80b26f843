"""What the figures cost beside the models: `python benchmarks/verify.py`.

Two random models of one layer and a large vocabulary, as Gemma's is, whose passes are a matrix product each. The ratio
is the time of `evaluate.compare` over that of the two passes alone, in one process, the best of several turns. Wall and
CPU time both: on a machine with other work, the second is the steadier one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mlcbuild.verify import evaluate

PIECE = 64  # rows of logits that a library gives at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--hidden", type=int, default=640, help="of the head's matrix (Gemma 3 270M: 640)")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    head = random.standard_normal((options.hidden, options.vocabulary), np.float32) / np.float32(options.hidden**0.5)
    models = [_model(head * np.float32(scale), options.hidden) for scale in (3.0, 3.03)]
    ids = random.integers(0, options.vocabulary, options.tokens).tolist()

    def passes() -> None:
        for model in models:
            for _ in model(ids):
                pass

    print(f"{options.tokens} tokens of {options.vocabulary}, hidden size {options.hidden}; at most 1.5 is wanted")
    for name, clock in (("wall", time.perf_counter), ("CPU", time.process_time)):
        alone = min(_seconds(clock, passes) for _ in range(options.turns))
        both = min(_seconds(clock, lambda: evaluate.compare(*models, [ids])) for _ in range(options.turns))
        print(f"{name:>4}: passes {alone:.2f} s, with figures {both:.2f} s, ratio {both / alone:.2f}")


def _model(head: np.ndarray, hidden: int) -> Callable[[Sequence[int]], Iterator[np.ndarray]]:
    states = np.random.default_rng(1).standard_normal((1024, hidden), np.float32)

    def logits(ids: Sequence[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(ids), PIECE):
            yield states[start : min(start + PIECE, len(ids))] @ head

    return logits


def _seconds(clock: Callable[[], float], run: Callable[[], object]) -> float:
    started = clock()
    run()
    return clock() - started


if __name__ == "__main__":
    main()
