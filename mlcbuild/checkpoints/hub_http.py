"""Requests to a Hugging Face hub: tried again when that can help, and explained when they are refused.

The address, the token and whether to go online are huggingface_hub's business, so its environment variables hold:
HF_ENDPOINT, HF_TOKEN (or the token that `hf auth login` wrote under HF_HOME), HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT.
No text that leaves this module has the token in it, whatever the hub or a library says.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlcbuild import __version__
from mlcbuild.errors import CheckpointError
from mlcbuild.redact import redact

ATTEMPTS = 6  # in a row without a byte of progress
_FIRST_ATTEMPTS = 3  # of these at an address where no hub has been reached yet: it may be wrong
_AGAIN = (408, 429, 500, 502, 503, 504)
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 32.0  # seconds; doubled from one to the other
_sleep = time.sleep
_PATIENCE = 300.0  # seconds that a hub may ask for before its answer counts as a refusal
_RESET = re.compile(r"\bt=(\d+)")  # of the header `RateLimit: "api";r=0;t=42`: seconds until there is a new quota


@dataclass(frozen=True)
class Request:
    """One thing to be had: a repository, at a revision, or a file of it; for addresses and for messages."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return (
            f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "") + (f": {self.file}" if self.file else "")
        )


class Later(Exception):
    """A failure that may pass, as a sentence.

    `wait` are the seconds that the hub asks for; `unreached` says that there was no answer, or only part of one.
    """

    def __init__(self, text: str, wait: float | None = None, unreached: bool = False) -> None:
        super().__init__(text)
        self.wait = wait
        self.unreached = unreached


def get(
    request: Request,
    url: str,
    receive: Callable[[Any], None],
    headers: Callable[[], Mapping[str, str]] = dict,
    progress: Callable[[], int] = lambda: 0,
) -> None:
    """GET `url` and hand the streaming answer to `receive`; again, when the connection or the hub fails for a while.

    `headers` are asked for before each attempt, so that a download can go on where it stopped; `progress` is a number
    that grows with it: attempts are counted from where it last grew. Raises CheckpointError for everything else, for a
    hub that does not recover, and when HF_HUB_OFFLINE is set.
    """
    if _offline():
        raise CheckpointError(f"{request}: not in the local cache, and HF_HUB_OFFLINE is set: unset it to download")
    failures, before = 0, progress()
    while True:
        try:
            with _answer(request, url, headers()) as response:
                receive(response)
            return
        except Later as error:
            if progress() > before:
                failures, before = 0, progress()
            failures += 1
            wait = min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT) if error.wait is None else error.wait
            limit = _FIRST_ATTEMPTS if error.unreached and not before else ATTEMPTS
            if failures >= limit or wait > _PATIENCE:
                again = f", {failures} times in a row" if failures > 1 else ""
                raise CheckpointError(f"{request}: {redact(str(error))}{again}") from None
            _sleep(wait)


@contextmanager
def _answer(request: Request, url: str, more: Mapping[str, str]) -> Iterator[Any]:
    """The answer, if it is one of success. Raises Later, CheckpointError."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session

    headers = {**_headers(), **more}
    if not all("!" <= character <= "~" or character == " " for character in headers.get("authorization", "")):
        # A library that refused the header would show it.
        raise CheckpointError(f"{request}: HF_TOKEN is not a token: it has other characters than letters and digits")
    try:
        session = get_session()
        with session.stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if response.status_code >= 400:
                raise _refused(request, response, "authorization" in headers)
            yield response
    except errors.HTTPError as error:  # of whichever HTTP client the library has
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Later(f"the hub cannot be reached: {reason}", unreached=True) from None


def _headers() -> dict[str, str]:
    """Not huggingface_hub's own: those name the programs around it, which it asks the hub for."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {
        "user-agent": f"mlcbuild/{__version__}",
        "accept-encoding": "identity",  # compressed on the way, a file would have other sizes than those locked
        **({"authorization": f"Bearer {token}"} if token else {}),
    }


def _refused(request: Request, response: Any, with_token: bool) -> Exception:
    """What a refusal means, and what to do about it."""
    from huggingface_hub import constants

    status, code = response.status_code, response.headers.get("x-error-code", "")
    page = f"{constants.ENDPOINT}/{request.repo}"
    if status in _AGAIN:
        wait = _wait(response.headers)
        asked = f" (it asks to wait {wait:.0f} seconds)" if wait else ""
        if status == 429:
            hint = "" if with_token else "; with a token (HF_TOKEN) it allows more"
            return Later(f"the hub answers 429, too many requests{asked}{hint}", wait)
        return Later(f"the hub answers {status}{asked}: try again later", wait)
    if code == "GatedRepo":
        if with_token:
            return CheckpointError(
                f"{request}: the repository is gated, and the account of your token may not read it: "
                f"ask for access on {page}"
            )
        return CheckpointError(
            f"{request}: the repository is gated: accept its terms on {page} "
            "and set HF_TOKEN to a token of that account"
        )
    if code == "EntryNotFound":
        return CheckpointError(f"{request}: the repository has no such file at that revision")
    if code == "RevisionNotFound":
        return CheckpointError(f"{request}: the repository has no such revision: its branches and tags are on {page}")
    if status == 401 and with_token:
        return CheckpointError(f"{request}: the hub refuses the token: renew HF_TOKEN, or run `hf auth login`")
    if status == 401:
        return CheckpointError(
            f"{request}: the repository is private, or its name is wrong: set HF_TOKEN to a token that may read it, "
            f"or correct the name ({page})"
        )
    if status == 403:
        return CheckpointError(
            f"{request}: the token may not read the repository: give it that permission, or use another"
        )
    if status == 404:
        private = "that this token may read" if with_token else "that everybody may read"
        return CheckpointError(f"{request}: there is no repository of this name {private}: see {page}")
    return CheckpointError(f"{request}: the hub answers {status}")


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks for, as a number or a date (RFC 9110, 10.2.3), or until its quota is renewed."""
    text = headers.get("retry-after", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        found = _RESET.search(headers.get("ratelimit", ""))
        return float(found[1]) if found else None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
