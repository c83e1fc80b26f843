"""What a hub answers is bounded and looked at before anything of it is used or written (FAULTS.md D)."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import socketserver
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.checkpoints import hub, pace
from mlcbuild.checkpoints.listing import is_name
from mlcbuild.errors import CheckpointError
from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving
from tests.checkpoints.small_hub import FILES, LOCKED, WEIGHTS, problem

REFUSED = "the hub's answer is refused: "


@dataclass
class Odd(Hub):
    """A hub whose listing is changed, and of a file in it."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)

    def listing(self) -> dict[str, Any]:
        made = super().listing()
        for each in made["siblings"]:
            if each["rfilename"] == WEIGHTS:
                each.update(self.weights)
        return {**made, **self.changes}


def said(monkeypatch: pytest.MonkeyPatch, odd: Hub) -> str:
    from huggingface_hub import constants

    with serving(odd) as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        return problem()


DIGEST = LOCKED[WEIGHTS].sha256


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sha": None}, "`sha` is None, expected a commit (40 hex digits)"),
        ({"sha": "../../x"}, "`sha` is '../../x', expected a commit (40 hex digits)"),
        ({"siblings": None}, "`siblings` is None, expected a list of files"),
        ({"siblings": "config.json"}, "`siblings` is 'config.json', expected a list of files"),
        ({"siblings": ["config.json"]}, "`siblings` has 'config.json', expected a file with its `rfilename`"),
        ({"siblings": [{"rfilename": 1}]}, "`siblings` has {'rfilename': 1}, expected a file with its `rfilename`"),
        ({"siblings": [{"rfilename": "a"}] * 2}, "`siblings` has 'a' twice"),
        (
            {"siblings": [{"rfilename": "config.json"}, {"rfilename": "a\n.pth"}]},
            "file name 'a\\n.pth' is refused: it cannot be the name of a file in a folder here",
        ),
    ],
)
def test_a_listing_that_is_none(
    server: Hub, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], text: str
) -> None:
    assert said(monkeypatch, Odd(dict(FILES), changes=changes)) == f"hf:owner/name: {REFUSED}{text}"


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"lfs": {"sha256": "../../x", "size": 1}}, "`lfs` is {'sha256': '../../x', 'size': 1}, expected `sha256` "),
        ({"lfs": {"sha256": DIGEST}}, f"`lfs` is {{'sha256': '{DIGEST}'}}, expected `sha256` (64 hex digits) and "),
        ({"lfs": {"sha256": DIGEST, "size": True}, "size": None}, f"`lfs` is {{'sha256': '{DIGEST}', 'size': True}}, "),
        ({"lfs": {"sha256": DIGEST, "size": 10**18}, "size": None}, f"`lfs` is {{'sha256': '{DIGEST}', 'size': 10"),
        ({"lfs": [], "size": 256000}, "`lfs` is [], expected `sha256` (64 hex digits) and `size`"),
        ({"lfs": None, "size": -1}, "`size` is -1, expected a number of bytes"),
        ({"size": 1}, "`size` is 1, and 256000 in `lfs`"),
        ({"lfs": None, "size": 1}, "`size` is 1, and 256000 bytes came"),
    ],
)
def test_facts_of_a_file_that_are_none(
    server: Hub, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any], text: str
) -> None:
    found = said(monkeypatch, Odd(dict(FILES), weights=weights))
    assert found.startswith(f"hf:owner/name: {REFUSED}{WEIGHTS}: {text}")


@pytest.mark.parametrize("name", ["..", "a/../b", "/a", "a//b", "./a", "a/", "", "a\\b", "a\tb", "\ud800", "ä" * 128])
def test_names_that_no_file_here_can_have(name: str) -> None:
    assert not is_name(name) and is_name("a/b-1.x") and is_name("ä" * 127)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 100_000, "config.json is not valid JSON: "),
        (b"[]", "config.json is not a JSON object"),
        (b'{"a": "\\ud800"}', "config.json has text that is not Unicode: "),
    ],
)
def test_a_config_that_the_lock_file_cannot_hold(server: Hub, content: bytes, text: str) -> None:
    server.files["config.json"] = content
    assert problem().startswith(f"hf:owner/name: {text}")


def test_very_many_files(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MOST_FILES", 2)
    assert problem() == f"hf:owner/name: {REFUSED}3 files of weights and the like; at most 2 are fetched"


def endless() -> Iterator[bytes]:
    return itertools.repeat(b" " * 65536)


@pytest.mark.parametrize(("path", "bound"), [("name", "LARGEST_LISTING"), ("config.json", "LARGEST_CONFIG")])
def test_an_answer_without_end(server: Hub, monkeypatch: pytest.MonkeyPatch, path: str, bound: str) -> None:
    monkeypatch.setattr(hub, bound, 1_000_000)
    server.faults = [Fault(path, pieces=endless)]
    assert problem().endswith(f": {REFUSED}it has more than 1,000,000 bytes")


def test_a_compressed_answer(server: Hub) -> None:
    """A few kilobytes on the way are gigabytes here; compressed answers were not asked for."""
    bomb = gzip.compress(bytes(10_000_000))
    server.faults = [Fault("name", headers={"Content-Encoding": "gzip"}, pieces=lambda: [bomb])]
    assert problem() == f"hf:owner/name: {REFUSED}it is compressed, which was not asked for"


def test_redirects_are_followed_without_what_they_come_with(server: Hub, tmp_path: Path) -> None:
    """FAULTS D, a sibling: a redirect's own body, and redirects without end."""
    there = {"Location": f"{server.url}/owner/name/resolve/main/{WEIGHTS}"}
    server.faults = [Fault(WEIGHTS, 302, there, pieces=endless)]
    hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    server.faults = [Fault("name", 302, {"Location": f"{server.url}/api/models/owner/name"}, times=99)]
    assert problem() == f"hf:owner/name: {REFUSED}it redirects 10 times"


def trickle() -> Iterator[bytes]:
    while True:
        time.sleep(0.01)
        yield b" "


@pytest.mark.parametrize("path", ["name", WEIGHTS])
def test_an_answer_that_trickles(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(pace, "WINDOW", 0.1)
    server.faults = [Fault(path, pieces=trickle)]
    with pytest.raises(CheckpointError, match=r"the hub sent \d+ bytes in \d seconds, which counts as nothing: try "):
        hub.fetch("owner/name", COMMIT, hub.resolve("owner/name").files, tmp_path / "out")


class Headers(socketserver.BaseRequestHandler):
    """A server whose headers never end."""

    def handle(self) -> None:
        self.request.recv(65536)
        with contextlib.suppress(OSError):
            self.request.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                time.sleep(0.01)
                self.request.sendall(b"a")


def test_headers_that_trickle(server: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS D, a sibling: so does a byte at each attempt."""
    from huggingface_hub import constants

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Headers) as slow:
        slow.daemon_threads = True
        threading.Thread(target=slow.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{slow.server_address[1]}")
        monkeypatch.setattr(pace, "WINDOW", 0.1)
        assert problem() == "hf:owner/name: the hub has not begun to answer after 0 seconds, 3 times in a row"
        slow.shutdown()


def test_a_byte_at_each_attempt(server: Hub, waits: list[float], tmp_path: Path) -> None:
    """FAULTS D, a sibling of one byte a second."""
    server.faults = [Fault(WEIGHTS, cut=1, times=99)]
    with pytest.raises(CheckpointError, match="6 times in a row"):
        hub.fetch("owner/name", COMMIT, LOCKED, tmp_path / "out")
    assert waits == [1, 2, 4, 8, 16]


def test_nothing_is_written_that_could_not_be_read_again(tmp_path: Path) -> None:
    from mlcbuild.errors import RecipeError
    from mlcbuild.recipes.lockfile import lock_path, write_lock
    from mlcbuild.recipes.types import Locked, LockedFile

    odd = Locked("x", {}, {"config.json": LockedFile("../../x", -1)})
    with pytest.raises(RecipeError, match=r"recipes.lock: repository `a/b`: `commit` is `x`, expected 40 hex digits"):
        write_lock(tmp_path, {"a/b": odd})
    assert not lock_path(tmp_path).exists()
