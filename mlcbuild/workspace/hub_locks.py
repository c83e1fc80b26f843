"""recipes.lock and the hubs: which commit of a repository is built, asked once and then kept.

A build locks what is not locked yet; `mlcbuild lock` does it before, and says what moved since.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mlcbuild.cache import layout
from mlcbuild.cache.locks import locked as held
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.recipes.lockfile import entry, key, lock_path, read_lock, write_lock
from mlcbuild.recipes.problems import did_you_mean
from mlcbuild.recipes.types import Catalog, Locked, Model, Source
from mlcbuild.reporting.events import ModelLocked, Report
from mlcbuild.text import amount


def locker(root: Path, refused: Mapping[str, str] | None = None) -> Callable[[Model], Locked | None]:
    """A function that gives a hub model's commit, config and files as recipes.lock has them; None where it has none.

    That function raises RecipeError for a broken lock file, and MlcBuildError with the text that `refused` has for the
    source (by its key in the lock file). It never asks the hub.
    """
    known = functools.cache(lambda: read_lock(root))

    def lock(model: Model) -> Locked | None:
        found = entry(known(), model.source)
        if found is None and refused and key(model.source) in refused:
            raise MlcBuildError(refused[key(model.source)])
        return found

    return lock


def lock_missing(root: Path, cache: Path, models: Iterable[Model], report: Report, refuse: bool) -> dict[str, str]:
    """Lock whatever these models are made of that is on a hub and not locked yet; why that failed, by key.

    Each is written as soon as it is known, and reported. With `refuse` the hub is not asked, and every missing entry
    is a failure. Raises RecipeError for a broken lock file, MlcBuildError when it cannot be written.
    """
    refused: dict[str, str] = {}
    known: dict[str, Locked] | None = None
    for model, source in [(each, source) for each in models for source in each.hub_sources]:
        known = read_lock(root) if known is None else known
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


def lock_models(
    catalog: Catalog, cache: Path, names: Iterable[str], update: bool, say: Callable[[str], None] = print
) -> None:
    """Lock the repositories of the named models (names and globs; none: of every recipe's model).

    One that is locked already stays as it is; with `update` it moves to where its branch is now. `say` is told, line
    by line, what became of each. Each is written as soon as it is known. Raises MlcBuildError for names that match
    nothing and, when all have been tried, with everything that the hub refused.
    """
    root = catalog.root
    locked = read_lock(root)
    problems = []
    for source in _sources(catalog, names):
        name, old = key(source), locked.get(key(source))
        if old is not None and not update:
            say(f"kept       {name}  {_facts(old)}")
            continue
        try:
            new = resolve(source)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if new != old:
            store_entry(root, cache, name, new)
        if old is None:
            say(f"locked     {name}  {_facts(new)}")
        elif old.commit == new.commit:
            say(f"unchanged  {name}  {_facts(new)}")
        else:
            say(f"moved      {name}  {old.commit[:12]} -> {new.commit[:12]}")
        for line in _differences(old, new) if old is not None else ():
            say(f"             {line}")
    if problems:
        raise MlcBuildError("\n".join(problems))


def resolve(source: Source) -> Locked:
    """What is to be locked of a repository, asked of its hub. Raises CheckpointError."""
    from mlcbuild.checkpoints import hub  # not on the way of a build that has nothing to do

    assert source.hf is not None
    if source.file is not None:
        from mlcbuild.gguf import repository

        return repository.resolve(source.hf, source.revision, source.file)
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


def _sources(catalog: Catalog, names: Iterable[str]) -> list[Source]:
    """Everything on a hub that these models are made of, each once. Raises MlcBuildError for an unknown name."""
    chosen: dict[str, None] = {}
    problems = []
    for name in names:
        matching = fnmatch.filter(catalog.models, name)
        if not matching:
            hint = did_you_mean(name, catalog.models) or "; `recipes/models/` has them"
            problems.append(f"no model is named `{name}`{hint}")
        chosen.update(dict.fromkeys(matching))
    if problems:
        raise MlcBuildError("\n".join(problems))
    models = [catalog.models[name] for name in chosen] or [recipe.model for recipe in catalog.recipes.values()]
    sources = list(dict.fromkeys(source for model in models for source in model.hub_sources))
    if not sources:
        what = "these models are" if chosen else "the models of the recipes are"
        raise MlcBuildError(f"nothing to lock: {what} not on a hub")
    return sources


def _facts(entry: Locked) -> str:
    size = amount(sum(file.size for file in entry.files.values()))
    return f"{entry.commit[:12]}  {len(entry.files)} file{'s' if len(entry.files) > 1 else ''}, {size}"


def _differences(old: Locked, new: Locked) -> Iterator[str]:
    """What moved: files by name and size, the config by its keys."""
    for name in sorted({*old.files, *new.files}):
        before, after = old.files.get(name), new.files.get(name)
        if before is None and after is not None:
            yield f"added    {name}  {amount(after.size)}"
        elif after is None and before is not None:
            yield f"removed  {name}  {amount(before.size)}"
        elif before is not None and after is not None and before != after:
            sizes = amount(after.size) if before.size == after.size else f"{before.size:,} -> {after.size:,} bytes"
            yield f"changed  {name}  {sizes}"
    for name in sorted({*old.config, *new.config}):
        if name not in old.config:
            yield f"config   {name}: {new.config[name]!r:.80} (new)"
        elif name not in new.config:
            yield f"config   {name}: {old.config[name]!r:.80} (gone)"
        elif old.config[name] != new.config[name]:
            yield f"config   {name}: {old.config[name]!r:.80} -> {new.config[name]!r:.80}"
