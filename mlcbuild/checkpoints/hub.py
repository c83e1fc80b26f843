"""Checkpoints on a Hugging Face hub: what a revision holds, and its files, each checked against its sha256.

Built on huggingface_hub, so its environment variables hold: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HOME. Files that
its cache already has are copied from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.header import climbs
from mlcbuild.checkpoints.table import INDEX, SHARD, SINGLE
from mlcbuild.errors import CheckpointError

CONFIG = "config.json"
_SMALL = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class FileInfo:
    size: int
    sha256: str


@dataclass(frozen=True)
class Resolved:
    """A revision, pinned: its commit, the content of its config.json, and the files that a build needs."""

    commit: str
    config: Mapping[str, Any]
    files: Mapping[str, FileInfo]


def needed_files(names: Collection[str], repo: str) -> list[str]:
    """The files of a repository that a build reads: config, tokenizer, and the weights in one form.

    Raises CheckpointError when there is no config.json or there are no safetensors.
    """
    if CONFIG not in names:
        raise CheckpointError(f"hf:{repo}: no {CONFIG}; it is not a Hugging Face model repository")
    weights = [SINGLE] if SINGLE in names else sorted(name for name in names if name == INDEX or SHARD.fullmatch(name))
    if not weights:
        torch = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        found = f"; it has {torch[0]}, but PyTorch pickles are not read yet" if torch else ""
        raise CheckpointError(f"hf:{repo}: no {SINGLE} and no {INDEX}{found}")
    return [name for name in _SMALL if name in names] + weights


def resolve(repo: str, revision: str | None = None) -> Resolved:
    """What `repo` holds at `revision` (default: its main branch).

    The hub knows the sha256 of large files; the small ones are downloaded here to compute theirs. Raises
    CheckpointError when the hub cannot be reached or does not give it out, and as `needed_files` does.
    """
    import huggingface_hub

    with _explained(repo, revision):
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    commit = info.sha or ""
    files: dict[str, FileInfo] = {}
    with tempfile.TemporaryDirectory(prefix="mlcbuild-hub-") as folder:
        for name in needed_files(siblings, repo):
            large = siblings[name].lfs
            if large is not None:
                files[name] = FileInfo(large["size"], large["sha256"])
                continue
            with _explained(repo, commit):
                path = Path(huggingface_hub.hf_hub_download(repo, name, revision=commit, local_dir=folder))
            files[name] = FileInfo(path.stat().st_size, _sha256(path))
        config_path = Path(folder) / CONFIG
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"hf:{repo}: {CONFIG} is not valid JSON: {error}") from None
    return Resolved(commit, config, files)


def fetch(
    repo: str,
    commit: str,
    files: Mapping[str, FileInfo],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Put `files` of `repo` at `commit` into `folder`, and nothing else.

    Raises CheckpointError for a file name that climbs, a file that the hub does not give out, and content whose size
    or sha256 is not the locked one; that file is then removed.
    """
    import huggingface_hub

    total = sum(info.size for info in files.values())
    done = 0
    for name in files:
        if climbs(name):
            raise CheckpointError(f"hf:{repo}: file name {name!r} is refused: it would climb out of its folder")
    for name, info in files.items():
        target = folder / name
        cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=commit)
        if isinstance(cached, str):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached, target)
        else:
            with _explained(repo, commit, name):
                huggingface_hub.hf_hub_download(
                    repo, name, revision=commit, local_dir=folder, tqdm_class=_bar(progress, done, total)
                )
        _verify(target, info, f"hf:{repo}@{commit[:12]}: {name}")
        done += info.size
        progress(done, total)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on what it downloaded


def _verify(path: Path, info: FileInfo, where: str) -> None:
    size = path.stat().st_size
    if size != info.size:
        path.unlink()
        raise CheckpointError(f"{where}: {size} bytes, recipes.lock says {info.size}")
    digest = _sha256(path)
    if digest != info.sha256:
        path.unlink()
        raise CheckpointError(f"{where}: its sha256 is {digest}, recipes.lock says {info.sha256}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bar(progress: Callable[[int, int], None], done: int, total: int) -> Any:
    """A progress bar class for huggingface_hub that draws nothing and reports to `progress`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.seen = 0

        def update(self, count: float | None = 1) -> None:
            self.seen += int(count or 0)
            progress(min(done + self.seen, total), total)

    return Bar


@contextmanager
def _explained(repo: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Turn the library's errors into CheckpointErrors that say what to do."""
    from huggingface_hub import errors

    at = f"hf:{repo}" + (f"@{revision}" if revision else "") + (f": {file}" if file else "")
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{at}: the repository is gated: accept its terms on the hub and set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{at}: no such repository, or a private one (then set HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{at}: the repository has no such revision") from None
    except errors.RemoteEntryNotFoundError:
        raise CheckpointError(f"{at}: the repository has no such file at that revision") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{at}: not a repository name: {error}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if _offline():
            raise CheckpointError(f"{at}: not in the local cache, and HF_HUB_OFFLINE is set") from None
        raise CheckpointError(f"{at}: the hub cannot be reached: {_first_line(error)}") from error
    except (errors.HTTPError, OSError) as error:  # HTTPError: of whichever HTTP client the library has
        raise CheckpointError(f"{at}: the hub cannot be reached: {_first_line(error)}") from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
