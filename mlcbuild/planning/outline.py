"""The names of a plan's steps, for a list of them: at half of what the plan itself costs, in time and in memory.

Nearly all steps of a large matrix are those that each recipe has of its own. They are named here by the little that
tells them apart, and are blank otherwise. All others are planned.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

from mlcbuild.engine.graph import Graph, Step
from mlcbuild.planning.goals import goals_of
from mlcbuild.planning.planner import BOUNDS, Planner
from mlcbuild.planning.shapes import Shape, method_of
from mlcbuild.recipes.types import Catalog, Locked, Model, Recipe


def outline(catalog: Catalog, recipes: Iterable[Recipe], lock: Callable[[Model], Locked | None]) -> Graph:
    """The graph of `plan` with the same names and kinds in the same order, in which steps may have nothing else."""
    planner = _Outliner(catalog, lock)
    return goals_of(planner.steps.added, planner.goal, recipes)


class _Outliner(Planner):
    """What it tells recipes' own steps apart by are their meanings, without all that follows from the rest."""

    def __init__(self, catalog: Catalog, lock: Callable[[Model], Locked | None]) -> None:
        super().__init__(catalog, lock)
        self._own: dict[Hashable, str] = {}
        self._blank = {kind: Step(kind, "", "", {}) for kind in ("package", "measure", "verify")}

    def _package(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        # The library stands for the structure, and with the model for its config.json.
        parts = (recipe.model.name, recipe.quantization.name, recipe.target.name, recipe.template.name)
        return self._named("package", recipe.name, (*parts, steps["library"]), super()._package, recipe, shape, steps)

    def _measure(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        how = method_of(shape, recipe.verify)
        layers = shape.blocks if how == "layers" else None
        runs, *libraries = self._run(layers or shape.whole, recipe.quantization, recipe.target, steps.get("allocate"))
        longest = shape.model_config.get("context_window_size") if layers is not None else None
        made = (steps["quantize"], steps["download"], steps["convert"])
        told = (how, recipe.verify.text, longest, *made, *libraries)
        label = f"{recipe.model.name}-{recipe.quantization.name}-{runs}"
        return self._named("measure", label, told, super()._measure, recipe, shape, steps)

    def _verify(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        bounds = [getattr(recipe.verify, name) for name in BOUNDS]
        told = (steps["package"], steps["measure"], *bounds, *map(type, bounds))
        return self._named("verify", recipe.name, told, super()._verify, recipe, shape, steps)

    def _named(
        self, kind: str, label: str, told: Hashable, plan: Callable[..., str], *of: Recipe | Shape | Mapping[str, str]
    ) -> str:
        """As `Steps.add` names a step. Where another has that name, the step is planned: it is named by its meaning."""
        name = self._own.get((kind, told))
        if name is None:
            name = f"{kind}:{label}"
            if name in self.steps.added:
                name = plan(*of)
            else:
                self.steps.added[name] = self._blank[kind]
            self._own[kind, told] = name
        return name
