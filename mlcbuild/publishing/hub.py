"""A repository on a hub brought to hold certain files: what differs, and one commit that changes it.

Uploading is huggingface_hub's, with its endpoint and token. Blobs that the hub has are not sent again, so what was cut
off goes on where it was; files appear with the commit, all at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.cache.files import hash_file
from mlcbuild.cache.hub_commit import commit
from mlcbuild.errors import MlcBuildError
from mlcbuild.redact import redact

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

Content = Path | bytes


@dataclass(frozen=True)
class Changes:
    """What a commit would do to a repository; `head` is the commit that this was seen at; None: no such thing."""

    repository: str
    head: str | None
    new: Mapping[str, CommitOperationAdd]
    changed: Mapping[str, CommitOperationAdd]
    deleted: tuple[str, ...]
    same: int  # files that are there already

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.deleted)

    @property
    def size(self) -> int:
        """Bytes of new and changed files."""
        return sum(each.upload_info.size for each in (*self.new.values(), *self.changed.values()))


def changes(
    repository: str, files: Mapping[str, Content], owns: Callable[[str], bool], known: Mapping[str, str]
) -> Changes:
    """What differs between `files` and the repository. Files there that `owns` names and that are none of these go.

    `known` are sha256 of files, so that large ones that are there need not be read. What is sent has them.

    Raises MlcBuildError when the hub does not answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd

    head, there = _listing(repository)
    same = {name for name in files.keys() & there.keys() if _is_same(files[name], there[name], known.get(name))}
    wanted = {name: CommitOperationAdd(name, content) for name, content in files.items() if name not in same}
    for name, each in wanted.items():  # its sha256 is of bytes that were read just now
        if known.get(name, each.upload_info.sha256.hex()) != each.upload_info.sha256.hex():
            raise MlcBuildError(f"{each.path_or_fileobj!s}: changed while it was published: run it again")
    return Changes(
        repository,
        head,
        new={name: each for name, each in wanted.items() if name not in there},
        changed={name: each for name, each in wanted.items() if name in there},
        deleted=tuple(sorted(name for name in there if name not in files and owns(name))),
        same=len(same),
    )


def upload(found: Changes, message: str, private: bool) -> str:
    """Make the changes, in one commit on top of what was seen; its id. Raises MlcBuildError."""
    from huggingface_hub import CommitOperationDelete, HfApi

    operations = [*found.new.values(), *found.changed.values(), *map(CommitOperationDelete, found.deleted)]
    with _explained(found.repository):
        if found.head is None:
            HfApi().create_repo(found.repository, private=private, exist_ok=True)
        return commit(found.repository, "model", operations, message, parent=found.head)


def lines(found: Changes, show: Callable[[int], str]) -> Iterator[str]:
    """The changes, a line each; `show` says bytes."""
    if found.head is None:
        yield f"{found.repository}: a new repository"
    for mark, added in (("+", found.new), ("~", found.changed)):
        yield from (f"{found.repository}: {mark} {name}, {show(each.upload_info.size)}" for name, each in added.items())
    yield from (f"{found.repository}: - {name}" for name in found.deleted)
    if found.same:
        yield f"{found.repository}: {found.same} files are there already"


def _listing(repository: str) -> tuple[str | None, dict[str, Any]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _explained(repository):
        try:
            info = HfApi().model_info(repository, files_metadata=True)
        except RepositoryNotFoundError:
            return None, {}
    return info.sha, {each.rfilename: each for each in info.siblings or ()}


def _is_same(wanted: Content, there: Any, sha256: str | None) -> bool:
    from huggingface_hub.utils.sha import git_hash

    if there.size is not None and there.size != (len(wanted) if isinstance(wanted, bytes) else wanted.stat().st_size):
        return False
    if there.lfs is not None:
        return bool((sha256 or _sha256(wanted)) == there.lfs.sha256)
    return bool(git_hash(wanted if isinstance(wanted, bytes) else wanted.read_bytes()) == there.blob_id)


def _sha256(content: Content) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content)


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
