"""recipes.lock, kept while building: a hub model that has no entry yet is looked up once and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlcbuild.cache.locks import locked as held
from mlcbuild.cache.store import Store
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.lock import Locked, LockedFile, entry, key, lock_path, read_lock, write_lock
from mlcbuild.recipes.types import Model
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
            raise MlcBuildError(f"{model.source} is not in recipes.lock, and locked=1 forbids to add it")
        if found is None:
            found = _resolve(model)
            with held(store.root / "locks" / "recipes.lock"):
                known = {**read_lock(root), key(model.source): found}
                try:
                    write_lock(root, known)
                except OSError as error:
                    raise MlcBuildError(f"{lock_path(root)}: cannot be written: {error.strerror}") from None
            report(ModelLocked(model.name, found.commit))
        return found

    return lock


def _resolve(model: Model) -> Locked:
    from mlcbuild.checkpoints import hub  # not on the way of a build that has nothing to do

    assert model.source.hf is not None
    resolved = hub.resolve(model.source.hf, model.source.revision)
    files = {name: LockedFile(file.sha256, file.size) for name, file in resolved.files.items()}
    return Locked(resolved.commit, resolved.config, files)
