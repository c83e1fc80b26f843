"""A GGUF file of a repository: locked by its header alone, then fetched like any other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.checkpoints import hub
from mlcbuild.errors import CheckpointError, RecipeError
from mlcbuild.gguf import repository
from mlcbuild.recipes.lockfile import key, read_lock, write_lock
from mlcbuild.recipes.types import Source
from mlcbuild.workspace.hub_locks import resolve
from tests.checkpoints.hub_server import Hub
from tests.gguf import files

NAME = "tiny-Q4_0.gguf"


@pytest.fixture
def hosted(server: Hub, tmp_path: Path) -> bytes:
    files.write(tmp_path / NAME, kinds=files.KINDS[4:5])
    content = (tmp_path / NAME).read_bytes()
    server.files = {"README.md": b"a card", NAME: content, "tiny-Q8_0.gguf": content[:5000]}
    return content


def test_its_header_is_all_that_is_fetched(
    server: Hub, hosted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "_FIRST", 2000)  # bytes, in place of a megabyte
    source = Source(hf="owner/name", file="Q4_0")
    locked = resolve(source)
    assert [name for name in server.requests if NAME in name], server.requests
    assert locked.config["model_type"] == "llama" and locked.config["vocab_size"] == len(files.TOKENS)
    assert {name: (file.sha256, file.size) for name, file in locked.files.items()} == {
        NAME: (hashlib.sha256(hosted).hexdigest(), len(hosted))
    }
    (tmp_path / "recipes").mkdir()
    write_lock(tmp_path, {key(source): locked})
    assert read_lock(tmp_path) == {"owner/name:Q4_0": locked}
    hub.fetch("owner/name", locked.commit, locked.files, tmp_path / "got")
    assert (tmp_path / "got" / NAME).read_bytes() == hosted
    ranges = repository.Ranges("owner/name", locked.commit)
    assert ranges(NAME, 12_345, 100) == hosted[12_345:12_445]
    with pytest.raises(RecipeError, match="its name is not `owner/name`"):
        write_lock(tmp_path, {"owner/name:@main": locked})


def test_what_a_hub_lacks(server: Hub, hosted: bytes) -> None:
    with pytest.raises(
        CheckpointError, match="hf:owner/name: no GGUF file is `Q2_K`, or says so; there are: tiny-Q4_0"
    ):
        resolve(Source(hf="owner/name", file="Q2_K"))
    with pytest.raises(CheckpointError, match=r"tiny-Q8_0.gguf: truncated: its header goes on after the 5,000 bytes"):
        resolve(Source(hf="owner/name", file="Q8_0"))


def test_a_hub_that_ignores_ranges(server: Hub, hosted: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = server.answer

    def whole(path: str, headers: dict[str, str]) -> Any:
        headers.pop("range", None)
        return answer(path, headers)

    monkeypatch.setattr(server, "answer", whole)
    ranges = repository.Ranges("owner/name", server.commit)
    assert ranges(NAME, 12_345, 100) == hosted[12_345:12_445]
    monkeypatch.setattr(repository, "LARGEST_HEADER", 1000)
    with pytest.raises(CheckpointError, match="the hub sends all of it where a part is asked for: name a local file"):
        ranges(NAME, len(hosted) - 100, 100)
