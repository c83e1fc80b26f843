"""Is a step up to date? Its key, from the code, fields, tools and input contents of now, and what the store has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlcbuild.cache.action import Action, Ingredients
from mlcbuild.cache.files import entry_of, tree_of_folder
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Tree
from mlcbuild.engine.code import Declaration, Sources, toolchain
from mlcbuild.engine.graph import Graph, Input, Step
from mlcbuild.errors import MlcBuildError


class Lookup:
    """Answers for one graph and one store. What is found is remembered, what is missing is looked for again."""

    def __init__(self, store: Store, graph: Graph) -> None:
        self.store = store
        self.graph = graph
        self._found: dict[str, Action] = {}
        self._sources = Sources(store.index)
        self._declarations: dict[tuple[str, str], Declaration] = {}
        self._versions: dict[tuple[str, ...], Mapping[str, str]] = {}

    def find(self, name: str) -> Action | None:
        """The action of the step called `name`, if everything up to it is up to date."""
        found = self._found.get(name)  # another thread may forget everything meanwhile
        if found is None:
            ingredients = self.ingredients(name)
            found = self.store.action(ingredients.key) if ingredients else None
            if found is None:
                return None
            self._found[name] = found
            self.store.count_hit(found)
        return found

    def ingredients(self, name: str) -> Ingredients | None:
        """What the step's result depends on; None while an input has yet to be built.

        Raises MlcBuildError when an input outside the cache is missing, or a declared tool is not installed.
        """
        step = self.graph.steps[name]
        inputs: dict[str, Tree] = {}
        for item in step.inputs:
            tree = self.tree(item, step)
            if tree is None:
                return None
            inputs[item.name] = tree
        return Ingredients(step.kind, self.declared(step).digest, step.fields, inputs, self.versions(step))

    def tree(self, item: Input, step: Step) -> Tree | None:
        """The input's files; None while they have yet to be built."""
        if item.step is not None:
            action = self.find(item.step)
            return action.tree.select(item.select) if action else None
        if item.path is None:
            raise MlcBuildError(f"{step.name}: the input {item.name} has neither a step nor a path")
        if item.path.is_dir():
            return tree_of_folder(item.path, item.select, self.store.index, deep=False)
        return Tree({item.name: entry_of(item.path, self.store.index)})

    def declared(self, step: Step) -> Declaration:
        """What the step's module declares."""
        code = (step.module, step.entry)
        if code not in self._declarations:
            self._declarations[code] = self._sources.declaration(*code)
        return self._declarations[code]

    def sources_read(self) -> list[Path]:
        """The files that the code of the steps asked for so far is made of."""
        return self._sources.read()

    def versions(self, step: Step) -> Mapping[str, str]:
        """The versions of the tools that the step declares. Raises MlcBuildError for one that is not installed."""
        tools = self.declared(step).tools
        if tools not in self._versions:
            self._versions[tools] = toolchain(tools)
        return self._versions[tools]

    def known(self, name: str) -> Action | None:
        """What `find` has found or `learn` was told, without looking for it."""
        return self._found.get(name)

    def learn(self, name: str, action: Action) -> None:
        """The step has just been built. What was found with an older result of it is forgotten."""
        old = self._found.get(name)
        if old is not None and old.tree.digest != action.tree.digest:
            self._found.clear()
        self._found[name] = action

    def forget(self) -> None:
        """Look for everything again."""
        self._found.clear()
