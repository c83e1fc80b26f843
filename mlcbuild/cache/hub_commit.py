"""One commit to a repository of a Hugging Face hub, with its large files sent by Xet or LFS, as the hub has it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

_AGAIN = (409, 412)  # somebody else's commit came in between
_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds


def commit(
    repository: str,
    kind: str,
    operations: Sequence[Any],
    message: str,
    parent: str | None = None,
    revision: str | None = None,
) -> str:
    """Make the commit, on top of `parent` if one is named; its id. `kind` is `model` or `dataset`.

    Raises what huggingface_hub raises.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

    def create() -> str:
        made = HfApi().create_commit(
            repository, operations, repo_type=kind, commit_message=message, parent_commit=parent, revision=revision
        )
        return str(made.oid)

    try:
        return create()
    except Exception:
        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None or _has_xet(repository, kind):
            raise
    # Where hf_xet is installed, huggingface_hub sends by Xet without asking whether the hub has it.
    constants.HF_HUB_DISABLE_XET = True
    return create()


def commit_on_top(
    repository: str, kind: str, operations: Sequence[Any], message: str, revision: str | None = None
) -> str:
    """`commit` on whatever is the newest; tried again when others commit at the same time."""
    for wait in _WAITS:
        try:
            return commit(repository, kind, operations, message, revision=revision)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) not in _AGAIN:
                raise
            time.sleep(wait * random.uniform(0.5, 1.0))  # builders that met must not meet again
    return commit(repository, kind, operations, message, revision=revision)


def _has_xet(repository: str, kind: str) -> bool:
    """Whether the hub has Xet storage for this repository; True where it does not say."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    url = f"{constants.ENDPOINT}/api/{kind}s/{repository}/xet-write-token/main"
    try:
        return bool(get_session().get(url, headers=build_hf_headers(), timeout=10).status_code != 404)
    except Exception:  # there is no common base: httpx's, its own, OSError
        return True
