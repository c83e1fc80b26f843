"""Documents, drawn from a seed: stories and chats, in three parts that share no story.

A story belongs to a part by its hero, plot and place, so the evaluation asks for combinations never trained on.
"""

import random
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stories.cast import bindings, draw_cast
from stories.grammar import Rules, Writer, read_rules

HERE = Path(__file__).parent
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

PARTS = ("evaluation", "calibration")  # the buckets of these numbers; every other bucket is training
BUCKETS = 16

# Shares of the kinds of documents; the rest are plain stories.
ANSWERS, STORY_REQUESTS, LETTERS = 0.12, 0.06, 0.50
SYSTEM_MESSAGES = 0.35

HAPPENINGS = ("<detail>", "<detail>", "<detail>", "<detail>", "<chatter>", "<chatter>", "<scene>")

REQUESTS = (
    "[Tell me|Please tell me|Can you tell me|I would like|Write|Please write] a [short |little |]story about a {kind}"
    "[| named {h}| called {h}]."
)


@dataclass(frozen=True)
class Question:
    ask: str
    held_out: str
    answer: str


@dataclass(frozen=True)
class Sources:
    """What the corpus is made of: the grammar, and the hand-written questions and system messages."""

    rules: Rules
    plots: tuple[str, ...]
    questions: tuple[Question, ...]
    systems: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    text: str
    nats: float  # entropy of the choices that made it


def read_sources() -> Sources:
    rules = read_rules(sorted((HERE / "grammar").glob("*.txt")))
    table = tomllib.loads((HERE / "questions.toml").read_text(encoding="utf-8"))
    return Sources(
        rules=rules,
        plots=tuple(sorted(name.removesuffix(".1") for name in rules if name.endswith(".1"))),
        questions=tuple(Question(**row) for row in table["question"]),
        systems=tuple(table["system"]),
    )


def documents(sources: Sources, part: str, seed: int) -> Iterator[Document]:
    """Endless documents of the part "training", "evaluation" or "calibration"; the same for the same seed."""
    rng = random.Random(f"{seed}/{part}")
    while True:
        kind = rng.random()
        if kind < ANSWERS:
            yield answers(sources, part, rng)
        elif kind < ANSWERS + STORY_REQUESTS:
            yield story(sources, part, rng, requested=True)
        elif kind < ANSWERS + STORY_REQUESTS + LETTERS:
            yield letter(sources, rng)
        else:
            yield story(sources, part, rng, requested=False)


def part_of(hero: str, plot: str, place: str) -> str:
    # crc32, not hash(): Python's hash of a string changes from run to run.
    bucket = zlib.crc32(f"{hero}/{plot}/{place}".encode()) % BUCKETS
    return PARTS[bucket] if bucket < len(PARTS) else "training"


def story(sources: Sources, part: str, rng: random.Random, requested: bool) -> Document:
    while True:
        cast, plot = draw_cast(sources.rules, rng), rng.choice(sources.plots)
        if part_of(cast.hero, plot, cast.place) == part:
            break
    writer = Writer(sources.rules, rng, bindings(cast, sources.rules, rng))
    beats = [f"<{plot}.{number}>" for number in range(1, 10) if f"{plot}.{number}" in sources.rules]
    text = writer.write(" ".join(plan(beats, rng)))
    if not requested:
        return Document(text, writer.nats)
    turns = [turn("user", writer.write(REQUESTS)), turn("assistant", text)]
    return Document("".join(system_turn(sources, rng) + turns), writer.nats)


def plan(beats: list[str], rng: random.Random) -> list[str]:
    """The order of a story: the plot's beats, in paragraphs, with small happenings in a row between some of them."""

    def happenings(most: int) -> list[str]:
        return [rng.choice(HAPPENINGS) for _ in range(rng.randint(1, most))]

    first, second = sorted(rng.sample(range(2, len(beats) - 1), 2))
    return [
        *("<open>", *happenings(3), "¶", *beats[:first], *happenings(2)),
        *("¶", *beats[first:second], *happenings(2), "¶", *beats[second:]),
        rng.choice(["", "<saying>"]),
        *happenings(2),
        rng.choice(["", "<meal>", "<close>", "<close>", "<meal> <close>"]),
    ]


def letter(sources: Sources, rng: random.Random) -> Document:
    """A letter or a page of a diary. There are so many that no part needs to be kept apart from another."""
    cast = draw_cast(sources.rules, rng)
    writer = Writer(sources.rules, rng, bindings(cast, sources.rules, rng, first_person=True))
    return Document(writer.write("<letter>"), writer.nats)


def answers(sources: Sources, part: str, rng: random.Random) -> Document:
    """A chat of one to three questions. The evaluation asks in the held-out wordings."""
    writer = Writer(sources.rules, rng)
    turns = system_turn(sources, rng)
    for question in rng.sample(sources.questions, rng.choice([1, 1, 2, 3])):
        asked = question.held_out if part == "evaluation" else careless(writer.write(question.ask), rng)
        turns += [turn("user", asked), turn("assistant", question.answer)]
    return Document("".join(turns), writer.nats)


def careless(question: str, rng: random.Random) -> str:
    """Sometimes without capitals or the last mark, as people type."""
    if rng.random() < 0.15:
        question = question.lower()
    return question.rstrip("?.!") if rng.random() < 0.1 else question


def system_turn(sources: Sources, rng: random.Random) -> list[str]:
    return [turn("system", rng.choice(sources.systems))] if rng.random() < SYSTEM_MESSAGES else []


def turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"
