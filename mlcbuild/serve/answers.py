"""Requests to texts, and texts to what OpenAI's clients read: whole answers, chunks of a stream, log-probabilities."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.sampling import Sampling, defaults
from mlcbuild.runtime.writing import Grammar
from mlcbuild.serve import tools
from mlcbuild.serve.engine import Engine, Job, Piece
from mlcbuild.serve.protocol import ChatMessage, ChatRequest, CompletionRequest, Refused, Tool, several

_LONGEST = 64  # characters of a token, for prompts that are not worth tokenizing
_COMPLETION = 16  # tokens of a completion that says no number, as OpenAI has it


@dataclass(frozen=True)
class Choice:
    """One of the texts of a request, and its pieces as they come."""

    index: int
    job: Job
    pieces: asyncio.Queue[Piece | MlcBuildError]
    calls: tools.Calls | None = None  # what reads calls of functions out of the text, where the request names some

    def deltas(self, piece: Piece) -> list[dict[str, Any]]:
        """What a piece of a conversation's answer adds to it, as OpenAI's streams have it."""
        if self.calls is None:
            return [{"content": piece.text}] if piece.text or not piece.finish_reason else []
        return [*self.calls.feed(piece.text), *(self.calls.end() if piece.finish_reason else ())]

    def reason(self, piece: Piece) -> str | None:
        called = self.calls is not None and self.calls.made and piece.finish_reason == "stop"
        return "tool_calls" if called else piece.finish_reason


@dataclass(eq=False)
class Answer:
    """All texts of a request, under one id. `chat`: it is a conversation's."""

    engine: Engine
    model: str
    chat: bool
    choices: list[Choice]
    prompt_tokens: int
    usage_at_end: bool
    of_each: int = 1  # texts of a prompt, one after another in `choices`
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def begin(self) -> None:
        """Raises QueueFull."""
        self.engine.submit([choice.job for choice in self.choices])

    def cancel(self) -> None:
        """Nobody reads any more. What is complete stays so."""
        for choice in self.choices:
            choice.job.cancelled = True

    def fail(self, error: MlcBuildError) -> None:
        """What is not complete ends with an error."""
        for choice in self.choices:
            choice.job.tell(error)

    async def whole(self) -> dict[str, Any]:
        """The answer when all texts are complete. Raises MlcBuildError where one failed."""
        found = []
        for choice in self.choices:
            pieces = [piece async for piece in _until_end(choice)]
            if self.chat:
                body: dict[str, Any] = {"message": _message([d for piece in pieces for d in choice.deltas(piece)])}
            else:
                body = {"text": "".join(piece.text for piece in pieces)}
            chances = self._chances(choice, pieces)
            found.append(
                {"index": choice.index, **body, "logprobs": chances, "finish_reason": choice.reason(pieces[-1])}
            )
        return {**self._head(""), "choices": found, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The same in chunks, as tokens come. Raises MlcBuildError where a text failed."""
        merged: asyncio.Queue[tuple[Choice, Piece | MlcBuildError | None]] = asyncio.Queue()

        async def forward(choice: Choice) -> None:
            try:
                async for piece in _until_end(choice):
                    await merged.put((choice, piece))
            except MlcBuildError as error:
                await merged.put((choice, error))
            await merged.put((choice, None))

        tasks = [asyncio.create_task(forward(choice)) for choice in self.choices]
        going = len(tasks)
        try:
            if self.chat:
                for choice in self.choices:
                    yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}})
            while going:
                choice, piece = await merged.get()
                if piece is None:
                    going -= 1
                elif isinstance(piece, MlcBuildError):
                    raise piece
                elif piece.text or piece.likeliest or piece.finish_reason:
                    chances = self._chances(choice, [piece])
                    if not self.chat:
                        yield self._chunk(choice, {"text": piece.text}, piece.finish_reason, chances)
                        continue
                    *first, last = choice.deltas(piece) or [{}]
                    for delta in first:
                        yield self._chunk(choice, {"delta": delta})
                    if last or chances or piece.finish_reason:
                        yield self._chunk(choice, {"delta": last}, choice.reason(piece), chances)
            if self.usage_at_end:
                yield {**self._head(".chunk"), "choices": [], "usage": self._usage()}
        finally:
            for task in tasks:
                task.cancel()

    def _chunk(self, choice: Choice, body: dict[str, Any], reason: str | None = None, chances: Any = None) -> Any:
        found = {"index": choice.index, **body, "logprobs": chances, "finish_reason": reason}
        return {**self._head(".chunk"), "choices": [found]}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self) -> dict[str, Any]:
        prompt, text = self.prompt_tokens, sum(len(choice.job.writer.tokens) for choice in self.choices)
        counts = {"prompt_tokens": prompt, "completion_tokens": text, "total_tokens": prompt + text}
        reused = sum(choice.job.writer.speed.reused for choice in self.choices[:: self.of_each])
        return {**counts, "prompt_tokens_details": {"cached_tokens": reused}}

    def _chances(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if choice.job.likeliest is None:
            return None
        tokens = [piece.likeliest for piece in pieces if piece.likeliest]
        if self.chat:
            entries = [
                self._chance(*chosen) | {"top_logprobs": [self._chance(*c) for c in top]} for chosen, *top in tokens
            ]
            return {"content": entries, "refusal": None}
        return {
            "tokens": [self._text(chosen[0]) for chosen, *_ in tokens],
            "token_logprobs": [chosen[1] for chosen, *_ in tokens],
            "top_logprobs": [{self._text(token): chance for token, chance in top} for _, *top in tokens],
        }

    def _chance(self, token: int, chance: float) -> dict[str, Any]:
        text = self._text(token)
        known = "\N{REPLACEMENT CHARACTER}" not in text  # else it is a part of a character
        return {"token": text, "logprob": chance, "bytes": list(text.encode()) if known else None}

    def _text(self, token: int) -> str:
        return self.engine.model.token_text(token)


def answer(engine: Engine, name: str, request: ChatRequest | CompletionRequest) -> Answer:
    """What a request asks for, ready to begin; to be called in the event loop's thread or a worker of it.

    Raises MlcBuildError where it cannot be: a package of vectors, a role that the template has not, a prompt that is
    too long, a setting out of range.
    """
    model = engine.model
    if not engine.writes:
        raise MlcBuildError(f"{name} gives vectors of texts (/v1/embeddings), it does not write")
    chat = isinstance(request, ChatRequest)
    prompts: list[Any]
    schema, template, lark = None, None, None
    offered, several_calls = list[Tool](), True
    if isinstance(request, ChatRequest):
        forced = request.forced
        if request.about_tools:
            text = tools.prompt(engine.template, request.messages, request.offered)
            if len(text) > _LONGEST * engine.window:  # to tokenize it would take 200 times its memory
                text = f"the prompt has {len(text):,} characters, too many for this server's window of {engine.window}"
                raise Refused(400, text, "context_length_exceeded")
            template, offered = engine.template if request.offered else None, request.offered
            several_calls = request.parallel_tool_calls is not False
            prompts = [model.tokenizer.encode(text, add_special_tokens=False)]
        else:
            prompts = [model.chat_prompt(_told(request.messages))]
        if template is not None and forced:
            offered, lark = forced, tools.grammar(template, forced, several_calls)
        schema = request.response_format.schema_of_answer if request.response_format else None
        most = request.max_completion_tokens or request.max_tokens or engine.window
    else:
        prompts = several(request.prompt)
        most = request.max_tokens or _COMPLETION
    if len(prompts) * request.n > engine.most_texts:
        raise MlcBuildError(
            f"the request asks for {len(prompts) * request.n} texts; this server takes {engine.most_texts} at once"
        )
    settings = {**defaults(model.config), **request.sampling}
    choices: list[Choice] = []
    prompt_tokens = 0
    for prompt in prompts:
        ids = model.prompt_ids(prompt)
        wrong = [i for i in ids if not 0 <= i < model.vocab_size]
        if wrong:
            raise MlcBuildError(f"token id {wrong[0]} is not in this model's vocabulary of {model.vocab_size}")
        if len(ids) >= engine.window:
            text = f"the prompt has {len(ids)} tokens, too many for this server's window of {engine.window}"
            raise Refused(400, text, "context_length_exceeded")
        prompt_tokens += len(ids)
        for i in range(request.n):
            seed = None if request.seed is None else request.seed + i  # or all would be the same
            sampling = Sampling(**{**settings, "seed": seed})
            room = min(most, engine.window - len(ids))
            grammar = _grammar(engine, schema, lark)
            writer = model.writer(ids, room, request.stops, sampling, grammar)
            calls = tools.reader(template, offered, several_calls, bool(forced)) if template is not None else None
            choices.append(Choice(len(choices), Job(writer, print, request.likeliest), asyncio.Queue(), calls))
    usage = request.stream_options is not None and request.stream_options.include_usage
    return Answer(engine, name, chat, choices, prompt_tokens, usage, request.n)


def _grammar(engine: Engine, schema: dict[str, Any] | None, lark: str | None) -> Grammar | None:
    """What a text must obey. Raises MlcBuildError that names the field which asks for it."""
    try:
        if lark is not None:
            return engine.grammars.following(lark)
        return None if schema is None else engine.grammars.fitting(schema)
    except MlcBuildError as error:
        raise MlcBuildError(f"{'response_format' if lark is None else 'tool_choice'}: {error}") from None


def _told(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages as a template takes them: it has a place for one system message, which gets the texts of all."""
    plain = [message.plain() for message in messages]
    system = [message["content"] for message in plain if message["role"] == "system"]
    turns = [message for message in plain if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *turns] if system else turns


def _message(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole of what these say one after another."""
    text = "".join(delta.get("content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if not calls:
        return {"role": "assistant", "content": text}
    whole = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    return {"role": "assistant", "content": text or None, "tool_calls": whole}


def listen(found: Answer) -> None:
    """Let the pieces of an answer come to the event loop that this is called in."""
    loop = asyncio.get_running_loop()

    def to(choice: Choice) -> Callable[[Piece | MlcBuildError], None]:
        def tell(piece: Piece | MlcBuildError) -> None:
            loop.call_soon_threadsafe(lambda: choice.pieces.put_nowait(piece))

        return tell

    for choice in found.choices:
        choice.job.tell = to(choice)


async def _until_end(choice: Choice) -> AsyncIterator[Piece]:
    while True:
        piece = await choice.pieces.get()
        if isinstance(piece, MlcBuildError):
            raise piece
        yield piece
        if piece.finish_reason:
            return
