"""`changed=REV`: the recipes that a change in version control reaches."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import cache
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

    @cache
    def is_touched(path: Path) -> bool:
        return path.resolve() in touched

    @cache
    def is_written_anew(kind: str, name: str) -> bool:
        return any(map(is_touched, _written_in(root, kind, name)))

    return {
        name
        for name, recipe in catalog.recipes.items()
        if any(key(source) in locked for source in recipe.model.hub_sources)
        or is_touched(root / recipe.origin)
        or any(is_written_anew(*part) for part in _parts(recipe))
        or any(map(is_touched, _read_by(recipe)))
    }


def _parts(recipe: Recipe) -> list[tuple[str, str]]:
    """Kind and name of what the recipe names."""
    quantization, model = recipe.quantization, recipe.model
    parts = [("quantization", quantization.name), ("target", recipe.target.name), ("template", recipe.template.name)]
    return [
        *parts,
        ("quantization", quantization.format),
        ("model", model.name),
        ("architecture", model.architecture or ""),
    ]


def _read_by(recipe: Recipe) -> list[Path]:
    """Checkpoints and texts outside the files of recipes; a folder stands for everything in it."""
    paths = [*(source.path for source in recipe.model.sources), recipe.verify.text, recipe.model.calibration]
    return [path for path in paths if path is not None]


def _written_in(root: Path, kind: str, name: str) -> Iterator[Path]:
    """The file of a part of a recipe, and those that a model or an architecture extends."""
    import yaml  # not on the way of a build that has nothing to do

    stocks_own = False
    while (path := yaml_file(stock().recipes, kind, name) if stocks_own else _yaml(root, kind, name)) is not None:
        yield path
        if kind not in ("model", "architecture"):
            return
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
