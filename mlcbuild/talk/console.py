"""`mlcbuild chat`: lines are read, answers are written as they come; what begins with `/` is a command.

Answers go to standard output, everything else to standard error: through a pipe there are only answers.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.commands import write
from mlcbuild.runtime.model import Model, load
from mlcbuild.runtime.sampling import Sampling, defaults
from mlcbuild.talk.dialogue import Dialogue

_PLAIN = "LM"  # MLC's template without roles


def chat(
    folder: Path,
    *,
    system: str | None = None,
    library: Path | None = None,
    max_tokens: int = 1024,
    window: int = 16384,
    threads: int | None = None,
    device: str | None = None,
    **sampling: Any,
) -> None:
    """Talk to a package until the input ends; `sampling` in place of the package's own settings.

    Raises MlcBuildError as `load` does, for a package that cannot chat, and for settings out of range.
    """
    for name, value in (("--max-tokens", max_tokens), ("--window", window)):
        if value < 1:
            raise MlcBuildError(f"{name} is {value}: expected 1 or more")
    Sampling(**sampling)
    model = load(folder, library, threads, device)
    if model.network.library.metadata.model_task != "chat":
        raise MlcBuildError(f"{folder}: a model of texts gives vectors, it does not chat")
    dialogue = Dialogue(model, Sampling(**{**defaults(model.config), **sampling}), max_tokens, window)
    dialogue.reset(system)
    for line in _greeting(model, folder):
        _say(line)
    console = Console(dialogue)
    for line in _typed(dialogue) if sys.stdin.isatty() else _piped():
        if not console.obey(line):
            return


class Console:
    """What each line of input does."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._dialogue = dialogue
        self._told = 0  # messages that were dropped, and the user knows it

    def obey(self, line: str) -> bool:
        """Answer a line, or do what a command says; False where the program should end."""
        name, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                return self._answer(lambda: self._dialogue.ask(line)) if line.strip() else True
            if name not in _COMMANDS:
                raise MlcBuildError(f"{name} is no command; /help lists them")
            return _COMMANDS[name][0](self, rest.strip())
        except MlcBuildError as error:
            _say(str(error))
            return True

    def _answer(self, begin: Callable[[], Iterator[str]]) -> bool:
        dialogue = self._dialogue
        with _interrupts(dialogue.stop):
            heard = write(begin(), sys.stdout)
        if dialogue.dropped != self._told:
            self._told = dialogue.dropped
            _say(f"(the window of {dialogue.window} tokens is full: the oldest {self._told} messages are forgotten)")
        if heard and dialogue.last is not None:
            end = {None: "stopped; ", "length": "at its limit; "}.get(dialogue.last.finish_reason, "")
            _say(f"[{end}{dialogue.last.speed}]")
        return heard

    def _help(self, _: str) -> bool:
        width = max(map(len, _COMMANDS)) + 1
        for name, (_run, does) in _COMMANDS.items():
            _say(f"{name:{width}} {does}")
        _say("Ctrl-C stops an answer, Ctrl-D ends the program.")
        return True

    def _reset(self, _: str) -> bool:
        self._dialogue.reset()
        self._told = 0
        _say("The conversation begins anew.")
        return True

    def _system(self, text: str) -> bool:
        self._dialogue.reset(text)
        self._told = 0
        whose = "the one given" if text else "that of the template"
        _say(f"The system message is {whose}; the conversation begins anew.")
        return True

    def _stats(self, _: str) -> bool:
        dialogue = self._dialogue
        turns = sum(message["role"] == "user" for message in dialogue.messages)
        _say(f"{turns} questions; {dialogue.in_window} of {dialogue.window} tokens of the window")
        if dialogue.dropped:
            _say(f"the oldest {dialogue.dropped} messages are forgotten")
        if dialogue.last is not None:
            _say(f"last answer: {dialogue.last.speed}")
        return True

    def _regenerate(self, _: str) -> bool:
        return self._answer(self._dialogue.again)

    def _exit(self, _: str) -> bool:
        return False


_COMMANDS: dict[str, tuple[Callable[[Console, str], bool], str]] = {
    "/help": (Console._help, "show the commands"),
    "/reset": (Console._reset, "forget the conversation"),
    "/system": (Console._system, "begin anew with the system message that follows"),
    "/stats": (Console._stats, "show how full the window is, and how fast the last answer was"),
    "/regenerate": (Console._regenerate, "write the last answer once more"),
    "/exit": (Console._exit, "end the program"),
}


def _greeting(model: Model, folder: Path) -> Sequence[str]:
    if model.conversation.name == _PLAIN:
        return [f"{folder}: its template is `{_PLAIN}`: it was not made to chat, and goes on where your text ends."]
    return [f"{folder}: template {model.conversation.name}; /help shows the commands."]


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 is refused line by line
        sys.stdin.reconfigure(errors="surrogateescape")
    yield from (line.rstrip("\r\n") for line in sys.stdin)


def _typed(dialogue: Dialogue) -> Iterator[str]:
    """Lines of a person at a terminal, with editing and history, until Ctrl-D.

    Ctrl-C is the dialogue's from the moment that a line is entered until the next one is asked for: at no instant
    between does it end the program.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    completer = WordCompleter([*_COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(completer=completer, complete_while_typing=False)
    with _interrupts(dialogue.stop):
        while True:
            dialogue.listen()
            try:
                yield session.prompt("> ")
            except KeyboardInterrupt:
                _say("(Ctrl-D or /exit ends)")
            except EOFError:
                return


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Meanwhile, Ctrl-C calls `stop`: an exception could come in the middle of a change of the KV cache."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
