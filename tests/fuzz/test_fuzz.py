"""Malformed files without end: each gives a result or a sentence, and soon (FAULTS.md D).

Every reader has a few seconds; MLCBUILD_FUZZ_SECONDS gives each of them more, and other files at every run.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlcbuild.cache.action import Action, Ingredients
from mlcbuild.cache.tree import Entry, Tree
from mlcbuild.checkpoints.header import TensorRef, read_header
from mlcbuild.checkpoints.listing import read_listing
from mlcbuild.checkpoints.torch_files import _MAGIC as MAGIC
from mlcbuild.checkpoints.torch_files import read_torch
from mlcbuild.errors import MlcBuildError
from mlcbuild.gguf import checkpoint, tensors
from mlcbuild.gguf.config import _factors
from mlcbuild.recipes import syntax
from mlcbuild.recipes.lockfile import examine, lock_path
from mlcbuild.reporting import events
from mlcbuild.reporting.history import read_logs
from tests.checkpoints.hub_server import Hub
from tests.fuzz import packed

pytestmark = pytest.mark.slow
ASKED = os.environ.get("MLCBUILD_FUZZ_SECONDS")
SECONDS = float(ASKED or 2)
LONGEST = 5.0  # seconds of a processor for one file of a few kilobytes
DIGEST = "0123456789abcdef" * 4


def headers(folder: Path, content: bytes) -> None:
    """The bytes as a header, with the length that it has; the tensors' bytes after it."""
    path = folder / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(12))
    inside(read_header(path, path.name), path)


def whole_files(folder: Path, content: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    inside(read_header(path, path.name), path)


def ggufs(folder: Path, content: bytes) -> None:
    paths = {"x.gguf": folder / "x.gguf"}
    paths["x.gguf"].write_bytes(content)
    header = checkpoint.read(paths)
    json.dumps(checkpoint.small_files(header, paths))
    tensors.sizes(header, paths)


def gguf(facts: dict[str, Any]) -> bytes:
    """A llama without layers: its embedding and its factors of rope."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    def value(given: Any) -> bytes:
        if isinstance(given, list):
            return struct.pack("<IIQ", 9, kinds[type(given[0])], len(given)) + b"".join(map(raw, given))
        return struct.pack("<I", kinds[type(given)]) + raw(given)

    def raw(given: Any) -> bytes:
        return text(given) if isinstance(given, str) else struct.pack("<f" if isinstance(given, float) else "<i", given)

    kinds: dict[type, int] = {str: 8, float: 6, int: 5}

    def tensor(name: str, shape: tuple[int, ...], offset: int) -> bytes:
        return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)

    head = b"".join(text(key) + value(each) for key, each in facts.items())
    head += tensor("token_embd.weight", (4, 3), 0) + tensor("rope_freqs.weight", (2,), 64)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(facts)) + head
    return head + bytes(-len(head) % 32 + 64) + struct.pack("<2f", *_factors(8.0, 8192, 1e4, 2))


def pickles(folder: Path, content: bytes) -> None:
    path = folder / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", content)
        archive.writestr("m/data/0", bytes(16))
    inside(read_torch(path, path.name), path)


def older(folder: Path, content: bytes) -> None:
    """Of the format before zip: the beginning, then a storage."""
    path = folder / "x.bin"
    path.write_bytes(content + TENSOR + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16))
    inside(read_torch(path, path.name), path)


def inside(refs: list[TensorRef], path: Path) -> None:
    size = path.stat().st_size
    assert all(0 <= ref.offset <= ref.offset + (0 if ref.strides else ref.nbytes) <= size for ref in refs)


def yaml(folder: Path, content: bytes) -> None:
    try:
        syntax.construct(syntax.compose(syntax.decode(content)))
    except syntax.Fault as fault:
        raise MlcBuildError(fault.text) from None


def logs(folder: Path, content: bytes) -> None:
    (folder / "log.jsonl").write_bytes(content)
    read_logs([folder / "log.jsonl"])


def locks(folder: Path, content: bytes) -> None:
    lock_path(folder).parent.mkdir(exist_ok=True)
    lock_path(folder).write_bytes(content)
    for locked in examine(folder)[0].values():
        assert all(len(file.sha256) == 64 and file.size >= 0 for file in locked.files.values())


def shared_entries(folder: Path, content: bytes) -> None:
    assert all(entry.size >= 0 for entry in Action.from_json(DIGEST, content).tree.files.values())


def listings(folder: Path, content: bytes) -> None:
    found = read_listing(content, "hf:a/b")
    for name in found.entries:
        found.file(name)


@dataclass(frozen=True)
class Target:
    """A reader, and a file that it reads."""

    run: Callable[[Path, bytes], None]
    seed: bytes


HEAD = json.dumps(
    {"a": {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}, "__metadata__": {"b": "c"}}
).encode()
TENSOR = (
    b"(dS'a'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I2\nI2\nt"
    b"(I2\nI1\ntI00\nNtRs."
)
LOCKED = {"commit": "0" * 40, "config": {"a": 1}, "files": {"x": {"sha256": DIGEST, "size": 1}}}
PLANNED = events.RecipePlanned("r", "m", "q", "t", ("convert:m",))
FINISHED = events.RunFinished(1.0, 1, 0, 0, 0)
TREE = Tree({"a/b": Entry(DIGEST, 3, 0o644, Path())})
TARGETS = {
    "headers": Target(headers, HEAD),
    "whole files": Target(whole_files, len(HEAD).to_bytes(8, "little") + HEAD + bytes(12)),
    "ggufs": Target(
        ggufs,
        gguf(
            {
                "general.architecture": "llama",
                **{f"llama.{name}": 4 for name in ("context_length", "embedding_length", "block_count")},
                "llama.attention.head_count": 2,
                "llama.attention.layer_norm_rms_epsilon": 0.5,
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "qwen2",
                "tokenizer.ggml.tokens": ["a", "b", "ab"],
                "tokenizer.ggml.token_type": [1, 1, 3],
                "tokenizer.ggml.merges": ["a b"],
                "tokenizer.ggml.bos_token_id": 2,
            }
        ),
    ),
    **{name: Target(partial(packed.run, name), name.encode()) for name in packed.FORMATS},
    "pickles": Target(pickles, TENSOR),
    "older pickles": Target(older, b"".join(pickle.dumps(each, 2) for each in (MAGIC, 1001, {"little_endian": True}))),
    "yaml": Target(yaml, b"model: tiny\nmatrix: [a, {b: &x 1e3}]\n? *x\n: |\n  text\n"),
    "logs": Target(
        logs, b"".join(json.dumps({"time": 1.0, **events.to_json(e)}).encode() + b"\n" for e in (PLANNED, FINISHED))
    ),
    "locks": Target(locks, json.dumps({"version": 1, "repos": {"a/b": LOCKED}}).encode()),
    "shared entries": Target(shared_entries, Action.of(Ingredients("k", "c", {}, {}, {}), "n", 1.0, TREE).to_json()),
    "listings": Target(listings, json.dumps(Hub({"config.json": b"{}", "model.safetensors": b"x"}).listing()).encode()),
}
# What readers stumble over: signs of the formats, numbers at their edges, text that is none, much in each other.
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"\\",
        b"\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\\ud800",
        b"null",
        b"true",
    ),
    *(
        b"-1",
        b"0",
        b"1e400",
        b"NaN",
        b"1" * 5000,
        b"9223372036854775808",
        b"../",
        b"*x",
        b"&x ",
        b"- ",
        b"? ",
        b"!!python/x ",
    ),
    *(
        b"[" * 2000,
        b'{"a":' * 2000,
        b"- " * 2000,
        b"(" * 500,
        b"\x85" * 500,
        b"0g0\n\x86p0\n" * 64,
        b"]q\0",
        b"}q\0",
        b"R",
        b"b",
    ),
]


def damaged(seed: bytes, random: Random) -> bytes:
    """The seed with up to six pieces put in, left out, or repeated."""
    content = seed
    for _ in range(random.randint(1, 6)):
        start = random.randint(0, len(content))
        end = min(len(content), start + random.choice((0, 1, 4, 40)))
        piece = random.choice(
            (random.choice(TOKENS), random.randbytes(random.randint(0, 4)), content[start:end] * 3, b"")
        )
        content = content[:start] + piece + content[end if random.random() < 0.5 else start :]
    return content


@pytest.mark.parametrize("name", TARGETS)
def test_a_result_or_a_sentence(tmp_path: Path, name: str) -> None:
    target, random, end = TARGETS[name], Random(None if ASKED else 0), time.monotonic() + SECONDS
    with contextlib.suppress(MlcBuildError):
        target.run(tmp_path, target.seed)
    while time.monotonic() < end:
        content = damaged(target.seed, random)
        began = time.process_time()
        try:
            target.run(tmp_path, content)
        except MlcBuildError as error:
            wrong = None if str(error) and len(str(error).encode()) < 10_000 else f"{len(str(error))} characters"
        except Exception as error:
            wrong = "".join(traceback.format_exception(error))
        else:
            wrong = None
        seconds = time.process_time() - began
        assert wrong is None and seconds < LONGEST, f"{wrong}\n{seconds:.1f} s for {content!r:.3000}"
