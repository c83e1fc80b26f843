"""A recipe built from a small random checkpoint: every step, the recipe's own quantization, target and template."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlcbuild.cache.disk import made_for
from mlcbuild.cache.layout import RECIPES_MEMO, TEST_RUN
from mlcbuild.cache.locks import begin
from mlcbuild.cache.store import Store, total_size
from mlcbuild.engine.builder import Builder
from mlcbuild.engine.lookup import Lookup
from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.models import architecture as architectures
from mlcbuild.models import wrappers
from mlcbuild.planning.planner import plan
from mlcbuild.planning.shapes import config_of
from mlcbuild.recipes.load import load
from mlcbuild.recipes.select import select
from mlcbuild.recipes.types import Catalog, Locked, Model, Recipe, Source, Template
from mlcbuild.reporting.events import Event, PackageInstalled, Report
from mlcbuild.smoke import checkpoint
from mlcbuild.text import amount
from mlcbuild.workspace.hub_locks import lock_missing, locker
from mlcbuild.workspace.session import QUALITY, Session, open_store

_TEXT = Path(__file__).parent / "text.txt"


def test_run(root: Path, names: str, cache: Path | None, report: Report) -> dict[str, str]:
    """Try recipes (names and globs, with commas); what came of each, in words.

    Raises MlcBuildError with everything that failed, when all have been tried.
    """
    store = open_store(root, cache)
    begin(store.root)
    catalog = load(root, memo=store.root / RECIPES_MEMO)
    results: dict[str, str] = {}
    problems = []
    for recipe in select(catalog, names):
        try:
            only_config = replace(recipe.model, delta_of=None, lora=None, tokenizer_from=None)
            refused = lock_missing(root, store.root, [only_config], report, refuse=False)
            config = config_of(recipe.model, locker(root, refused))
            with made_for(store.root):  # the next user who tries this recipe replaces what is made here
                results[recipe.name] = _try(store, *small(catalog, recipe, config, store.root / TEST_RUN), report)
        except MlcBuildError as error:
            problems.append(f"{recipe.name}: {error}")
    if problems:
        done = [f"{text}\n" for text in results.values()]
        raise MlcBuildError("".join([*done, "\n".join(problems)]))
    return results


def small(catalog: Catalog, recipe: Recipe, config: Mapping[str, Any], folder: Path) -> tuple[Catalog, Recipe]:
    """The recipe with a small random model in place of its own; the checkpoint lies under `folder`.

    Stop tokens are given by number in some templates; the small tokenizer has those that it has a number for.
    """
    model, config = recipe.model, wrappers.alone(config)
    architecture = architectures.choose(catalog.architectures, config, model.architecture)
    special = tuple(recipe.template.data.get("stop_str", ()))
    weights = recipe.quantization.weights
    awq_group = weights.group_size if weights is not None and weights.scheme == "awq" else None
    small_config = checkpoint.small_config(config, architecture, awq_group)
    path = checkpoint.make(folder / "checkpoints", small_config, architecture, special)
    known = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"].values()
    stops = [number for number in recipe.template.data.get("stop_token_ids", ()) if number in known]
    source = Source(path=path)
    stand_in = Model(
        model.name, source, model.template, architecture.name, model.overrides, model.verify, calibration=_TEXT
    )
    tried = replace(
        recipe,
        model=stand_in,
        template=Template(recipe.template.name, {**recipe.template.data, "stop_token_ids": stops}),
        verify=replace(recipe.verify, gate="report", text=_TEXT),
    )
    return replace(catalog, models={**catalog.models, model.name: stand_in}), tried


def _try(store: Store, catalog: Catalog, recipe: Recipe, report: Report) -> str:
    started = time.monotonic()
    graph = plan(catalog, [recipe], _no_hub)
    if graph.unavailable:
        raise Unavailable(f"unavailable: {graph.unavailable[recipe.name]}")
    root = store.root / TEST_RUN

    def relay(event: Event) -> None:
        if not isinstance(event, PackageInstalled):  # not in the workspace's dist/, as that would say
            report(event)

    session = Session(root, catalog, graph, Builder(Lookup(store, graph), relay))
    session.install(recipe.name)
    folder = session.dist / recipe.name
    quality = json.loads((folder / QUALITY).read_text(encoding="utf-8"))
    goal = graph.goals[recipe.name]
    layers = graph.steps[goal.steps["lower"]].fields["structure"]["num_hidden_layers"]
    steps = [session.lookup.find(name) for name in goal.steps.values()]
    weights = next(step for step in steps if step is not None and step.step == "quantize")
    size = amount(total_size(weights.tree.files.values()))
    vectors = quality["method"] == "embeddings"
    lost = f"vectors with a cosine of {quality['cosine']:g} to" if vectors else f"KL divergence {quality['kl']:g} from"
    return (
        f"{recipe.name}: every step works ({time.monotonic() - started:.1f} s). A random model of "
        f"{layers} layers and {checkpoint.VOCABULARY} tokens: {size} of weights, {lost} its unquantized "
        f"self over {quality['tokens']} tokens (random numbers lose more than a trained model's). It is in {folder}"
    )


def _no_hub(model: Model) -> Locked:
    raise MlcBuildError(f"{model.name}: a test run downloads nothing")
