"""recipes.lock, kept while building: a hub model that has no entry yet is looked up once and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mlcbuild.cache import layout
from mlcbuild.cache.locks import locked as held
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.recipes.lock import entry, key, lock_path, read_lock, write_lock
from mlcbuild.recipes.types import Locked, Model, Source
from mlcbuild.reporting.events import ModelLocked, Report


def locker(root: Path, refused: Mapping[str, str] | None = None) -> Callable[[Model], Locked | None]:
    """A function that gives a hub model's commit, config and files as recipes.lock has them; None where it has none.

    That function raises RecipeError for a broken lock file, and MlcBuildError with the text that `refused` has for the
    source (by its key in the lock file). It never asks the hub.
    """
    known: dict[str, Locked] | None = None

    def lock(model: Model) -> Locked | None:
        nonlocal known
        if known is None:
            known = read_lock(root)
        found = entry(known, model.source)
        if found is None and refused and key(model.source) in refused:
            raise MlcBuildError(refused[key(model.source)])
        return found

    return lock


def look_up(root: Path, cache: Path, models: Iterable[Model], report: Report, refuse: bool) -> dict[str, str]:
    """Lock whatever these models are made of that is on a hub and not locked yet; why that failed, by key.

    Each is written as soon as it is known, and reported. With `refuse` the hub is not asked, and every missing entry
    is a failure. Raises RecipeError for a broken lock file, MlcBuildError when it cannot be written.
    """
    refused: dict[str, str] = {}
    known: dict[str, Locked] | None = None
    for model, source in _on_hubs(models):
        if known is None:
            known = read_lock(root)
        name = key(source)
        if name in known or name in refused:
            continue
        if refuse:
            advice = f"`mlcbuild lock {model.name}` does"
            refused[name] = f"{source} is not in recipes.lock, and locked=1 forbids to add it: {advice}"
            continue
        try:
            found = resolve(source)
        except CheckpointError as error:
            refused[name] = str(error)
            continue
        known = store_entry(root, cache, name, found)
        report(ModelLocked(model.name, found.commit))
    return refused


def _on_hubs(models: Iterable[Model]) -> Iterable[tuple[Model, Source]]:
    for model in models:
        for source in (model.source, model.delta_of, model.lora):
            if source is not None and source.hf is not None:
                yield model, source


def resolve(source: Source) -> Locked:
    """What is to be locked of a repository, asked of its hub. Raises CheckpointError."""
    from mlcbuild.checkpoints import hub  # not on the way of a build that has nothing to do

    assert source.hf is not None
    return hub.resolve(source.hf, source.revision)


def store_entry(root: Path, cache: Path, name: str, entry: Locked) -> dict[str, Locked]:
    """Write one entry into recipes.lock, beside what other processes wrote meanwhile; all entries.

    Raises RecipeError for a broken lock file, MlcBuildError when it cannot be written.
    """
    with held(layout.lock_path(cache, "recipes.lock")):
        known = {**read_lock(root), name: entry}
        try:
            write_lock(root, known)
        except OSError as error:
            raise MlcBuildError(f"{lock_path(root)}: cannot be written: {error.strerror}") from None
    return known
