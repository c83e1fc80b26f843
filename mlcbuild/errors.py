"""Errors whose text is written for the user: what is wrong, where, and what to do about it.

`plainly` is the boundary: what no program can prevent (a full disk, another user's folder, memory that ran out, a lost
connection) leaves it as a sentence, wherever it happened. What remains is a bug, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType


def pointer(file: str) -> str:
    """What is said of a file that begins with POINTER."""
    return f"{file}: a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"


POINTER = b"version https://git-lfs"  # what git has in a large file's place begins so


class MlcBuildError(Exception):
    """Something the user can act on; its text is shown without a traceback."""


class RecipeError(MlcBuildError):
    """Everything that is wrong with a set of recipe files, reported in one go."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(MlcBuildError):
    """A checkpoint's files do not hold what its config or its index promises."""


class StepFailed(MlcBuildError):
    """A step of the graph ended without an artifact."""


class NotLocked(MlcBuildError):
    """A repository has no entry in recipes.lock, so nothing is known of the model yet; the text names both."""


class Unavailable(MlcBuildError):
    """This machine lacks a tool that the recipe needs; nothing is wrong with the recipe itself."""


NO_MEMORY = (
    "memory ran out (or a limit of it: `ulimit -v`): end other programs, let fewer steps run at once (memory=8G, "
    "cores=1), or take a machine with more"
)
_NO_MORE = "close other programs or raise the limit"
_SENTENCES = {
    errno.EFBIG: "the file gets larger than is allowed here: raise the limit (`ulimit -f unlimited`)",
    errno.ELOOP: "a symbolic link leads back to itself: remove it",
    errno.ENAMETOOLONG: "the name is longer than the file system takes: choose a shorter one",
    errno.EMFILE: f"too many files are open: {_NO_MORE} (`ulimit -n 4096`)",
    errno.ENFILE: f"too many files are open on this machine: {_NO_MORE}",
    errno.EAGAIN: f"no more processes or threads can be started: {_NO_MORE} (`ulimit -u`, `ulimit -v`)",
    errno.ENOMEM: NO_MEMORY,
    errno.EIO: "the disk cannot read or write it (input/output error): check the disk, then try again",
    errno.ESTALE: "the network file system has lost it: mount that again, then try again",
    errno.ENOENT: "it is not there (any more): if nothing has removed it in the meantime, put it back; then try again",
    errno.EEXIST: "something of this name is in the way: remove it, then try again",
    errno.ENOTEMPTY: "something has put files into the folder in the meantime: try again",
    errno.ENOTDIR: "a part of the path is no folder: remove what is in the way",
    errno.EISDIR: "a folder is in the way: remove it",
    errno.EBUSY: "something else is using it: end that, then try again",
    errno.ETXTBSY: "it is a program that is running: end that, then try again",
    errno.EPIPE: "whoever was to read this has ended: try again",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_MAKE_ROOM = "Free some space, or put the cache elsewhere (cache=DIR); what is already built is kept"
_FEW = 100  # files, and blocks
_MOST_LINES, _WIDEST = 100, 2_000  # of a message: lines, characters of each
_MOST_COMPARED, _ALIKE = 10_000, 12  # lines that are looked at, and of one kind that are shown
_NAME_OR_NUMBER = re.compile(r"\S*[\d.]\S*")
_DOTTED = re.compile(r"(?<!\S)[A-Za-z_][\w-]*(?:\.[\w-]+){2,}")  # a tensor's name, not a file's
_OF_NETWORK = {  # by name: loading what defines them is dear
    *("socket.gaierror", "ssl.SSLError", "httpx.TransportError", "requests.RequestException"),
    *("urllib3.HTTPError", "distributed.CommClosedError"),
}
_MEMORY_WORDS = ("bad_alloc", "failed to map segment", "Cannot allocate memory", "out of memory", "Out of memory")


def in_words(error: BaseException) -> str | None:
    """The sentence for what no program can prevent, with the path and what to do; None for a bug."""
    if isinstance(error, MlcBuildError):
        return str(error)
    if isinstance(error, MemoryError) or any(word in str(error) for word in _MEMORY_WORDS):
        return NO_MEMORY
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _SENTENCES[errno.EAGAIN]
    place = _place(error)
    if isinstance(error, RecursionError):
        return f"{place}nested too deeply to be read: a file of this workspace or checkpoint is damaged"
    if isinstance(error, UnicodeDecodeError):
        return f"{place}not {error.encoding.upper()} text (byte {error.start}): save it as UTF-8, or get it again"
    if isinstance(error, UnicodeError):
        return f"{place}a name or text is not UTF-8 ({_short(error)}): rename the file or correct the text"
    if isinstance(error, BrokenPipeError):
        return f"{place}{_SENTENCES[errno.EPIPE]}"
    if isinstance(error, ConnectionError | TimeoutError) or _is_of_network(error):
        return f"{place}the connection was lost or not made ({_short(error)}): try again when the other side answers"
    if not isinstance(error, OSError):
        return None
    if error.errno in FULL:
        return full(Path(_named(error) or Path.cwd()))
    if error.errno in CLOSED:
        return closed(_named(error), error)
    sentence = _SENTENCES.get(error.errno or 0)
    return f"{place}{sentence or f'{_short(error)}: check what lies there, then try again'}"


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """What `in_words` has a sentence for leaves the block as a MlcBuildError with it."""
    try:
        yield
    except MlcBuildError:
        raise
    except Exception as error:
        text = in_words(error)
        if text is None:
            raise
        raise MlcBuildError(text) from error


def bounded(text: str) -> str:
    """The beginning of a text that may be as long as somebody's data, and how much more there is.

    Of lines that differ in a name or a number only, the first are shown.
    """
    lines, unread = text.split("\n", _MOST_COMPARED), 0
    if len(lines) > _MOST_COMPARED:
        unread = lines.pop().count("\n") + 1
    shown = _few(lines)
    unread += max(0, len(shown) - _MOST_LINES)
    if unread:
        shown = [*shown[:_MOST_LINES], f"… and {unread:,} more lines"]
    return "\n".join(line if len(line) <= _WIDEST else f"{line[:_WIDEST]}…" for line in shown)


def _few(lines: Sequence[str]) -> list[str]:
    """The lines, with the number of those that are left out behind the last shown one of each kind."""
    kinds: dict[str, list[str]] = {}
    keys = [_NAME_OR_NUMBER.sub("#", line[:_WIDEST]) for line in lines]
    for key, line in zip(keys, lines, strict=True):
        kinds.setdefault(key, []).append(line)
    shown, seen = list[str](), Counter[str]()
    for key, line in zip(keys, lines, strict=True):
        seen[key] += 1
        many = "#" in key and len(kinds[key]) > _ALIKE + 1
        if not many or seen[key] <= _ALIKE:
            shown.append(line)
        if many and seen[key] == _ALIKE:
            left = kinds[key][_ALIKE:]
            names = [match[0] for each in left if (match := _DOTTED.search(each[:_WIDEST]))]
            where = under(names) if len(names) == len(left) else ""
            shown.append(f"… and {len(left):,} more of the same kind{where}")
    return shown


def under(names: Sequence[str]) -> str:
    """`, all under NAME.`, where tensors' names begin alike; else nothing."""
    first, last = (min(names), max(names)) if len(names) > 1 else ("", "")  # what these share, all of them do
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    common = first[:same].rpartition(".")[0]
    return f", all under `{common}.`" if common else ""


def full(folder: Path, needed: int | None = None) -> str:
    """The text for a disk (or quota) that `folder` lies on and that is full: of bytes, or of files. `needed`: bytes."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    want = f"{needed:,} bytes are needed, " if needed is not None else ""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return f"{folder}: the disk is full: {want}how much is free is unknown. {_MAKE_ROOM}"
    free = disk.f_bavail * disk.f_frsize
    # What could not be written has been tidied up by now, so a few are free again, of bytes as of files.
    if disk.f_files and disk.f_favail < _FEW and free > max(needed or 0, _FEW * disk.f_frsize):
        return (
            f"{folder}: the disk can hold no more files: {disk.f_files - disk.f_favail:,} of its {disk.f_files:,} "
            f"inodes are used, though {free:,} bytes are free. Remove files there (`mlcbuild gc` removes some of the "
            "cache's), or put the cache elsewhere (cache=DIR); what is already built is kept"
        )
    return f"{folder}: the disk is full: {want}{free:,} bytes are free. {_MAKE_ROOM}"


def closed(name: str, error: OSError) -> str:
    """The text for a file or folder that this user may not write, or read; `name` is empty where it is not known."""
    place = f"{name}: " if name else ""
    if error.errno == errno.EROFS:
        return (
            f"{place}cannot be written: its file system is read-only. Put the cache elsewhere (cache=DIR), or the "
            "workspace if it is its dist/"
        )
    return (
        f"{place}{_short(error)}{_whose(name) if name else ''}. Have it given to you (`chown -R`), or to a "
        "group of yours (`chmod -R g+rwX`), or use another folder (cache=DIR for the cache)"
    )


def _place(error: BaseException) -> str:
    name = _named(error)
    return f"{name}: " if name else ""


def _named(error: BaseException) -> str:
    """The path that the error is about; where it names none (a write's does not), the file in hand where it arose."""
    name = getattr(error, "filename", None)
    if name is not None and not isinstance(name, int):
        return _printable(os.fsdecode(name))
    frames = list[FrameType]()
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    for frame in reversed(frames):
        values = [*frame.f_locals.values()]
        files = [name for value in values if isinstance(value, io.IOBase) and isinstance(name := _name(value), str)]
        paths = files or [str(value) for value in values if isinstance(value, Path)]
        if paths and not paths[-1].startswith("<"):
            return _printable(paths[-1])
    return ""


def _name(file: io.IOBase) -> object:
    with contextlib.suppress(Exception):  # of a file that is closed or detached
        return getattr(file, "name", None)
    return None


def _whose(name: str) -> str:
    """`: DIR belongs to root and has mode 755; this is alice`, of what lies there or the folder that it would be in."""
    there = Path(name)
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        status = there.lstat()
    except OSError:
        return f": {there} cannot be looked at; this is {_user(os.geteuid())}"
    mode = stat.S_IMODE(status.st_mode)
    return f": {there} belongs to {_user(status.st_uid)} and has mode {mode:o}; this is {_user(os.geteuid())}"


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _is_of_network(error: BaseException) -> bool:
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(names & _OF_NETWORK) or getattr(error, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH)


def _short(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
    return _printable(text[:200])


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape", "surrogateescape").decode("ascii", "replace")
