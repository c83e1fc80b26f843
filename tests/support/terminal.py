"""A terminal: a program runs on a pseudo-terminal, and what a person would see of it is read off the screen."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

SILENCE = 120  # seconds

_PIECES = re.compile(r"\x1b\[\??([\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


@dataclass
class Screen:
    """What is on a screen that never scrolls, and where the cursor is. It knows the sequences that rich writes."""

    rows: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0
    cursor: bool = True
    hidden: int = 0  # how often the cursor was taken away: once for each display that began

    def feed(self, text: str) -> None:
        for numbers, letter, control, plain in _PIECES.findall(text):
            if plain:
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + plain + line[self.column + len(plain) :]
                self.column += len(plain)
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            else:
                self._obey(letter, numbers)

    def _obey(self, letter: str, numbers: str) -> None:
        match letter, numbers:
            case "A", _:
                self.row = max(self.row - int(numbers or 1), 0)
            case "K", "2":
                self.rows[self.row] = ""
            case "l", "25":
                self.cursor, self.hidden = False, self.hidden + 1
            case "h", "25":
                self.cursor = True
            case "m", _:
                pass  # colours
            case _:
                raise AssertionError(f"the screen does not know ESC [ {numbers} {letter}")

    @property
    def lines(self) -> list[str]:
        """The lines down to the cursor's, without blanks at their ends."""
        return [line.rstrip() for line in self.rows[: self.row + 1]]


def on_terminal(
    command: Sequence[str], where: Path, environment: Mapping[str, str], columns: int = 140
) -> tuple[int, str, Screen]:
    """Run a command on a terminal: its exit status, everything that it wrote, and the screen after it."""
    main, end = pty.openpty()
    ioctl(end, TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    settings = {**os.environ, "TERM": "xterm", **environment}
    with subprocess.Popen(command, cwd=where, stdin=end, stdout=end, stderr=end, env=settings) as process:
        os.close(end)
        written = bytearray()
        while chunk := _read(main):
            written += chunk
    os.close(main)
    text, screen = written.decode(), Screen()
    screen.feed(text)
    return process.returncode, text, screen


class Terminal:
    """A program on a terminal at which somebody types and waits for what it says."""

    def __init__(self, command: Sequence[str], where: Path, environment: Mapping[str, str]) -> None:
        self._main, end = pty.openpty()
        ioctl(end, TIOCSWINSZ, struct.pack("HHHH", 50, 140, 0, 0))
        settings: dict[str, Any] = {"stdin": end, "stdout": end, "stderr": end, "start_new_session": True}
        # The terminal is its own, so that Ctrl-C reaches it, whatever the shell has told the tests to do with that.
        own = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        program = [sys.executable, "-c", own, *command]
        self._process = subprocess.Popen(program, cwd=where, env=environment, **settings)
        os.close(end)
        self._new = ""  # written since the last thing that was waited for

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def expect(self, pattern: str) -> None:
        """Wait until what was written since the last call matches."""
        while (found := re.search(pattern, self._new)) is None:
            chunk = self._read()
            assert chunk, f"it ended and never said {pattern}: {self._new}"
            self._new += re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", chunk.decode(errors="replace"))
        self._new = self._new[found.end() :]

    def wait(self) -> int:
        """The exit status, once the program has ended."""
        while self._read():
            pass
        return self._process.wait()

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._main], [], [], SILENCE)
        assert ready, f"it said nothing more for {SILENCE} s: {self._new}"
        return _read(self._main)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has it open any more
        return b""
