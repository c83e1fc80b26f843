"""A loaded package: logits of token ids, text from a prompt, replies in a conversation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlcbuild.chat import conversation as chat
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import embedding, package, threads, weights
from mlcbuild.runtime.device import Device
from mlcbuild.runtime.library import Library, Network, match
from mlcbuild.runtime.sampling import Sampling
from mlcbuild.runtime.session import Logits, Session
from mlcbuild.runtime.tokenizer import Tokenizer, load_tokenizer
from mlcbuild.runtime.writing import Ending, Grammar, Writer

if TYPE_CHECKING:
    from mlcbuild.chat.jinja import ChatTemplate

Messages = Sequence[Mapping[str, str]]


class Model:
    """A network with its tokenizer and mlc-chat-config.json. Not for use by several threads at once."""

    def __init__(self, network: Network, config: Mapping[str, Any], tokenizer_folder: Path | None = None) -> None:
        self.network = network
        self.config = config
        self.vocab_size = network.vocab_size
        self._tokenizer_folder = tokenizer_folder
        self._tokenizer: Tokenizer | None = None
        self._conversation: chat.Conversation | None = None
        self._last: Session | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, read when first needed. Raises MlcBuildError where there is none."""
        if self._tokenizer is None:
            if self._tokenizer_folder is None:
                raise MlcBuildError("this model was loaded without a weights folder, so it has no tokenizer")
            self._tokenizer = load_tokenizer(self._tokenizer_folder)
        return self._tokenizer

    @property
    def conversation(self) -> chat.Conversation:
        """The package's conversation template. Raises MlcBuildError where mlc-chat-config.json names none."""
        if self._conversation is None:
            self._conversation = conversation(self.config)
        return self._conversation

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's own template, the one for tools if there are several; None: it has none."""
        from mlcbuild.chat.jinja import read_chat_template

        folder = self._tokenizer_folder
        return (
            None
            if folder is None
            else read_chat_template({path.name: path for path in folder.iterdir()}, ("tool_use", "default"))
        )

    @property
    def context_window_size(self) -> int:
        """The most tokens of one sequence; -1 where a sliding window leaves it open."""
        return self.network.library.metadata.context_window_size

    @property
    def active_vocab_size(self) -> int:
        """How many of the vocabulary's tokens there are: what a model is padded with is never written."""
        active = self.config.get("active_vocab_size")
        return active if isinstance(active, int) and 0 < active < self.vocab_size else self.vocab_size

    def session(self, max_sequences: int = 1, length: int | None = None) -> Session:
        """A fresh KV cache, for those who drive prefill and decode themselves."""
        return Session(self.network, max_sequences, length)

    def logits(self, ids: Sequence[int]) -> Logits:
        """float32 [len(ids), vocab_size]: at each position, the scores of what follows it."""
        pieces = list(self.logits_in_pieces(ids))
        return np.concatenate(pieces) if pieces else np.zeros((0, self.vocab_size), np.float32)

    def logits_in_pieces(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The rows of `logits`, some at a time: a long text times a large vocabulary need not fit into memory."""
        with self._empty_session(len(ids)) as session:
            yield from session.all_logits(session.add(), ids)

    def hidden_states(self, ids: Sequence[int]) -> embedding.Vectors:
        """float32 [len(ids), hidden_size]: the last layer's output behind its norm, at each position."""
        return embedding.hidden_states(self.network, ids)

    def embed(self, texts: Sequence[str]) -> embedding.Vectors:
        """float32 [len(texts), hidden_size]: a vector for each text, pooled as the package says (embedding_metadata).

        A text longer than the context is cut. Raises MlcBuildError for a model that was not made for this.
        """
        return embedding.embed(self.network, self.config, (self.text_ids(text) for text in texts))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that is to become a vector, with the special tokens around it.

        Pooling the last token needs an end of text there; where the tokenizer puts none, eos_token_id is appended.
        """
        ids = self.tokenizer.encode(text)
        eos = self.config.get("eos_token_id")
        eos = (*eos, None)[0] if isinstance(eos, list) else eos
        how = embedding.pooling(self.config, self.network.library)
        if how.strategy == "last" and isinstance(eos, int) and self.tokenizer.encode("") == []:
            return [*ids, eos]
        return ids

    def token_text(self, token: int) -> str:
        """The text of one token as it is inside a text, with its space; of a special one its name."""
        before = self._ordinary
        text = self.tokenizer.decode([*before, token]).removeprefix(self.tokenizer.decode(before))
        return text or self._names.get(token, "")

    @functools.cached_property
    def _ordinary(self) -> list[int]:
        return self.tokenizer.encode("a", add_special_tokens=False)

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return {i: text for text, i in self.tokenizer.tokens().items()}

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The text that the model writes after `prompt`; options as in `stream`."""
        return "".join(self.stream(prompt, **options))

    def chat(self, messages: str | Messages, **options: Any) -> str:
        """The assistant's reply to a user's message, or to a conversation; options as in `stream`."""
        return self.generate(self.chat_prompt(messages), **options)

    def stream(
        self, prompt: str | Sequence[int], *, max_tokens: int = 256, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """Pieces of text after `prompt` (text, or token ids), as they are written.

        It ends at one of the model's stop tokens or stop strings, at a string in `stop`, after `max_tokens` tokens, or
        where the context is full. `sampling` are fields of runtime.sampling.Sampling: temperature 0, the default,
        always takes the likeliest token; above it, `seed` makes the same draws again. Raises MlcBuildError for a prompt
        that does not fit into the context, and for a setting out of range.
        """
        yield from self.pieces(self.writer(prompt, max_tokens, stop, Sampling(**sampling)))

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """What the model reads for `prompt`. Raises MlcBuildError for an empty one without a token to begin with."""
        return self._beginning(self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))

    def writer(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        grammar: Grammar | None = None,
    ) -> Writer:
        """A text that is to be written after `prompt`. Raises MlcBuildError for one that does not fit."""
        ids = self.prompt_ids(prompt)
        self._check_length(len(ids))
        limit = self.context_window_size
        room = max_tokens if limit < 0 else min(max_tokens, limit - len(ids))
        ending = Ending(self.tokenizer.decode, self.stop_ids(), self._stop_strings(), self.active_vocab_size)
        return Writer(ids, ending, sampling, room, stop, grammar)

    def pieces(self, writer: Writer) -> Iterator[str]:
        """The text of `writer`, in pieces, computed in a session of its own."""
        if writer.finish_reason:
            return
        with self._empty_session(len(writer.ids) + writer.room) as session:
            sequence = session.add()
            writer.speed.start()
            logits = session.prefill(sequence, writer.ids)
            while True:
                piece = writer.add(logits)
                if piece:
                    yield piece
                if writer.finish_reason:
                    return
                logits = session.decode(sequence, writer.tokens[-1])

    def chat_prompt(self, messages: str | Messages) -> list[int]:
        """Token ids of a conversation up to where the assistant is to write."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        prompt = chat.render(self.conversation, turns)
        return [*prompt.prefix_token_ids, *self.tokenizer.encode(prompt.text, add_special_tokens=False)]

    @contextmanager
    def _empty_session(self, length: int) -> Iterator[Session]:
        """A session for one sequence of `length` tokens: the last one, if it is long enough and nobody uses it."""
        self._check_length(length)
        limit = self.context_window_size
        session, self._last = self._last, None
        if session is None or 0 < session.limit < length:
            # Twice as long as asked, so that a text that grows does not make a new cache each time.
            session = Session(self.network, 1, min(2 * length, limit) if limit > 0 else None)
        try:
            yield session
        finally:
            for sequence in list(session.lengths):
                session.remove(sequence)
            self._last = session

    def _check_length(self, length: int) -> None:
        limit = self.context_window_size
        if 0 < limit < length:
            raise MlcBuildError(
                f"{length} tokens do not fit into this library's context of {limit} (override context_window_size)"
            )

    def _beginning(self, ids: list[int]) -> list[int]:
        """A model says nothing after nothing: an empty prompt is the beginning of a text."""
        if ids:
            return ids
        bos = self.first_token()
        if bos is None:
            raise MlcBuildError("the prompt is empty, and this model has no bos_token_id to begin with")
        return [bos]

    def first_token(self, *names: str) -> int | None:
        """The token that texts begin with; where there is none, the first of other fields of the configuration."""
        for name in ("bos_token_id", *names):
            found = self.config.get(name)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int):
                return found
        return None

    def _template_stops(self, key: str) -> Sequence[Any]:
        template = self.config.get("conv_template")
        return (template.get(key) or ()) if isinstance(template, Mapping) else ()

    def stop_ids(self) -> set[int]:
        """The template's stop tokens, its stop strings that are tokens, and the checkpoint's end-of-text tokens."""
        eos = self.config.get("eos_token_id")
        ids = {*self._template_stops("stop_token_ids"), *(eos if isinstance(eos, list) else [eos])}
        ids |= {self.tokenizer.token_to_id(text) for text in self._template_stops("stop_str")}
        return {i for i in ids if i is not None}

    def _stop_strings(self) -> list[str]:
        return [text for text in self._template_stops("stop_str") if self.tokenizer.token_to_id(text) is None]


def load(
    folder: Path | str, library: Path | str | None = None, threads: int | None = None, device: str | None = None
) -> Model:
    """A package (`dist/<recipe>`), or any weights folder with a library of the same structure, ready to run.

    `threads` defaults to TVM_NUM_THREADS, or the physical cores that this process may use; `device` (cpu, cuda) to the
    one that the library was built for. Raises MlcBuildError where
    files are missing, and where the weights are not the ones that the library was compiled for.
    """
    files = package.find(Path(folder), None if library is None else Path(library))
    return Model(load_network(files, threads, device), files.config, files.weights)


def conversation(config: Mapping[str, Any]) -> chat.Conversation:
    """The template of an mlc-chat-config.json. Raises MlcBuildError where it names none."""
    template = config.get("conv_template")
    if not isinstance(template, Mapping):
        raise MlcBuildError(f"{package.CONFIG_NAME} has no `conv_template`: this package cannot chat")
    return chat.from_data(template.get("name") or "", template)


def load_network(files: package.PackageFiles, thread_count: int | None = None, device: str | None = None) -> Network:
    """The library of a package with its weights mapped (on a GPU copied there), after checking that they fit."""
    records, vocab_size = weights.read_index(files.weights), files.config.get("vocab_size")
    return network(files.library, records, files.weights, vocab_size, thread_count, device)


def network(
    library: Path,
    records: Sequence[weights.Record],
    source: object,
    vocab_size: Any = None,
    thread_count: int | None = None,
    device: str | None = None,
) -> Network:
    """A library with the tensors of `records`, which `source` has; `vocab_size` where it leaves that open.

    Raises MlcBuildError where they are not those that the library was compiled for.
    """
    import tvm_ffi

    count = threads.configure(threads.choose(thread_count))
    opened = Library(library, Device(device) if device is not None else None)
    wanted = opened.metadata.parameters
    vocab_size = match(wanted, records, library, source).get("vocab_size", vocab_size)
    if not isinstance(vocab_size, int):
        raise MlcBuildError(f"{library}: neither its parameters nor {package.CONFIG_NAME} tell the vocabulary's size")
    by_name = {record.name: record for record in records}
    loaded = weights.load([by_name[parameter.name] for parameter in wanted])
    tensors = [opened.device.place(tensor) for tensor in loaded]
    return Network(opened, tvm_ffi.convert(tensors), vocab_size, count)
