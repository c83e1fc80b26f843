"""recipes/recipes.lock: which commit of a repository is built, and what its files are.

    {"version": 1,
     "repos": {"lmsys/vicuna-7b-v1.5":            # owner/name, or owner/name@revision where the model says a revision
       {"commit": "<40 hex digits>",
        "config": {...},                          # config.json, which decides the structure before any download
        "files": {"config.json": {"sha256": "<64 hex digits>", "size": 567}}}}}

JSON with sorted keys, one value a line, so that a version control system shows what moved.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.files import shown, unreadable, write_atomically
from mlcbuild.recipes.problems import Problem, show
from mlcbuild.recipes.types import Locked, LockedFile, Source
from mlcbuild.regular import read_regular

_VERSION = 1
_ADVICE = "restore the file from version control, or delete it: the next build resolves every repository again"
_REPO = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*(:[^@]+)?(@.+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def lock_path(root: Path) -> Path:
    return root / "recipes" / "recipes.lock"


def key(source: Source) -> str:
    """The name of a hub source's entry: owner/name, or owner/name:FILE of a GGUF file, and @revision."""
    assert source.hf is not None
    return str(source).removeprefix("hf:")


def entry(locked: Mapping[str, Locked], source: Source) -> Locked | None:
    """None where `source` is not locked yet."""
    return locked.get(key(source))


def read_lock(root: Path) -> dict[str, Locked]:
    """The lock file of the workspace `root`; empty where there is none. Raises RecipeError for a broken one."""
    locked, problems = examine(root)
    if problems:
        raise RecipeError([str(problem) for problem in problems])
    return locked


def write_lock(root: Path, locked: Mapping[str, Locked]) -> None:
    """Replaces the lock file, whole or not at all. Raises OSError, and RecipeError for what could not be read again."""
    repos = {name: asdict(each) for name, each in locked.items()}
    wrong = [(name, text) for name, fields in repos.items() for text in _wrong(name, fields)]
    if wrong:
        raise RecipeError([f"recipes.lock: repository `{show(name)}`: {text}" for name, text in wrong])
    data = {"version": _VERSION, "repos": repos}
    write_atomically(lock_path(root), json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def examine(root: Path) -> tuple[dict[str, Locked], list[Problem]]:
    """The lock file's entries that are sound, and everything that is wrong with it."""
    path = lock_path(root)
    name = shown(path, root)
    try:
        data = json.loads(read_regular(path).decode("utf-8"), object_pairs_hook=_unrepeated)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [unreadable(name, error)]
    except json.JSONDecodeError as error:
        return {}, [Problem(name, error.lineno, error.colno, f"not valid JSON: {error.msg}; {_ADVICE}")]
    except RecursionError:
        return {}, [Problem(name, 1, 1, f"not valid: too many lists or objects in each other; {_ADVICE}")]
    except ValueError as error:  # not UTF-8, or a repeated key
        return {}, [Problem(name, 1, 1, f"not valid: {error}; {_ADVICE}")]
    if not isinstance(data, dict) or data.get("version") != _VERSION or not isinstance(data.get("repos"), dict):
        version = data.get("version") if isinstance(data, dict) else None
        text = f"`version` is `{show(version)}`, expected `{_VERSION}` and `repos`; {_ADVICE}"
        return {}, [Problem(name, 1, 1, text)]
    locked, problems = {}, []
    for repo, fields in data["repos"].items():
        wrong = _wrong(repo, fields)
        problems += [Problem(name, 1, 1, f"repository `{show(repo)}`: {text}; {_ADVICE}") for text in wrong]
        if not wrong:
            files = {file: LockedFile(**facts) for file, facts in fields["files"].items()}
            locked[repo] = Locked(fields["commit"], fields["config"], files)
    return locked, problems


def _wrong(repo: str, fields: Any) -> list[str]:
    wrong = [] if _REPO.fullmatch(repo) else ["its name is not `owner/name` or `owner/name@revision`"]
    if not isinstance(fields, dict) or fields.keys() != {"commit", "config", "files"}:
        return [*wrong, "expected `commit`, `config` and `files`"]
    if not _matches(_COMMIT, fields["commit"]):
        wrong.append(f"`commit` is `{show(fields['commit'])}`, expected 40 hex digits")
    if not isinstance(fields["config"], dict):
        wrong.append("`config` is not the content of a config.json")
    if not isinstance(fields["files"], dict) or not fields["files"]:
        return [*wrong, "`files` names no file"]
    for name, facts in fields["files"].items():
        if not _stays_inside(name):
            wrong.append(f"the file name `{show(name)}` leads out of the checkpoint's folder")
        if not isinstance(facts, dict) or facts.keys() != {"sha256", "size"}:
            wrong.append(f"file `{show(name)}`: expected `sha256` and `size`")
        elif not _matches(_SHA256, facts["sha256"]):
            wrong.append(f"file `{show(name)}`: `sha256` is `{show(facts['sha256'])}`, expected 64 hex digits")
        elif type(facts["size"]) is not int or facts["size"] < 0:
            wrong.append(f"file `{show(name)}`: `size` is `{show(facts['size'])}`, expected a number of bytes")
    return wrong


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _stays_inside(name: str) -> bool:
    return (
        name == str(PurePosixPath(name)) and name.isprintable() and not {"..", ".", "/"} & {*name.split("/"), name[0]}
    )


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"key `{next(name for name in data if counts[name] > 1)}` is repeated")
    return data
