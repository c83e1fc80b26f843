"""Conversations: what is kept, what is dropped, what is computed again; and the program on a pipe (FAULTS G)."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import Model
from mlcbuild.runtime.sampling import Sampling, defaults
from mlcbuild.talk.console import Console
from mlcbuild.talk.dialogue import Dialogue


def dialogue(model: Model, max_tokens: int = 5, window: int = 96) -> Dialogue:
    return Dialogue(model, Sampling(), max_tokens, window)


def said(talk: Dialogue, content: str) -> str:
    return "".join(talk.ask(content))


def test_turns_are_answered_as_without_a_cache(tiny: Model) -> None:
    """A turn computes only what is new; the answer is that of the whole conversation."""
    talk = dialogue(tiny)
    for question in ("Hi", "Sea"):
        answer = said(talk, question)
        assert talk.messages[-2:] == [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert answer == tiny.chat(talk.messages[:-1], max_tokens=5)
    assert talk.last is not None and talk.last.speed.reused > 30
    first = talk.messages[-1]["content"]
    assert "".join(talk.again()) == first and len(talk.messages) == 4


def test_the_oldest_turns_go_when_the_window_is_full(tiny: Model) -> None:
    talk = dialogue(tiny)
    for question in "abcdef":
        said(talk, question)
    assert 0 < talk.dropped <= 10 and talk.dropped % 2 == 0
    kept = talk.messages[talk.dropped : -1]
    assert talk.messages[-1]["content"] == tiny.chat(kept, max_tokens=5)
    assert talk.in_window <= talk.window == 96
    before, dropped = list(talk.messages), talk.dropped
    with pytest.raises(
        MlcBuildError, match=r"the message is too long: with it the prompt has .* tokens, the window 96"
    ):
        said(talk, "sea " * 90)
    assert (talk.messages, talk.dropped) == (before, dropped)


def test_the_system_message_outlives_a_reset(tiny: Model) -> None:
    talk = dialogue(tiny)
    talk.reset("Sing.")
    said(talk, "a")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Sing."}]
    with pytest.raises(MlcBuildError, match="nothing was asked yet"):
        talk.again()
    talk.reset("")
    assert talk.messages == []


class Pressing(io.StringIO):
    """An output whose reader presses Ctrl-C at the first piece."""

    def write(self, text: str) -> int:
        if not self.getvalue():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = dialogue(tiny, max_tokens=40)
    monkeypatch.setattr(sys, "stdout", Pressing())
    assert Console(talk).obey("Hi")
    assert "[stopped; prompt: " in capsys.readouterr().err
    assert talk.last is not None and len(talk.last.tokens) < 40
    monkeypatch.undo()
    assert said(talk, "Sea") == tiny.chat(talk.messages[:-1], max_tokens=40)


def chat(package: Path, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlcbuild.cli", "chat", str(package), "--temperature", "0", *options]
    done = subprocess.run(command, input=lines.encode(errors="surrogateescape"), capture_output=True)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_lines_of_a_pipe_are_answered_and_commands_obeyed(tiny: Model, tiny_package: Path) -> None:
    done = chat(tiny_package, "\udcff\nHi\n/stats\n/nothing\n/help\n/exit\nnever\n", "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == tiny.chat("Hi", max_tokens=6) + "\n"
    for text in (
        "tiny-cpu: template chatml; /help shows the commands.",
        "[at its limit; prompt: ",
        "1 questions; ",
        "the text is not Unicode: some of it is not UTF-8",
        "of 96 tokens of the window",
        "/nothing is no command; /help lists them",
        "/regenerate  write the last answer once more",
    ):
        assert text in done.stderr


def test_a_template_without_roles_is_said(tiny_package: Path, tmp_path: Path) -> None:
    package = tmp_path / "plain"
    shutil.copytree(tiny_package, package)
    path = package / "tiny-q0f32-MLC/mlc-chat-config.json"
    config = json.loads(path.read_text())
    config["conv_template"] |= {"name": "LM", "roles": {"user": "", "assistant": ""}, "seps": [""]}
    path.write_text(json.dumps(config))
    done = chat(package, "", "--max-tokens", "4")
    assert "plain: its template is `LM`: it was not made to chat, and goes on where your text ends." in done.stderr
    assert chat(package, "", "--window", "0").stderr == "mlcbuild chat: --window is 0: expected 1 or more\n"


def test_the_sampling_of_a_package_is_its_config_s(tiny: Model) -> None:
    found = Sampling(**defaults({**tiny.config, "temperature": 0.6, "top_p": 0.9, "seed": None}))  # type: ignore[arg-type]
    assert found == dataclasses.replace(Sampling(), temperature=0.6, top_p=0.9)
