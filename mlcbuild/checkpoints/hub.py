"""Checkpoints on a Hugging Face hub: what a revision holds, and its files, each checked against its sha256.

How the hub is asked: mlcbuild.checkpoints.hub_http. Files that huggingface_hub's own cache has (HF_HOME) are copied
from there, the others are downloaded side by side.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.header import climbs
from mlcbuild.checkpoints.hub_http import Request, receive
from mlcbuild.checkpoints.listing import parsed, read_listing
from mlcbuild.checkpoints.table import SAFETENSORS, TORCH, weight_files
from mlcbuild.errors import CheckpointError
from mlcbuild.recipes.types import Locked, LockedFile

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there
_SMALL = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "modules.json",  # of sentence-transformers: how the vector of a text is made
    "1_Pooling/config.json",
    "sentence_bert_config.json",
)
# Bytes of what is read into memory: what there is to know of a repository, its configuration, files that it names no
# digest of.
LARGEST_LISTING, LARGEST_CONFIG, LARGEST_SMALL = 64 << 20, 4 << 20, 256 << 20
MOST_FILES = 10_000  # that a build needs of a repository
_AT_ONCE = 8  # files, as in huggingface_hub
_RWKV_VOCABULARY = re.compile(r"rwkv_vocab_v\d{8}\.txt")


def needed_files(names: Collection[str], repo: str) -> list[str]:
    """The files of a repository that a build reads: config, tokenizer, and the weights in one form.

    A repository without weights that has an adapter's configuration is an adapter: that, and its factors. Raises
    CheckpointError when it is neither, and when a model has no config.json.
    """
    weights = weight_files(names)
    if not weights and ADAPTER_CONFIG in names:
        factors = [name for name in _ADAPTER_WEIGHTS if name in names][:1]
        if not factors:
            raise CheckpointError(f"hf:{repo}: an adapter without weights: no {' and no '.join(_ADAPTER_WEIGHTS)}")
        return [ADAPTER_CONFIG, *factors]
    if CONFIG not in names:
        raise CheckpointError(f"hf:{repo}: no {CONFIG}; it is not a Hugging Face model repository")
    if not weights:
        raise CheckpointError(
            f"hf:{repo}: no weights: neither {SAFETENSORS.single} nor {SAFETENSORS.index}, {TORCH.single} nor "
            f"{TORCH.index}"
        )
    vocabularies = sorted(name for name in names if _RWKV_VOCABULARY.fullmatch(name))
    return [name for name in _SMALL if name in names] + vocabularies[-1:] + weights


def resolve(repo: str, revision: str | None = None) -> Locked:
    """What `repo` holds at `revision` (default: its main branch).

    The hub knows the sha256 of large files; the small ones are downloaded here to compute theirs. Raises
    CheckpointError when the hub cannot be reached or does not give it out, and as `needed_files` does.
    """
    check_name(repo)
    asked = Request(repo, revision)
    listing = read_listing(read(asked, LARGEST_LISTING), str(asked))
    files: dict[str, LockedFile] = {}
    config: Any = None
    needed = needed_files(listing.entries, repo)
    if len(needed) > MOST_FILES:
        raise listing.refusal(f"{len(needed):,} files of weights and the like; at most {MOST_FILES:,} are fetched")
    for name in needed:
        listed = listing.file(name)
        if listed.large is not None and name not in (CONFIG, ADAPTER_CONFIG):
            files[name] = listed.large
            continue
        limit = LARGEST_CONFIG if name in (CONFIG, ADAPTER_CONFIG) else LARGEST_SMALL
        content = read(Request(repo, listing.commit, name), limit)
        if listed.size is not None and listed.size != len(content):
            raise listing.refusal(f"{name}: `size` is {listed.size}, and {len(content)} bytes came")
        files[name] = LockedFile(hashlib.sha256(content).hexdigest(), len(content))
        if name in (CONFIG, ADAPTER_CONFIG):
            config = _config(content, f"hf:{repo}: {name}")
    return Locked(listing.commit, config, files)


def fetch(
    repo: str,
    commit: str,
    files: Mapping[str, LockedFile],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    partial: Path | None = None,
) -> None:
    """Put `files` of `repo` at `commit` into `folder`, and nothing else.

    What has arrived stays in `partial` (on the same file system) until all of it has: the next call goes on from
    there. Raises CheckpointError for a file name that climbs, a disk without room for what is left, a file that the
    hub does not give out, and content whose size or sha256 is not the locked one; that file is then removed.
    """
    for name in files:
        if climbs(name):
            raise CheckpointError(f"hf:{repo}: file name {name!r} is refused: it would climb out of its folder")
    partial = partial or folder / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    names = {partial / info.sha256: name for name, info in files.items()}  # two names may have one content
    needed = sum(info.size for info in files.values())
    _check_room(repo, partial, needed - sum(place.stat().st_size for place in names if place.exists()))
    total = sum(files[name].size for name in names.values())
    stop, lock, sizes = threading.Event(), threading.Lock(), dict[str, int]()

    def bring(place: Path, name: str) -> None:
        def counted(size: int) -> None:
            if stop.is_set():
                raise InterruptedError
            with lock:
                sizes[name] = min(size, files[name].size)
                progress(sum(sizes.values()), total)

        if not _from_cache(repo, commit, name, files[name], place):
            _download(Request(repo, commit, name), files[name], place, counted)
        counted(files[name].size)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for finished in as_completed([pool.submit(bring, place, name) for place, name in names.items()]):
                finished.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for name, info in files.items():
        target, place = folder / name, partial / info.sha256
        target.parent.mkdir(parents=True, exist_ok=True)
        if names[place] == name:
            place.replace(target)
        else:
            shutil.copyfile(place, target)
    shutil.rmtree(partial, ignore_errors=True)


def _download(request: Request, info: LockedFile, place: Path, arrived: Callable[[int], None]) -> None:
    """Bring the file to `place`; what is there already is its beginning.

    Raises CheckpointError as `receive` does, with what has arrived left in place, and for content of another size or
    sha256 than `info` says, which is removed. Content that was begun earlier gets a second chance from the start.
    """
    begun = place.exists() and place.stat().st_size > 0
    for _ in range(2 if begun else 1):
        with place.open("ab") as file:
            if file.tell() < info.size:
                receive(request, file, info.size, arrived)
        problem = _difference(place, info)
        if problem is None:
            return
        place.unlink()
    raise CheckpointError(
        f"{request}: {problem}; build again, and if it stays so, `mlcbuild lock --update` shows what moved"
    )


def _difference(path: Path, info: LockedFile) -> str | None:
    """What of the file's content is not as locked."""
    size = path.stat().st_size
    if size != info.size:
        return f"{size} bytes{' or more' if size > info.size else ''}, recipes.lock says {info.size}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == info.sha256 else f"its sha256 is {digest}, recipes.lock says {info.sha256}"


def _from_cache(repo: str, commit: str, name: str, info: LockedFile, place: Path) -> bool:
    """Copy the file from huggingface_hub's own cache, if it is there and is the locked one."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=commit)
    if not isinstance(cached, str) or _difference(Path(cached), info) is not None:
        return False
    shutil.copyfile(cached, place)
    return True


def _check_room(repo: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"hf:{repo}: {needed:,} bytes are still to be downloaded, and the disk of {folder.parent} has {free:,} "
            "free: make room, or put the cache elsewhere (cache=DIR)"
        )


def check_name(repo: str) -> None:
    """Raises CheckpointError for what cannot be the name of a repository."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise CheckpointError(f"hf:{repo}: not a repository name: {error}") from None


def read(request: Request, limit: int) -> bytes:
    """A small answer, whole."""
    content = io.BytesIO()
    receive(request, content, limit=limit)
    return content.getvalue()


def _config(content: bytes, where: str) -> dict[str, Any]:
    """A configuration that the lock file can hold."""
    config = parsed(content, lambda error: error)
    if not isinstance(config, dict):
        wrong = f"valid JSON: {config}" if isinstance(config, Exception) else "a JSON object"
        raise CheckpointError(f"{where} is not {wrong}")
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where} has text that is not Unicode: {error.object[error.start]!a}") from None
    return config
