"""A shared cache that gives what cannot be: every entry is checked, and no more is read than was announced.

FAULTS.md D. Nothing of it may take away what is here.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache.action import Action, Damaged, Ingredients
from mlcbuild.cache.layout import action_name, blob_name
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.engine.shared import SharedCache, open_shared
from tests.cache.test_materialise import damage

WANTED = Ingredients("toy", "code", {"a": 1}, {}, {})
CONTENT = b"what a step has made"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def made(store: Store) -> Entry:
    (store.root / "incoming").write_bytes(CONTENT)
    return store.ingest(store.root / "incoming")


def put(folder: Path, name: str, content: bytes | Path) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(content) if isinstance(content, Path) else path.write_bytes(content)
    return path


def entry_of(*entries: Entry) -> bytes:
    tree = Tree({f"file-{number}": entry for number, entry in enumerate(entries)})
    return Action.of(WANTED, "toy:x", 1.0, tree).to_json()


def fetched(shared: SharedCache, store: Store) -> str:
    """What was said; nothing where the step was fetched."""
    said: list[str] = []
    action = shared.fetch(WANTED, store, said.append)
    assert (action is None) is bool(said)
    return "\n".join(said)


@pytest.mark.parametrize("size", [len(CONTENT) + 1, 0, 10**12, 10**18, -1, True])
def test_an_entry_with_another_size_takes_no_blob_away(store: Store, folder: Path, size: Any) -> None:
    mine = made(store)
    action = Action("ab" * 32, "toy", "toy:mine", "", {}, {}, {}, 1.0, Tree({"file": mine}))
    store.commit(action)
    put(folder, blob_name(mine.digest), CONTENT)
    put(folder, action_name(WANTED.key), entry_of(Entry(mine.digest, size, 0o644, mine.path)))
    said = fetched(open_shared(str(folder), False, 20), store)
    assert ": what it has of this is damaged (" in said and ": building it here" in said
    assert store.action(action.key) == action
    assert mine.path.read_bytes() == CONTENT
    assert [path.name for path in store.root.glob("ac/*/*")] == [f"{action.key}.json"], "nothing was written"


@pytest.mark.parametrize("name", ["../../outside", "n" * 300, "a//b"])
def test_an_entry_with_an_odd_name_is_a_miss(store: Store, folder: Path, name: str) -> None:
    mine = made(store)
    put(folder, blob_name(mine.digest), CONTENT)
    content = Action.of(WANTED, "toy:x", 1.0, Tree({name: mine})).to_json()
    put(folder, action_name(WANTED.key), content)
    said = fetched(open_shared(str(folder), False, 20), store)
    assert f"its entry has a file {name[:80]!r} that cannot be" in said
    assert not list(store.root.glob("ac/*/*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CONTENT[:-1], "it has 19 bytes, not 20"),
        (CONTENT + b"!", "it has more than 20 bytes"),
        (Path("/dev/zero"), "it has more than 20 bytes"),  # never ends
        (CONTENT[::-1], "its sha256 is "),
    ],
)
def test_no_more_of_a_blob_is_read_than_was_announced(
    store: Store, folder: Path, tmp_path: Path, content: bytes | Path, words: str
) -> None:
    there = made(Store(tmp_path / "elsewhere"))
    put(folder, action_name(WANTED.key), entry_of(there))
    blob = put(folder, blob_name(there.digest), content)
    shared = open_shared(str(folder), False, 20)
    assert f"is damaged (blob {there.digest[:16]}: {words}" in fetched(shared, store)
    assert not list(store.root.glob("cas/*/*"))
    blob.unlink()
    blob.write_bytes(CONTENT)
    assert fetched(shared, store) == "", "it is asked again: nothing else was wrong with it"
    assert store.find(there.digest, there.size) is not None


def test_an_entry_need_not_end(store: Store, folder: Path) -> None:
    """A sibling of bytes without end: /dev/zero in the place of an entry."""
    put(folder, action_name(WANTED.key), Path("/dev/zero"))
    assert "it has more than 16,777,216 bytes" in fetched(open_shared(str(folder), False, 20), store)


def test_damage_in_what_a_worker_is_to_be_given_is_mended(store: Store, folder: Path) -> None:
    """FAULTS.md A2: the build failed, though it knew what to build again. What is only given away is no reason to."""
    mine, said = made(store), list[str]()
    shared = open_shared(str(folder), True, 20)
    damage(mine.path)
    with pytest.raises(Damaged, match=r": damaged: its sha256 is .*: removed$"):
        shared.send([mine], store, said.append)
    assert store.find(mine.digest, mine.size) is None and not said
    mine = made(store)
    damage(mine.path)
    assert not shared.give(Action.of(WANTED, "toy:x", 1.0, Tree({"file": mine})), store, said.append)
    assert said[0].endswith("; not put into the shared cache: the next build makes it again")


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[str]:
    """A server that has an entry, and a blob whose bytes never end."""
    there = made(Store(tmp_path / "elsewhere"))
    entry = entry_of(there)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            try:
                if self.path.endswith(".json"):
                    self.wfile.write(entry)
                    return
                while True:
                    self.wfile.write(CONTENT * 1000)
            except OSError:  # whoever asked has gone
                pass

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/cache"
        server.shutdown()


def test_an_answer_that_never_ends_is_left(store: Store, endless: str) -> None:
    """A sibling: a server's."""
    assert "it has more than 20 bytes" in fetched(open_shared(endless, False, 20), store)
    assert not list(store.root.glob("cas/*/*"))
