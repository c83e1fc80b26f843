"""Recipes -> steps, each once: what has to exist for the recipes to be built, and what depends on what.

Planning reads a model's `config.json` (from its folder, or from recipes.lock) and nothing else of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlcbuild.cache.canonical import digest_json
from mlcbuild.chat.config import TOKENIZER_FILES
from mlcbuild.compiler import targets
from mlcbuild.errors import MlcBuildError, Unavailable
from mlcbuild.models import architecture as architectures
from mlcbuild.recipes.lock import Locked
from mlcbuild.recipes.types import Catalog, Model, Quantization, Recipe, Target

_T = TypeVar("_T")

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_TENSOR_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
STEPS = "mlcbuild.steps"  # the package with one module per kind of step
_TEXT_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json")
# The reference that every package is compared with: unquantized, on a machine that everybody has.
_UNQUANTIZED, _HERE = "q0f32", "cpu"
_EVALUATION_TEXT = Path(__file__).parent / "runtime" / "evaluation.txt"


@dataclass(frozen=True)
class Input:
    """One declared input: the artifact of a step, or a file or folder outside the cache."""

    name: str
    step: str | None = None  # the producing task
    path: Path | None = None  # a single file appears in the tree under the input's name
    select: tuple[str, ...] = ()  # shell patterns: only these files count, and only these are seen


@dataclass(frozen=True)
class Step:
    """One node of the graph. `name` is the task's, and is in no key."""

    kind: str
    name: str
    module: str
    fields: Mapping[str, Any]
    inputs: tuple[Input, ...] = ()
    materials: tuple[str, ...] = ()  # tasks whose files an input refers to by digest

    @property
    def producers(self) -> tuple[str, ...]:
        """The tasks that must be done before this one."""
        names = [item.step for item in self.inputs if item.step is not None]
        return tuple(dict.fromkeys([*names, *self.materials]))


@dataclass(frozen=True)
class Goal:
    """What one recipe wants: its steps by kind. `package` and `verify` are what gets installed."""

    recipe: Recipe
    steps: Mapping[str, str]


@dataclass(frozen=True)
class Graph:
    """Steps in an order in which they can run; goals by recipe; recipes that cannot be built here, and why."""

    steps: Mapping[str, Step]
    goals: Mapping[str, Goal] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)

    def closure(self, names: Iterable[str]) -> list[str]:
        """`names` and everything that they need, in running order."""
        wanted: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in wanted:
                wanted.add(name)
                waiting += self.steps[name].producers
        return [name for name in self.steps if name in wanted]


def plan(catalog: Catalog, recipes: Iterable[Recipe], lock: Callable[[Model], Locked]) -> Graph:
    """The steps of the recipes; `lock` gives the commit and files of a model on a hub.

    Raises MlcBuildError with everything that is wrong with the models' configs.
    """
    planner = _Planner(catalog, lock)
    goals: dict[str, Goal] = {}
    unavailable: dict[str, str] = {}
    problems: dict[str, None] = {}
    for recipe in recipes:
        try:
            goals[recipe.name] = planner.goal(recipe)
        except Unavailable as error:
            unavailable[recipe.name] = str(error)
        except MlcBuildError as error:
            problems[f"model {recipe.model.name}: {error}"] = None
    if problems:
        raise MlcBuildError("\n".join(problems))
    return Graph(planner.steps, goals, unavailable)


@dataclass(frozen=True)
class _Shape:
    """A model's structure under a recipe's overrides, with what is made from it worked out once."""

    digest: str
    label: str
    fields: Mapping[str, Any]
    library: Mapping[str, Any]  # the fields that a compiled library depends on
    model_config: Mapping[str, Any]  # of mlc-chat-config.json


class _Planner:
    """Adds steps, each once. What several recipes share is worked out once."""

    def __init__(self, catalog: Catalog, lock: Callable[[Model], Locked]) -> None:
        self.catalog = catalog
        self.lock = lock
        self.steps: dict[str, Step] = {}
        self._names: dict[str, str] = {}  # identity -> task name
        self._known: dict[tuple[Any, ...], Any] = {}

    def goal(self, recipe: Recipe) -> Goal:
        model, quantization, target = recipe.model, recipe.quantization, recipe.target
        shape = self._shape(model, recipe.overrides)
        steps = {"download": self._download(model), "convert": self._convert(model)}
        steps["quantize"] = self._quantize(model, quantization)
        steps["lower"] = self._lower(shape, quantization, target)
        steps["library"] = self._library(shape, quantization, target)
        steps["package"] = self._package(recipe, shape, steps)
        steps["verify"] = self._verify(recipe, shape, steps)
        return Goal(recipe, steps)

    def _download(self, model: Model) -> str:
        def add() -> str:
            if model.source.path is not None:
                files = Input("files", path=model.source.path, select=CHECKPOINT_FILES)
                return self._add("download", model.name, {}, (files,))
            locked = self._locked(model)
            contents = {name: {"sha256": file.sha256, "size": file.size} for name, file in locked.files.items()}
            fields = {"repo": model.source.hf, "commit": locked.commit, "files": contents}
            return self._add("download", model.name, fields)

        return self._once(("download", model.name), add)

    def _convert(self, model: Model) -> str:
        # The recipe's overrides are limits of the library; what the weights are does not depend on them.
        def add() -> str:
            download = self._download(model)
            checkpoint = Input("checkpoint", step=download, select=_TENSOR_FILES)
            fields = {"structure": self._shape(model, {}).fields}
            return self._add("convert", model.name, fields, (checkpoint,), (download,))

        return self._once(("convert", model.name), add)

    def _quantize(self, model: Model, quantization: Quantization) -> str:
        def add() -> str:
            convert = self._convert(model)
            fields = {
                "structure": self._shape(model, {}).fields,
                "quantization": self._format(quantization),
            }
            materials = (self._download(model), convert)
            return self._add(
                "quantize", f"{model.name}-{quantization.name}", fields, (Input("convert", step=convert),), materials
            )

        return self._once(("quantize", model.name, quantization.name), add)

    def _lower(self, shape: _Shape, quantization: Quantization, target: Target) -> str:
        def add() -> str:
            fields = {
                "structure": shape.library,
                "quantization": self._format(quantization),
                "name": quantization.name,  # the library's metadata tells it to the runtime
                "device": self._device(target),
            }
            return self._add("lower", f"{shape.label}-{quantization.name}-{target.device['kind']}", fields)

        return self._once(("lower", shape.digest, quantization.name, target.name), add)

    def _library(self, shape: _Shape, quantization: Quantization, target: Target) -> str:
        def add() -> str:
            fields = {
                "device": self._device(target),
                "host": dict(target.host),
                "linker": dataclasses.asdict(target.linker),
                "library": target.library,
            }
            lower = self._lower(shape, quantization, target)
            label = f"{shape.label}-{quantization.name}-{target.name}"
            return self._add("library", label, fields, (Input("lower", step=lower),))

        return self._once(("library", shape.digest, quantization.name, target.name), add)

    def _package(self, recipe: Recipe, shape: _Shape, steps: Mapping[str, str]) -> str:
        fields = {
            "model": recipe.model.name,
            "quantization": recipe.quantization.name,
            "target": recipe.target.name,
            "template": {"name": recipe.template.name, **recipe.template.data},
            "model_type": shape.fields["model_type"],
            "model_config": shape.model_config,
        }
        inputs = (
            Input("quantize", step=steps["quantize"]),
            Input("library", step=steps["library"]),
            Input("checkpoint", step=steps["download"], select=_TEXT_FILES),
        )
        return self._add("package", recipe.name, fields, inputs)

    def _verify(self, recipe: Recipe, shape: _Shape, steps: Mapping[str, str]) -> str:
        quantization, verify = recipe.quantization, recipe.verify
        here = self.catalog.targets[_HERE]
        reference = self._library(shape, self.catalog.quantizations[_UNQUANTIZED], here)
        fields = {
            "class": quantization.kind,
            "model_dtype": quantization.model_dtype,
            "kl": verify.kl,
            "perplexity_increase": verify.perplexity_increase,
            "gate": verify.gate,
        }
        inputs = [
            Input("package", step=steps["package"]),
            Input("convert", step=steps["convert"]),
            Input("reference", step=reference),
            Input("text", path=verify.text or _EVALUATION_TEXT),
        ]
        if not targets.runs_here(recipe.target):
            inputs.append(Input("cpu_library", step=self._library(shape, quantization, here)))
        return self._add("verify", recipe.name, fields, tuple(inputs), (steps["download"], steps["convert"]))

    def _shape(self, model: Model, overrides: Mapping[str, int]) -> _Shape:
        def resolve() -> _Shape:
            config = self._once(("config", model.name), lambda: self._config(model))
            chosen = architectures.choose(self.catalog.architectures, config, model.architecture)
            structure = architectures.resolve(chosen, config, overrides)
            return _Shape(
                structure.digest,
                structure.label,
                structure.to_json(),
                structure.library_json(),
                architectures.model_config(chosen, structure),
            )

        return self._once(("shape", model.name, *sorted(overrides.items())), resolve)

    def _config(self, model: Model) -> Mapping[str, Any]:
        if model.source.path is not None:
            return _read_config(model.source.path / "config.json")
        return self._locked(model).config

    def _format(self, quantization: Quantization) -> dict[str, Any]:
        """The format without its name: two names for one format share everything."""

        def fields() -> dict[str, Any]:
            data = dataclasses.asdict(quantization)
            del data["name"]
            return data

        return self._once(("quantization", quantization.name), fields)

    def _locked(self, model: Model) -> Locked:
        return self._once(("locked", model.name), lambda: self.lock(model))

    def _device(self, target: Target) -> dict[str, Any]:
        return self._once(("device", target.name), lambda: targets.resolve(target))

    def _add(
        self,
        kind: str,
        label: str,
        fields: Mapping[str, Any],
        inputs: tuple[Input, ...] = (),
        materials: tuple[str, ...] = (),
    ) -> str:
        """The name of the step with this meaning; a new one is called `kind:label` unless another meaning is."""
        wanted = [[item.name, item.step, str(item.path), item.select] for item in inputs]
        identity = digest_json([kind, fields, wanted, materials])
        name = self._names.get(identity)
        if name is None:
            name = f"{kind}:{label}"
            if name in self.steps:
                name = f"{name}-{identity[:8]}"
            self._names[identity] = name
            self.steps[name] = Step(kind, name, f"{STEPS}.{kind}", fields, inputs, materials)
        return name

    def _once(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        if key not in self._known:
            self._known[key] = make()
        known: _T = self._known[key]
        return known


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MlcBuildError(f"{path}: no such file: a checkpoint in Hugging Face format has one") from None
    except (OSError, ValueError) as error:
        raise MlcBuildError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise MlcBuildError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config
