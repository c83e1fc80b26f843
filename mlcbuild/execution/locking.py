"""recipes.lock, kept while building: a hub model that has no entry yet is looked up once and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlcbuild.cache.locks import locked as held
from mlcbuild.cache.store import Store
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.lock import entry, key, lock_path, read_lock, write_lock
from mlcbuild.recipes.types import Locked, Model, Source
from mlcbuild.reporting.events import ModelLocked, Report


def locker(root: Path, store: Store, report: Report, refuse: bool) -> Callable[[Model], Locked]:
    """A function that gives a hub model's commit, config and files; `refuse`: only if recipes.lock has them.

    That function raises RecipeError for a broken lock file, CheckpointError when the hub does not answer, and
    MlcBuildError for a model without an entry under `refuse`.
    """
    known: dict[str, Locked] | None = None

    def lock(model: Model) -> Locked:
        nonlocal known
        if known is None:
            known = read_lock(root)
        found = entry(known, model.source)
        if found is None and refuse:
            raise MlcBuildError(
                f"{model.source} is not in recipes.lock, and locked=1 forbids to add it: `mlcbuild lock {model.name}` "
                "does"
            )
        if found is None:
            found = resolve(model.source)
            known = store_entry(root, store.root, key(model.source), found)
            report(ModelLocked(model.name, found.commit))
        return found

    return lock


def resolve(source: Source) -> Locked:
    """What is to be locked of a repository, asked of its hub. Raises CheckpointError."""
    from mlcbuild.checkpoints import hub  # not on the way of a build that has nothing to do

    assert source.hf is not None
    return hub.resolve(source.hf, source.revision)


def store_entry(root: Path, cache: Path, name: str, entry: Locked) -> dict[str, Locked]:
    """Write one entry into recipes.lock, beside what other processes wrote meanwhile; all entries.

    Raises RecipeError for a broken lock file, MlcBuildError when it cannot be written.
    """
    with held(cache / "locks" / "recipes.lock"):
        known = {**read_lock(root), name: entry}
        try:
            write_lock(root, known)
        except OSError as error:
            raise MlcBuildError(f"{lock_path(root)}: cannot be written: {error.strerror}") from None
    return known
