"""A GGUF file on a Hugging Face hub: which one is meant, and its config.json, of which only the header is fetched."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection
from typing import Any

from mlcbuild.checkpoints.hub import LARGEST_LISTING, check_name, read
from mlcbuild.checkpoints.hub_http import Request, receive
from mlcbuild.checkpoints.listing import read_listing
from mlcbuild.errors import CheckpointError
from mlcbuild.gguf.checkpoint import SUFFIX, joined, parts
from mlcbuild.gguf.config import config
from mlcbuild.gguf.header import LARGEST_HEADER, Header, Truncated, parse
from mlcbuild.recipes.types import Locked, LockedFile

_FIRST = 1 << 20  # bytes that are asked for first
_OTHER = re.compile(r"(^|/)(mmproj|imatrix)", re.IGNORECASE)  # what is no language model's


def resolve(repo: str, revision: str | None, file: str) -> Locked:
    """What is locked of the repository: the commit, the files, and the config.json that their headers make.

    Raises CheckpointError where the hub does not give it out, and where `file` names none or several.
    """
    check_name(repo)
    asked = Request(repo, revision)
    listing = read_listing(read(asked, LARGEST_LISTING), str(asked))
    names = chosen(listing.entries, file, f"hf:{repo}")
    files: dict[str, LockedFile] = {}
    for name in names:
        large = listing.file(name).large
        if large is None:
            raise listing.refusal(f"{name}: no digest of it is listed")
        files[name] = large
    return Locked(listing.commit, config(header(repo, listing.commit, names), Ranges(repo, listing.commit)), files)


def chosen(names: Collection[str], file: str, where: str) -> list[str]:
    """The file of this name, or the one whose name says so of its quantization (Q4_K_M); with all its parts."""
    known = sorted(name for name in names if name.endswith(SUFFIX) and not _OTHER.search(name))
    word = re.compile(rf"(^|[-._/]){re.escape(file)}(-\d{{5}}-of-\d{{5}})?\.gguf", re.IGNORECASE)
    found = [name for name in known if name == file] or [name for name in known if word.search(name)]
    if not found:
        raise CheckpointError(
            f"{where}: no GGUF file is `{file}`, or says so; there are: {', '.join(known) or 'none that ends in .gguf'}"
        )
    whole = parts(found[0], names, f"{where}: ")
    if others := [name for name in found if name not in whole]:
        raise CheckpointError(f"{where}: `{file}` may be {found[0]} or {others[0]}: write the whole name")
    return whole


def header(repo: str, commit: str, names: list[str]) -> Header:
    """The header of all parts."""
    return joined([_header(repo, commit, name) for name in names])


def _header(repo: str, commit: str, name: str) -> Header:
    ranges, size, content = Ranges(repo, commit), _FIRST, b""
    while True:
        content += ranges(name, len(content), size - len(content))
        try:
            return parse(content, name)
        except Truncated:
            if len(content) < size or size >= LARGEST_HEADER:
                raise
            size *= 4


class Ranges:
    """Bytes of a repository's files, from an offset on, so many, without the rest."""

    def __init__(self, repo: str, commit: str) -> None:
        self._repo, self._commit = repo, commit

    def __call__(self, file: str, offset: int, size: int) -> bytes:
        taken, request = _Taken(offset), Request(self._repo, self._commit, file)

        def arrived(count: int) -> None:
            if count >= offset + size:
                raise _EnoughError
            if count - taken.begin > LARGEST_HEADER:
                raise CheckpointError(
                    f"{request}: the hub sends all of it where a part is asked for: name a local file"
                )

        with contextlib.suppress(_EnoughError):
            receive(request, taken, arrived=arrived)
        begin = offset - taken.begin
        return taken.getvalue()[begin : begin + size]


class _EnoughError(Exception):
    pass


class _Taken(io.BytesIO):
    """A file of which the first `begin` bytes are taken to be here already."""

    def __init__(self, begin: int) -> None:
        super().__init__()
        self.begin = begin

    def tell(self) -> int:
        return self.begin + super().tell()

    def seek(self, position: int, whence: int = 0) -> int:
        self.begin = 0  # the hub sends all of it
        return super().seek(position, whence)

    def truncate(self, size: Any = None) -> int:
        return super().truncate(0)
