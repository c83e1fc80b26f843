"""Requests to a Hugging Face hub: tried again when that can help, and explained when they are refused.

Connections, the address, the token, Xet storage and whether to go online are huggingface_hub's business, so its
environment variables hold: HF_ENDPOINT, HF_TOKEN (or the token that `hf auth login` wrote under HF_HOME),
HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_DISABLE_XET. Its `hf_hub_download` cannot be used: it removes what has
arrived of a file when it is interrupted, takes more bytes than the file has, and waits as long as a server asks.

No text that leaves this module has the token in it, whatever the hub or a library says.
"""

from __future__ import annotations

import email.utils
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO
from urllib.parse import quote

from mlcbuild import __version__
from mlcbuild.checkpoints import pace
from mlcbuild.errors import CheckpointError
from mlcbuild.redact import redact

ATTEMPTS = 6  # in a row that brought less than a second of pace.SLOWEST
_FIRST_ATTEMPTS = 3  # of these at an address where no hub has been reached yet: it may be wrong
_AGAIN = (408, 429, 500, 502, 503, 504)
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 32.0  # seconds; doubled from one to the other
_sleep = time.sleep
REDIRECTS = 10  # of one request
PATIENCE = 300.0  # seconds that a hub may ask for before its answer counts as a refusal
_RESET = re.compile(r"\bt=(\d+)")  # of the header `RateLimit: "api";r=0;t=42`: seconds until there is a new quota
_RANGE = re.compile(r"bytes (\d+)-")

# What a refusal means and what to do about it, by the hub's error code or the status: without a token, and with one.
_REFUSALS = {
    "GatedRepo": (
        "the repository is gated: accept its terms on {page} and set HF_TOKEN to a token of that account",
        "the repository is gated, and the account of your token may not read it: ask for access on {page}",
    ),
    "EntryNotFound": ("the repository has no such file at that revision",),
    "RevisionNotFound": ("the repository has no such revision: its branches and tags are on {page}",),
    "401": (
        "the repository is private, or its name is wrong: set HF_TOKEN to a token that may read it, or correct the "
        "name ({page})",
        "the hub refuses the token: renew HF_TOKEN, or run `hf auth login`",
    ),
    "403": ("the token may not read the repository: give it that permission, or use another",),
    "404": (
        "there is no repository of this name that everybody may read: see {page}",
        "there is no repository of this name that this token may read: see {page}",
    ),
}


@dataclass(frozen=True)
class Request:
    """One thing to be had: the facts about a repository, at a revision, or a file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """For messages; of a commit, the beginning."""
        commit = self.revision is not None and len(self.revision) == 40
        revision = f"@{self.revision[:12] if commit else self.revision}" if self.revision else ""
        return f"hf:{self.repo}{revision}" + (f": {self.file}" if self.file else "")

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        revision = quote(self.revision or "", safe="")
        if self.file:
            return f"{constants.ENDPOINT}/{self.repo}/resolve/{revision}/{quote(self.file)}"
        return f"{constants.ENDPOINT}/api/models/{self.repo}{f'/revision/{revision}' if revision else ''}?blobs=true"


@dataclass
class Later(Exception):
    """A failure that may pass: a sentence, the seconds that the hub asks to wait, and whether there was no answer."""

    text: str
    wait: float | None = None
    unreached: bool = False


def receive(
    request: Request,
    file: BinaryIO,
    size: int | None = None,
    arrived: Callable[[int], None] = lambda count: None,
    limit: int | None = None,
) -> None:
    """Bring to the end of `file` what it lacks of the answer, `size` bytes in all, or `limit` at most.

    Again, when the hub fails for a while; anew, when it ignores the range. `arrived` is told the bytes that are there;
    it ends when they are more than `size`. Raises CheckpointError for a refusal, for a hub that does not recover, for
    an answer that is longer than `limit`, compressed or slower than `pace.SLOWEST`, and when HF_HUB_OFFLINE is set.
    """
    failures, before, counted = 0, file.tell(), pace.Pace(file.tell())
    while True:
        try:
            for chunk in _missing(request, file, size, by_xet=not failures):
                file.write(chunk)
                arrived(file.tell())
                if size is not None and file.tell() > size:
                    break
                if limit is not None and file.tell() > limit:
                    raise CheckpointError(f"{request}: the hub's answer is refused: it has more than {limit:,} bytes")
                counted.check(request, file.tell())
            return
        except Later as error:
            if size is not None and file.tell() >= size:  # it failed after the last byte
                return
            if file.tell() > before + pace.SLOWEST:
                failures, before = 0, file.tell()
            failures += 1
            wait = min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT) if error.wait is None else error.wait
            attempts = _FIRST_ATTEMPTS if error.unreached and not file.tell() else ATTEMPTS
            if failures >= attempts or wait > PATIENCE:
                again = f", {failures} times in a row" if failures > 1 else ""
                raise CheckpointError(f"{request}: {redact(error.text)}{again}") from None
            arrived(file.tell())  # which raises where another file of the same download is refused
            _sleep(wait)
            counted.since += wait


def _missing(request: Request, file: BinaryIO, size: int | None, by_xet: bool) -> Iterator[bytes]:
    """What the file lacks, in pieces as they arrive: a buffer would be lost with the connection. Raises Later."""
    headers, begin = _headers(request), file.tell()
    with _answer(request, headers | ({"range": f"bytes={begin}-"} if begin else {})) as response:
        stored = _in_xet(response) if by_xet and size else None
        if stored is not None:
            yield from _of_xet(stored, size, begin, headers)
            return
        first = _RANGE.match(response.headers.get("content-range", "")) if response.status_code == 206 else None
        if begin and (first is None or int(first[1]) != begin):  # the hub sends all of it
            file.seek(0)
            file.truncate()
        yield from response.iter_raw()
        if size is not None and file.tell() < size and response.headers.get("content-length") is None:
            raise Later(f"the connection ended after {file.tell():,} of {size:,} bytes")


def _in_xet(response: Any) -> Any:
    """Where in Xet storage the file is, or None. Its address is to be the hub's own, for that is told the token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import parse_xet_file_data_from_response
    from huggingface_hub.utils._runtime import is_xet_available

    answers = (*response.history, response) if is_xet_available() else ()
    for stored in map(parse_xet_file_data_from_response, answers):
        if stored is not None and stored.refresh_route.startswith(f"{constants.ENDPOINT}/"):
            return stored
    return None


def _of_xet(stored: Any, size: int | None, begin: int, headers: dict[str, str]) -> Iterator[bytes]:
    """A file's bytes from `begin` on out of Xet storage: huggingface_hub's `xet_get` writes whole files only."""
    try:
        from hf_xet import XetFileInfo
        from huggingface_hub.utils._xet import get_xet_session, refresh_xet_connection_info, xet_headers_without_auth

        connection = refresh_xet_connection_info(file_data=stored, headers=headers)
        group = get_xet_session().new_download_stream_group(
            endpoint=connection.endpoint,
            token=connection.access_token,
            token_expiry_unix_secs=connection.expiration_unix_epoch,
            token_refresh_url=stored.refresh_route,
            token_refresh_headers=headers,
            custom_headers=xet_headers_without_auth(headers),
        )
        yield from group.download_stream(XetFileInfo(stored.file_hash, size), start=begin)
    except Exception as error:  # of many kinds; an ImportError where the libraries are older
        raise Later(f"its Xet storage fails: {_first_line(error)}") from None  # the hub itself has it, too


@contextmanager
def _answer(request: Request, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer, if it is one of success, uncompressed. Raises Later, CheckpointError."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session

    session = get_session()
    try:
        following = session.build_request(
            "GET", request.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        history: list[Any] = []
        while True:  # the client would read all of what a redirect has beside its address
            response = _begun(partial(session.send, following, stream=True, follow_redirects=False))
            try:
                if response.status_code >= 400:
                    raise _refused(request, response, "authorization" in headers)
                following = response.next_request
                if following is None:
                    if response.headers.get("content-encoding", "identity") != "identity":
                        text = "the hub's answer is refused: it is compressed, which was not asked for"
                        raise CheckpointError(f"{request}: {text}")
                    response.history = history
                    yield response
                    return
            finally:
                response.close()
            history.append(response)
            if len(history) > REDIRECTS:
                raise CheckpointError(f"{request}: the hub's answer is refused: it redirects {REDIRECTS} times")
    except errors.OfflineModeIsEnabled:
        text = f"{request}: not in the local cache, and HF_HUB_OFFLINE is set: unset it to download"
        raise CheckpointError(text) from None
    except errors.HTTPError as error:  # of whichever HTTP client the library has
        raise Later(f"the hub cannot be reached: {_first_line(error)}", unreached=True) from None


def _begun(send: Callable[[], Any]) -> Any:
    """The answer whose headers `send` waits for, in a thread that is left alone where they trickle in without end."""
    sent: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def wait() -> None:
        try:
            sent.put((send(), None))
        except BaseException as error:
            sent.put((None, error))

    threading.Thread(target=wait, daemon=True).start()
    try:
        response, error = sent.get(timeout=pace.WINDOW)
    except queue.Empty:
        raise Later(f"the hub has not begun to answer after {pace.WINDOW:.0f} seconds", unreached=True) from None
    if error is not None:
        raise error
    return response


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _headers(request: Request) -> dict[str, str]:
    """Not huggingface_hub's own: those name the programs around it, which it asks the hub for."""
    try:
        from huggingface_hub import constants, get_token
    except ValueError as error:  # as it is loaded, it reads the environment
        raise CheckpointError(f"{request}: HF_ENDPOINT, or another variable of the hub's, is wrong: {error}") from None

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not all("!" <= character <= "~" for character in token):
        # A library that refused the header would show it.
        raise CheckpointError(f"{request}: HF_TOKEN is not a token: it has other characters than letters and digits")
    return {
        "user-agent": f"mlcbuild/{__version__}",
        "accept-encoding": "identity",  # compressed on the way, a file would have other sizes than those locked
        **({"authorization": f"Bearer {token}"} if token else {}),
    }


def _refused(request: Request, response: Any, with_token: bool) -> Exception:
    """What a refusal means, and what to do about it."""
    from huggingface_hub import constants

    status = response.status_code
    if status in _AGAIN:
        wait = _wait(response.headers)
        asked = f" (it asks to wait {wait:.0f} seconds)" if wait else ""
        if status == 429:
            hint = "" if with_token else "; with a token (HF_TOKEN) it allows more"
            return Later(f"the hub answers 429, too many requests{asked}{hint}", wait)
        return Later(f"the hub answers {status}{asked}: try again later", wait)
    meant = _REFUSALS.get(response.headers.get("x-error-code", "")) or _REFUSALS.get(str(status))
    if meant is None:
        return CheckpointError(f"{request}: the hub answers {status}")
    text = meant[-1 if with_token else 0].format(page=f"{constants.ENDPOINT}/{request.repo}")
    return CheckpointError(f"{request}: {text}")


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks for, as a number or a date (RFC 9110, 10.2.3), or until its quota is renewed."""
    text = headers.get("retry-after", "")
    if text.isdecimal():  # ² is a digit, too
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        found = _RESET.search(headers.get("ratelimit", ""))
        return float(found[1]) if found else None
