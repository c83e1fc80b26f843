"""A repository on a hub brought to hold certain files: what differs, and one commit that changes it.

Uploading is huggingface_hub's, with its endpoint and token. Blobs that the hub has are not sent again, so what was cut
off goes on where it was; files appear with the commit, all at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.cache.hub_commit import commit
from mlcbuild.errors import MlcBuildError
from mlcbuild.redact import redact

Content = Path | bytes


@dataclass(frozen=True)
class Changes:
    """What a commit would do to a repository; `head` is the commit that this was seen at; None: no such thing."""

    repository: str
    head: str | None
    new: tuple[str, ...]
    changed: tuple[str, ...]
    deleted: tuple[str, ...]
    same: tuple[str, ...]
    size: int  # bytes of new and changed files

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.deleted)


def changes(
    repository: str, files: Mapping[str, Content], owns: Callable[[str], bool], known: Mapping[str, str]
) -> Changes:
    """What differs between `files` and the repository. Files there that `owns` names and that are none of these go.

    `known` are sha256 of files, so that large ones need not be read.

    Raises MlcBuildError when the hub does not answer, or refuses.
    """
    head, there = _listing(repository)
    new = tuple(name for name in files if name not in there)
    changed = tuple(name for name in files if name in there and not _is_same(files[name], there[name], known.get(name)))
    deleted = tuple(sorted(name for name in there if name not in files and owns(name)))
    same = tuple(name for name in files if name in there and name not in changed)
    return Changes(repository, head, new, changed, deleted, same, sum(size(files[name]) for name in (*new, *changed)))


def upload(found: Changes, files: Mapping[str, Content], message: str, private: bool) -> str:
    """Make the changes, in one commit on top of what was seen; its id. Raises MlcBuildError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[Any] = [
        CommitOperationAdd(name, str(files[name]) if isinstance(files[name], Path) else files[name])
        for name in (*found.new, *found.changed)
    ]
    operations += [CommitOperationDelete(name) for name in found.deleted]
    with _explained(found.repository):
        if found.head is None:
            HfApi().create_repo(found.repository, private=private, exist_ok=True)
        return commit(found.repository, "model", operations, message, parent=found.head)


def lines(found: Changes, sizes: Callable[[str], str]) -> Iterable[str]:
    """The changes, a line each."""
    if found.head is None:
        yield f"{found.repository}: a new repository"
    for mark, names in (("+", found.new), ("~", found.changed)):
        yield from (f"{found.repository}: {mark} {name}, {sizes(name)}" for name in names)
    yield from (f"{found.repository}: - {name}" for name in found.deleted)
    if found.same:
        yield f"{found.repository}: {len(found.same)} files are there already"


def _listing(repository: str) -> tuple[str | None, dict[str, Any]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(repository):
        try:
            info = HfApi().model_info(repository, files_metadata=True)
        except RepositoryNotFoundError:
            return None, {}
    return info.sha, {each.rfilename: each for each in info.siblings or ()}


def _is_same(content: Content, there: Any, sha256: str | None) -> bool:
    if there.size is not None and there.size != size(content):
        return False
    data = content if isinstance(content, bytes) else None
    if there.lfs is not None:
        return bool((sha256 or _sha256(content)) == there.lfs.sha256)
    data = data if data is not None else Path(str(content)).read_bytes()
    return bool(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.blob_id)


def _sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(content: Content) -> int:
    """Bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes a sentence without a token. Raises MlcBuildError."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, MlcBuildError):
        raise
    except Exception as error:  # it has no common base: httpx's, its own, OSError, ValueError, RuntimeError
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        hint = {
            401: "; set HF_TOKEN to a token that may write",
            403: "; the token may not write there",
            412: "; somebody else has committed meanwhile: run it again",
        }.get(status or 0, "; run it again: what has arrived is not sent again")
        words = redact(" ".join(f"{type(cause).__name__}: {cause}".split()))[:300]
        raise MlcBuildError(f"hf:{repository}: cannot be written: {words}{hint}") from None
