"""A page in headless Chromium, driven as a person would: opened, looked at, typed into. By Chrome's DevTools protocol
(https://chromedevtools.github.io/devtools-protocol/) over a pipe, so that no port has to be free."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.server
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# WebGPU without a GPU: SwiftShader, which comes with Chromium.
FLAGS = (
    *("--headless", "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run", "--remote-debugging-pipe"),
)
# Chromium reads commands from descriptor 3 and writes answers to 4; these words give it those two.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
# What is on a page that does not do what it should, and what it has loaded.
_STATE = """document.body.innerText + "\\n" + performance.getEntriesByType("resource").map((e) => e.name).join("\\n")"""


class Page:
    """One page. Every call waits for the browser's answer and raises AssertionError with what went wrong in it."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._read = b""
        self._session: dict[str, str] = {}
        # A context of its own keeps what it stores in memory.
        context = self._call("Target.createBrowserContext", {})
        target = self._call("Target.createTarget", {"url": "about:blank", **context})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = {"sessionId": attached["sessionId"]}

    def open(self, url: str) -> None:
        """Go to `url`, and wait until the page has run its scripts (modules that wait for something excepted)."""
        failed = self._call("Page.navigate", {"url": url}).get("errorText")
        assert not failed, f"{url}: {failed}"
        self.until("document.readyState == 'complete' && location.href != 'about:blank'", 30)

    def evaluate(self, expression: str, seconds: float = 60) -> Any:
        """The value of a JavaScript expression, or of the promise that it is, as JSON."""
        words = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self._call("Runtime.evaluate", words, seconds)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"not so after {seconds} s: {condition}\n{self.evaluate(_STATE)}"
            time.sleep(0.2)

    def texts(self, selector: str) -> list[str]:
        """What can be read in the elements that a CSS selector finds."""
        found = self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
        return [str(text) for text in found]

    def type(self, text: str) -> None:
        """Type a line into what has the focus, and press Enter."""
        self._call("Input.insertText", {"text": text})
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self._call("Input.dispatchKeyEvent", {"type": "keyDown", "text": "\r", **key})
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", **key})

    def _call(self, method: str, words: Mapping[str, Any], seconds: float = 60) -> Any:
        number = next(self._numbers)
        request = json.dumps({"id": number, "method": method, "params": {**words}, **self._session}).encode() + b"\0"
        while request:
            request = request[os.write(self._commands, request) :]
        end = time.monotonic() + seconds
        while True:
            answer = self._answer(end - time.monotonic(), method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _answer(self, seconds: float, method: str) -> Any:
        """The next message, be it an answer or an event that nobody asked for."""
        end = time.monotonic() + seconds
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer {method} in time"
            data = os.read(self._answers, 1 << 20)
            assert data, f"Chromium ended before it answered {method}"
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a Chromium that lives as long as the block, with its profile in the folder `profile`."""
    theirs, commands = os.pipe()
    answers, written = os.pipe()
    # Numbers out of the way of 3 and 4, which they become.
    given = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (theirs, written)]
    words = [sys.executable, "-c", _START, *map(str, given), "chromium", *FLAGS, f"--user-data-dir={profile}"]
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        process = subprocess.Popen(words, pass_fds=given, stdout=nothing, stderr=nothing)
    for descriptor in (theirs, written, *given):
        os.close(descriptor)
    try:
        yield Page(commands, answers)
    finally:
        process.terminate()
        process.wait(30)
        os.close(commands)
        os.close(answers)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a plain static file server shows `folder`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
