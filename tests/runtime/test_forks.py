"""Sequences that share a beginning: whatever is done with the others, each one's logits are those of its own text."""

from __future__ import annotations

import random

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import Model

LIMIT, PLACES = 96, 3


def test_what_shares_a_beginning_is_what_it_would_be_alone(tiny: Model) -> None:
    """Forks of forks, cut in the part that is shared, removed, and written on, in an order that nobody thought of."""
    dice, session, texts = random.Random(1), tiny.session(PLACES, LIMIT), dict[int, list[int]]()

    def words(most: int) -> list[int]:
        return [dice.randrange(3, 290) for _ in range(dice.randint(1, most))]

    worst, forked = 0.0, 0
    for _ in range(150):
        do = dice.choice(["add", "fork", "fork", "truncate", "remove", "write", "write"])
        some = dice.choice(list(texts)) if texts else None
        if do == "add" and len(texts) < PLACES:
            texts[session.add()] = []
        elif do == "fork" and some is not None and texts[some] and len(texts) < PLACES:
            length = dice.randint(1, len(texts[some]))
            texts[session.fork(some, length)] = texts[some][:length]
            forked += 1
        elif do == "truncate" and some is not None:
            del texts[some][session.truncate(some, dice.randint(0, len(texts[some]))) :]
        elif do == "remove" and some is not None and len(texts) == PLACES:
            session.remove(some)
            del texts[some]
        elif do == "write":
            room = [sequence for sequence, text in texts.items() if len(text) <= LIMIT - 20]
            if not room:
                continue
            more = [words(20) for _ in room]
            rows = session.batch_prefill(room, more)
            for sequence, ids, row in zip(room, more, rows, strict=True):
                texts[sequence] += ids
                worst = max(worst, float(abs(row - tiny.logits(texts[sequence])[-1]).max()))
        assert session.lengths == {sequence: len(text) for sequence, text in texts.items()}
    assert forked > 10 and worst < 1e-4


def test_a_full_session_has_no_room_for_a_fork(tiny: Model) -> None:
    session = tiny.session(1, LIMIT)
    sequence = session.add()
    session.prefill(sequence, [5, 6])
    with pytest.raises(MlcBuildError, match="this session holds 1 sequences; remove one"):
        session.fork(sequence, 1)
