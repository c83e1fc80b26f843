"""`changed=REV`: the recipes that a change in version control reaches."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.files import stock, yaml_file
from mlcbuild.recipes.lockfile import key, lock_path
from mlcbuild.recipes.types import Catalog, Recipe


def changed_since(root: Path, catalog: Catalog, revision: str) -> set[str]:
    """The names of the recipes one of whose files differs from git's `revision`, uncommitted and new files included.

    Those are the recipe's own file or matrix, those of its model (with what it extends), quantization, target,
    template and named architecture (with what that extends), a local checkpoint, texts, and the model's entry in
    recipes.lock. Raises MlcBuildError where git cannot say.
    """
    files = _changed_files(root, revision)
    locked = _changed_entries(root, revision) if lock_path(root).resolve() in files else set()
    touched = {parent for file in files for parent in (file, *file.parents)}
    return {
        name
        for name, recipe in catalog.recipes.items()
        if any(key(source) in locked for source in recipe.model.hub_sources)
        or any(path.resolve() in touched for path in _files(root, recipe))
    }


def _files(root: Path, recipe: Recipe) -> Iterator[Path]:
    """What the recipe is written in; a folder stands for everything in it."""
    yield root / recipe.origin
    model = recipe.model
    parts = [("quantization", recipe.quantization.name), ("target", recipe.target.name)]
    parts += [("quantization", recipe.quantization.format), ("template", recipe.template.name)]
    yield from (path for kind, name in parts if (path := _yaml(root, kind, name)) is not None)
    yield from _ancestors(root, "model", model.name)
    yield from _ancestors(root, "architecture", model.architecture or "")
    yield from (source.path for source in model.sources if source.path is not None)
    yield from (path for path in (recipe.verify.text, model.calibration) if path is not None)


def _ancestors(root: Path, kind: str, name: str) -> Iterator[Path]:
    """The file of a model or an architecture and those that it extends."""
    import yaml  # not on the way of a build that has nothing to do

    stocks_own = False
    while (path := yaml_file(stock().recipes, kind, name) if stocks_own else _yaml(root, kind, name)) is not None:
        yield path
        data = yaml.safe_load(path.read_bytes())
        name = data.get("extends", "") if isinstance(data, dict) else ""
        # A stock architecture extends a stock one.
        stocks_own = kind == "architecture" and path.is_relative_to(stock().recipes)


def _yaml(root: Path, kind: str, name: str) -> Path | None:
    return yaml_file(root / "recipes", kind, name) or yaml_file(stock().recipes, kind, name)


def _changed_files(root: Path, revision: str) -> set[Path]:
    top = Path(_git(root, "rev-parse", "--show-toplevel").strip())
    if revision.startswith("-"):
        raise MlcBuildError(f"changed={revision}: expected a git revision, such as HEAD~1 or origin/main")
    differing = _git(root, "diff", "--name-only", "-z", f"{revision}^{{commit}}", "--")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--full-name", "-z")
    return {(top / name).resolve() for name in (differing + untracked).split("\0") if name}


def _changed_entries(root: Path, revision: str) -> set[str]:
    """The repositories whose entries in recipes.lock differ."""
    name = lock_path(root).relative_to(root)
    try:
        before = json.loads(_git(root, "show", f"{revision}:./{name}"))["repos"]
    except (MlcBuildError, ValueError, KeyError):
        before = {}  # there was none
    try:
        now = json.loads(lock_path(root).read_bytes())["repos"]
    except (OSError, ValueError, KeyError):
        now = {}
    return {repo for repo in {*before, *now} if before.get(repo) != now.get(repo)}


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        raise MlcBuildError("changed=: git is not installed") from None
    if done.returncode:
        text = done.stderr.strip().splitlines()
        raise MlcBuildError(f"changed=: git {arguments[0]}: {text[0] if text else 'failed'}")
    return done.stdout
