"""Many texts at once: one thread computes, a step at a time, for all that are being written.

A step computes at most one chunk of prompts, then one token of every text (continuous batching): a text begins as soon
as a place is free, and a long prompt holds the others up for a chunk only. A complete text stays in the KV cache until
its place is needed: the next turn of its conversation begins where it ended. What a prompt has in common with another
text that is there is not computed again, and kept once. Whoever waits is told from this thread.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.model import Model
from mlcbuild.runtime.sampling import log_probabilities
from mlcbuild.runtime.session import Session, common
from mlcbuild.runtime.writing import Writer
from mlcbuild.serve.grammar import Grammars

_SHORTEST = 16  # tokens of a common beginning that are worth keeping


class QueueFull(MlcBuildError):
    """As many texts wait as may."""


@dataclass(frozen=True)
class Limits:
    """`sequences` texts at once, each of at most `window` tokens with its prompt; `queue` more may wait. A step
    computes `chunk` tokens of prompts."""

    sequences: int = 8
    window: int = 8192
    queue: int = 64
    chunk: int = 256


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text: `likeliest` are tokens with their log-probabilities, the chosen one first.

    It is empty where they were not asked for, and for a stop token.
    """

    text: str
    finish_reason: str | None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass
class Job:
    """A text that somebody waits for. `tell` gets each piece, or the error that ends it, in the engine's thread."""

    writer: Writer
    tell: Callable[[Piece | MlcBuildError], None]
    likeliest: int | None = None  # so many likeliest tokens are told; None: no log-probabilities
    cancelled: bool = False
    sequence: int = -1
    computed: int = 0  # tokens of the prompt that are in the KV cache
    since: float = field(default_factory=time.monotonic)


class Engine:
    """A package and the thread that computes for it. `counts` has what was done so far, by name."""

    def __init__(self, model: Model, limits: Limits = Limits()) -> None:
        metadata = model.network.library.metadata
        self.model = model
        self.writes = metadata.model_task == "chat"  # else it gives vectors
        self.template = _tried(model) if self.writes else None
        context = metadata.context_window_size
        self.window = min(context, limits.window) if context > 0 else limits.window
        self._most = min(limits.sequences, metadata.max_batch_size)
        self._chunk = min(limits.chunk, metadata.prefill_chunk_size)
        self._queue = limits.queue
        self.most_texts = self._most + limits.queue  # of one request
        self.counts = dict.fromkeys(
            ("prompt_tokens", "reused_tokens", "completion_tokens", "steps", "cancelled", "failed"), 0
        )
        self._waiting: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._running: list[Job] = []
        self._kept: dict[int, list[int]] = {}  # sequences of complete texts, the oldest first, with their tokens
        self._changed = threading.Condition()
        self._closing = False
        self._session: Session | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What keeps texts to schemas and grammars, made when first needed. Raises MlcBuildError."""
        return Grammars(self.model)

    @property
    def waiting(self) -> int:
        """Texts that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts in the KV cache."""
        return len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Begin all of `jobs` as soon as there is room. Raises QueueFull where there is not even room to wait."""
        with self._changed:
            waiting = deque(job for job in self._waiting if not job.cancelled)
            self.counts["cancelled"] += len(self._waiting) - len(waiting)
            self._waiting = waiting
            free = max(self._most - len(self._running), 0)
            if len(self._waiting) + len(jobs) > self._queue + free:
                raise QueueFull(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the engine's thread, between two steps. Raises QueueFull."""
        with self._changed:
            if len(self._calls) >= self._queue:
                raise QueueFull(f"{len(self._calls)} requests wait already: try again later")
            self._calls.append(function)
            self._changed.notify()

    def close(self, patience: float | None = None) -> None:
        """End the thread; texts that are not complete end with an error. Its last step is waited for, for `patience`
        seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._running or self._calls):
                    self._changed.wait()
                call = self._calls.popleft() if self._calls else None
            if self._closing:
                return self._fail("the server ends")
            try:
                if call is not None:
                    call()
                if self._waiting or self._running:
                    self._step()
            except Exception as error:  # the next texts must not suffer from it
                traceback.print_exc(file=sys.stderr)
                known = isinstance(error, MlcBuildError)
                self._fail(str(error) if known else "the text could not be computed: the server's output says why")

    def _step(self) -> None:
        session = self._session = self._session or Session(self.model.network, self._most, self.window)
        self._begin(session)
        for job in [job for job in self._running if job.cancelled]:
            self._end(job)
            self.counts["cancelled"] += 1
        self._prefill(session)
        jobs = [job for job in self._running if job.writer.tokens]
        if jobs:
            sequences, tokens = [job.sequence for job in jobs], [job.writer.tokens[-1] for job in jobs]
            # One alone is computed as `generate` computes it.
            alone = len(jobs) == 1
            rows = session.decode(sequences[0], tokens[0])[None] if alone else session.batch_decode(sequences, tokens)
            self._write(jobs, rows)
        self.counts["steps"] += 1

    def _begin(self, session: Session) -> None:
        with self._changed:
            while self._waiting and len(self._running) < self._most:
                if not self._waiting[0].cancelled and session.forks and self._soon(self._waiting[0].writer.ids):
                    return
                job = self._waiting.popleft()
                if job.cancelled:
                    self.counts["cancelled"] += 1
                    continue
                self._running.append(job)  # before anything can fail: whoever waits must be told
                job.sequence, job.computed = self._place(session, job.writer.ids)
                job.writer.speed.start(job.computed)
                self.counts["reused_tokens"] += job.computed

    def _soon(self, ids: Sequence[int]) -> bool:
        """Whether a prompt that is being computed has more in common with this one than is there yet.

        To wait for that costs nothing: its tokens are computed first anyway.
        """
        shared = ((common(job.writer.ids, ids), job.computed) for job in self._running)
        return any(shared_tokens >= _SHORTEST and shared_tokens > there for shared_tokens, there in shared)

    def _place(self, session: Session, ids: Sequence[int]) -> tuple[int, int]:
        """A sequence for a prompt, and how many of its tokens are there: those that it has in common with another text.

        A complete text goes on as this one, unless most of it would be lost; else both share the beginning.
        """
        running = [job for job in self._running if job.sequence >= 0] if session.forks else []
        inside = {job.sequence: job.writer.ids[: job.computed] for job in running}
        shared = {sequence: common(tokens, ids) for sequence, tokens in {**inside, **self._kept}.items()}
        best = max(shared, key=lambda sequence: shared[sequence], default=-1)
        there = min(shared.get(best, 0), len(ids) - 1)  # the last token gives the logits
        full = len(session.lengths) == self._most
        others = [sequence for sequence in self._kept if sequence != best]
        kept = self._kept.get(best)
        if there < _SHORTEST:
            best, others = -1, list(self._kept)
        elif kept is not None and (shared[best] >= len(kept) // 2 or (full and not others)):
            del self._kept[best]
            return best, session.truncate(best, there)
        if full:
            oldest = others[0]
            del self._kept[oldest]
            session.remove(oldest)
        return (session.fork(best, there), there) if best >= 0 and session.forks else (session.add(), 0)

    def _prefill(self, session: Session) -> None:
        """A chunk of the prompts that are not computed yet, the oldest first; and the first tokens after them."""
        room, batch = self._chunk, []
        for job in self._running:
            ids = job.writer.ids[job.computed : job.computed + room]
            if ids and room:
                batch.append((job, ids))
                room -= len(ids)
        if not batch:
            return
        if len(batch) == 1:
            rows = session.prefill(batch[0][0].sequence, batch[0][1])[None]
        else:
            rows = session.batch_prefill([job.sequence for job, _ in batch], [ids for _, ids in batch])
        for job, ids in batch:
            job.computed += len(ids)
            self.counts["prompt_tokens"] += len(ids)
        complete = [i for i, (job, _) in enumerate(batch) if job.computed == len(job.writer.ids)]
        self._write([batch[i][0] for i in complete], rows[complete])

    def _write(self, jobs: Sequence[Job], rows: npt.NDArray[np.float32]) -> None:
        for job, logits in zip(jobs, rows, strict=True):
            before = len(job.writer.tokens)
            text = job.writer.add(logits)
            likeliest: tuple[tuple[int, float], ...] = ()
            if len(job.writer.tokens) > before:
                self.counts["completion_tokens"] += 1
                if job.likeliest is not None:
                    likeliest = _likeliest(logits, job.writer.tokens[-1], job.likeliest)
            self._tell(job, Piece(text, job.writer.finish_reason, likeliest))
            if job.writer.finish_reason:
                self._end(job)

    def _end(self, job: Job) -> None:
        self._running.remove(job)
        if self._session is not None:
            tokens = [*job.writer.ids, *job.writer.tokens]
            self._kept[job.sequence] = tokens[: self._session.lengths[job.sequence]]  # the last one was not computed

    def _fail(self, reason: str) -> None:
        """All texts in the KV cache end with an error; the cache may be broken, so the next step makes a new one.

        Those that wait fail, too, where there was no cache: it could not be made, and trying again would never end.
        """
        with self._changed:
            failed, self._running = self._running, []
            if self._closing or self._session is None:
                failed = [*failed, *self._waiting]
                self._waiting.clear()
        self._session = None
        self._kept.clear()
        self.counts["failed"] += len(failed)
        for job in failed:
            with contextlib.suppress(Exception):  # that may be what failed
                self._tell(job, MlcBuildError(reason))

    def _tell(self, job: Job, what: Piece | MlcBuildError) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop of whoever waited has ended
            job.tell(what)


def _likeliest(logits: npt.NDArray[Any], token: int, count: int) -> tuple[tuple[int, float], ...]:
    chances = log_probabilities(logits)
    near = np.argpartition(-chances, min(count, len(chances) - 1))[:count]  # all in order take eight times as long
    top = near[np.argsort(-chances[near], kind="stable")]
    return tuple((int(i), float(chances[i])) for i in (token, *top))


def _tried(model: Model) -> ChatTemplate | None:
    """The checkpoint's template, if a conversation can be written with it: tried apart, before there are threads."""
    try:
        template = model.chat_template
        if template is not None:
            template.render([{"role": "user", "content": "Hi"}])
        return template
    except MlcBuildError:
        return None
