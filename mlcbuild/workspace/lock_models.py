"""`mlcbuild lock`: repositories pinned in recipes.lock before they are built, and what moved since they were."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.recipes.lock import key, read_lock
from mlcbuild.recipes.problems import did_you_mean
from mlcbuild.recipes.types import Catalog, Locked, Source
from mlcbuild.reporting.plain import amount
from mlcbuild.workspace.locking import resolve, store_entry


def pin(catalog: Catalog, cache: Path, names: Iterable[str], update: bool, say: Callable[[str], None] = print) -> None:
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


def _sources(catalog: Catalog, names: Iterable[str]) -> list[Source]:
    """Everything on a hub that these models are made of, each once. Raises MlcBuildError for an unknown name."""
    chosen: dict[str, None] = {}
    problems = []
    for name in names:
        found = [model for model in catalog.models if fnmatch.fnmatchcase(model, name)]
        if not found:
            hint = did_you_mean(name, catalog.models) or "; `recipes/models/` has them"
            problems.append(f"no model is named `{name}`{hint}")
        chosen.update(dict.fromkeys(found))
    if problems:
        raise MlcBuildError("\n".join(problems))
    models = [catalog.models[name] for name in chosen] or [recipe.model for recipe in catalog.recipes.values()]
    sources = [source for model in models for source in (model.source, model.delta_of, model.lora)]
    found_sources = list(dict.fromkeys(source for source in sources if source is not None and source.hf is not None))
    if not found_sources:
        what = "these models are" if chosen else "the models of the recipes are"
        raise MlcBuildError(f"nothing to lock: {what} not on a hub")
    return found_sources


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
    yield from _config_differences(old.config, new.config)


def _config_differences(old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if name not in old:
            yield f"config   {name}: {new[name]!r:.80} (new)"
        elif name not in new:
            yield f"config   {name}: {old[name]!r:.80} (gone)"
        elif old[name] != new[name]:
            yield f"config   {name}: {old[name]!r:.80} -> {new[name]!r:.80}"
