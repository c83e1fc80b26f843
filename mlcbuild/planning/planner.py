"""Recipes -> steps, each once: what has to exist for the recipes to be built, and what depends on what.

Planning reads a model's `config.json` (from its folder, or from recipes.lock) and nothing else of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlcbuild.cache.canonical import digest_json
from mlcbuild.chat.config import TOKENIZER_FILES
from mlcbuild.compiler import targets, tools
from mlcbuild.compiler.web import emscripten
from mlcbuild.engine.graph import Goal, Graph, Input, Step
from mlcbuild.errors import MlcBuildError, NotLocked, Unavailable
from mlcbuild.models import architecture as architectures
from mlcbuild.models import parameters
from mlcbuild.models.kinds import DECODER, by_layer
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import (
    Catalog,
    Locked,
    Model,
    Quantization,
    Recipe,
    Source,
    Target,
    Verify,
    format_json,
    quantization_json,
)

_T = TypeVar("_T")

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*_Pooling/config.json")
_TORCH_FILES = ("pytorch_model*.bin", "*.pth")  # read where there are no safetensors
_TENSOR_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin.index.json", *_TORCH_FILES)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
STEPS = "mlcbuild.steps"  # the package with one module per kind of step
_TEXT_FILES = (
    *TOKENIZER_FILES,
    *("chat_template.jinja", "special_tokens_map.json", "config.json", "generation_config.json"),
    *("rwkv_vocab_v*.txt", "modules.json", "*_Pooling/config.json", "sentence_bert_config.json"),
)
# The reference that every package is compared with: unquantized, on a machine that everybody has.
_UNQUANTIZED, _HERE = "q0f32", "cpu"
# Calibration decides what weights become, so it runs on code that is the same on every machine of a kind.
_EVERYWHERE = "cpu-x86_64"
_EVALUATION_TEXT = Path(__file__).parents[1] / "verify" / "evaluation.txt"
_CALIBRATION_TEXT = Path(__file__).parents[1] / "verify" / "calibration.txt"


def plan(catalog: Catalog, recipes: Iterable[Recipe], lock: Callable[[Model], Locked | None]) -> Graph:
    """The steps of the recipes; `lock` gives the commit and files of a model on a hub, or None where it has none."""
    planner = _Planner(catalog, lock)
    goals: dict[str, Goal] = {}
    unavailable: dict[str, str] = {}
    unlocked: dict[str, str] = {}
    broken: dict[str, str] = {}
    for recipe in recipes:
        try:
            goals[recipe.name] = planner.goal(recipe)
        except Unavailable as error:
            unavailable[recipe.name] = str(error)
        except NotLocked as error:
            unlocked[recipe.name] = str(error)
        except MlcBuildError as error:
            broken[recipe.name] = f"model {recipe.model.name}: {error}"
    return Graph(planner.steps, goals, unavailable, unlocked, broken)


@dataclass(frozen=True)
class _Form:
    """What a library is compiled from; with `blocks`, a library of the decoder's pieces (mlcbuild.models.blocks)."""

    digest: str
    label: str
    fields: Mapping[str, Any]
    blocks: bool = False


@dataclass(frozen=True)
class _Shape:
    """A model's structure under a recipe's overrides, with what is made from it worked out once."""

    fields: Mapping[str, Any]
    parameters: int  # how many numbers they are
    model_config: Mapping[str, Any]  # of mlc-chat-config.json
    whole: _Form
    blocks: _Form | None  # None for a kind of model that is not run one layer at a time


class _Planner:
    """Adds steps, each once. What several recipes share is worked out once."""

    def __init__(self, catalog: Catalog, lock: Callable[[Model], Locked | None]) -> None:
        self.catalog = catalog
        self.lock = lock
        self.steps: dict[str, Step] = {}
        self._names: dict[str, str] = {}  # identity -> task name
        self._known: dict[tuple[Any, ...], Any] = {}

    def goal(self, recipe: Recipe) -> Goal:
        model, quantization, target = recipe.model, recipe.quantization, recipe.target
        self._device(target)  # whether it can be built here at all
        for source in (model.source, model.delta_of, model.lora):
            if source is not None and source.hf is not None:
                self._locked(model, source)
        shape = self._shape(model, recipe.overrides)
        kind = shape.fields.get("kind", DECODER)
        if kind != DECODER and targets.is_gpu(target):
            raise Unavailable(f"target {target.name}: models of kind `{kind}` are compiled for CPUs only")
        if shape.fields.get("alibi_bias_max") is not None and targets.is_gpu(target):
            raise Unavailable(f"target {target.name}: attention with linear biases (ALiBi) is compiled for CPUs only")
        steps = {"download": self._download(model), **self._merged(model), "convert": self._convert(model)}
        if quantization.rounding == "calibrated":
            steps["calibrate"] = self._calibrate(model)
        steps["quantize"] = self._quantize(model, quantization)
        steps["lower"] = self._lower(shape.whole, quantization, target)
        steps["library"] = self._library(shape.whole, quantization, target)
        steps["package"] = self._package(recipe, shape, steps)
        steps["verify"] = self._verify(recipe, shape, steps)
        return Goal(recipe, steps)

    def _download(self, model: Model) -> str:
        return self._fetched(model, model.source, model.name)

    def _fetched(self, model: Model, source: Source, label: str, files: tuple[str, ...] | None = None) -> str:
        def add() -> str:
            if source.path is not None:
                patterns = files if files is not None else _checkpoint_files(source.path)
                return self._add("download", label, {}, (Input("files", path=source.path, select=patterns),))
            locked = self._locked(model, source)
            contents = {name: {"sha256": file.sha256, "size": file.size} for name, file in locked.files.items()}
            fields = {"repo": source.hf, "commit": locked.commit, "files": contents}
            return self._add("download", label, fields)

        return self._once(("download", model.name, label), add)

    def _convert(self, model: Model) -> str:
        # The recipe's overrides are limits of the library; what the weights are does not depend on them.
        def add() -> str:
            download = self._download(model)
            inputs = [Input("checkpoint", step=download, select=_TENSOR_FILES)]
            for name, step in self._merged(model).items():
                inputs.append(Input(name, step=step, select=_TENSOR_FILES if name == "base" else _ADAPTER_FILES))
            fields = {"structure": self._shape(model, {}).fields}
            return self._add("convert", model.name, fields, tuple(inputs), (download,))

        return self._once(("convert", model.name), add)

    def _merged(self, model: Model) -> dict[str, str]:
        """What is merged with the checkpoint: the steps that fetch it, by the name of convert's input."""
        steps = {}
        if model.delta_of is not None:
            steps["base"] = self._fetched(model, model.delta_of, f"{model.name}-base")
        if model.lora is not None:
            steps["lora"] = self._fetched(model, model.lora, f"{model.name}-lora", _ADAPTER_FILES)
        return steps

    def _calibrate(self, model: Model) -> str:
        def add() -> str:
            everywhere = self.catalog.targets[_EVERYWHERE]
            target = everywhere if targets.runs_here(everywhere) else self.catalog.targets[_HERE]
            shape = self._shape(model, {})
            if shape.blocks is None:
                raise MlcBuildError(
                    "rounding `calibrated` measures a decoder layer by layer, and "
                    f"{shape.fields['architecture']} is none: choose the same quantization without it, or with "
                    "`rounding: mse`"
                )
            download, convert = self._download(model), self._convert(model)
            inputs = (
                Input("convert", step=convert),
                Input("blocks", step=self._library(shape.blocks, self.catalog.quantizations[_UNQUANTIZED], target)),
                Input("checkpoint", step=download, select=TOKENIZER_FILES),
                Input("text", path=model.calibration or _CALIBRATION_TEXT),
            )
            return self._add("calibrate", model.name, {"structure": shape.fields}, inputs, (download, convert))

        return self._once(("calibrate", model.name), add)

    def _quantize(self, model: Model, quantization: Quantization) -> str:
        def add() -> str:
            convert = self._convert(model)
            fields = {
                "structure": self._shape(model, {}).fields,
                "quantization": quantization_json(quantization),
            }
            inputs = [Input("convert", step=convert)]
            if quantization.rounding == "calibrated":
                inputs.append(Input("calibration", step=self._calibrate(model)))
            materials = (self._download(model), convert)
            return self._add("quantize", f"{model.name}-{quantization.name}", fields, tuple(inputs), materials)

        return self._once(("quantize", model.name, quantization.name), add)

    def _lower(self, form: _Form, quantization: Quantization, target: Target) -> str:
        name = _format(quantization)

        def add() -> str:
            fields = {
                "structure": form.fields,
                "quantization": format_json(quantization),
                "name": name,  # the library's metadata tells it to the runtime
                "device": self._device(target),
                **({"blocks": True} if form.blocks else {}),
                **({"activation_bits": target.activation_bits} if target.activation_bits else {}),
            }
            return self._add("lower", f"{form.label}-{name}-{target.name}", fields, variant=_variant(target))

        return self._once(("lower", form.digest, form.blocks, name, target.name), add)

    def _library(self, form: _Form, quantization: Quantization, target: Target) -> str:
        name = _format(quantization)

        def add() -> str:
            fields: dict[str, Any] = {
                "device": self._device(target),
                "host": dict(target.host),
                "linker": dataclasses.asdict(target.linker),
                "library": target.library,
            }
            variant = _vulkan(target) or _variant(target)
            if variant == "_gpu":
                fields["architectures"] = list(target.architectures)
                fields["prefix"] = _prefix(form, name) if target.library == "tar" else ""
            lower = self._lower(form, quantization, target)
            label = f"{form.label}-{name}-{target.name}"
            inputs = [Input("lower", step=lower)]
            if target.linker.kind == "wasm":
                inputs.append(Input("runtime", step=self._runtime()))
            return self._add("library", label, fields, tuple(inputs), variant=variant)

        return self._once(("library", form.digest, form.blocks, name, target.name), add)

    def _runtime(self) -> str:
        def add() -> str:
            fields = {"emscripten": emscripten.version(), "sources": emscripten.source_tree()}
            return self._add("runtime", "webgpu", fields)

        return self._once(("runtime",), add)

    def _package(self, recipe: Recipe, shape: _Shape, steps: Mapping[str, str]) -> str:
        fields = {
            "model": recipe.model.name,
            "quantization": recipe.quantization.name,
            "format": _format(recipe.quantization),
            "target": recipe.target.name,
            "template": {"name": recipe.template.name, **recipe.template.data},
            "model_type": shape.fields["model_type"],
            "model_config": shape.model_config,
        }
        if shape.fields.get("embedding") is not None:
            fields["embedding"] = shape.fields["embedding"]
        inputs = (
            Input("quantize", step=steps["quantize"]),
            Input("library", step=steps["library"]),
            Input("checkpoint", step=steps["download"], select=_TEXT_FILES),
        )
        variant = "_web" if recipe.target.linker.kind == "wasm" else ""
        return self._add("package", recipe.name, fields, inputs, variant=variant)

    def _verify(self, recipe: Recipe, shape: _Shape, steps: Mapping[str, str]) -> str:
        quantization, verify = recipe.quantization, recipe.verify
        here, unquantized = self.catalog.targets[_HERE], self.catalog.quantizations[_UNQUANTIZED]
        vectors = shape.fields.get("embedding") is not None
        layers = None if vectors or not _too_large(shape, verify) else shape.blocks
        fields: dict[str, Any] = {
            "method": "embeddings" if vectors else "layers" if layers else "whole",
            "class": quantization.kind,
            "model_dtype": quantization.model_dtype,
            "kl": verify.kl,
            "perplexity_increase": verify.perplexity_increase,
            "gate": verify.gate,
            **({"cosine": verify.cosine} if vectors else {}),
        }
        inputs = [
            Input("package", step=steps["package"]),
            Input("convert", step=steps["convert"]),
            Input("text", path=verify.text or _EVALUATION_TEXT),
            Input("reference", step=self._library(layers or shape.whole, unquantized, here)),
        ]
        if layers is not None:
            fields["structure"] = self._shape(recipe.model, {}).fields
            fields["quantization"] = format_json(quantization)
            inputs.append(Input("blocks", step=self._library(layers, quantization, here)))
        elif not targets.runs_here(recipe.target):
            inputs.append(Input("cpu_library", step=self._library(shape.whole, quantization, here)))
        return self._add("verify", recipe.name, fields, tuple(inputs), (steps["download"], steps["convert"]))

    def _shape(self, model: Model, overrides: Mapping[str, int]) -> _Shape:
        def resolve() -> _Shape:
            config = self._once(
                ("config", model.name), lambda: config_of(model, lambda model: self._locked(model, model.source))
            )
            chosen = architectures.choose(self.catalog.architectures, config, model.architecture)
            structure = architectures.resolve(chosen, config, overrides)
            return _Shape(
                structure.to_json(),
                parameters.count(structure),
                architectures.model_config(chosen, structure, config),
                _form(structure),
                _form(structure.one_layer, blocks=True) if by_layer(structure) else None,
            )

        return self._once(("shape", model.name, *sorted(overrides.items())), resolve)

    def _locked(self, model: Model, source: Source) -> Locked:
        found: Locked | None = self._once(
            ("locked", source), lambda: self.lock(dataclasses.replace(model, source=source))
        )
        if found is None:
            raise NotLocked(f"{source} is not in recipes.lock: `mlcbuild lock {model.name}` asks the hub")
        return found

    def _device(self, target: Target) -> dict[str, Any]:
        def resolve() -> dict[str, Any]:
            reason = tools.wrong(target)
            if reason:
                raise MlcBuildError(f"target {target.name}: {reason}")
            reason = tools.missing(target)
            if reason:
                raise Unavailable(f"target {target.name}: {reason}")
            return targets.resolve(target)

        return self._once(("device", target.name), resolve)

    def _add(
        self,
        kind: str,
        label: str,
        fields: Mapping[str, Any],
        inputs: tuple[Input, ...] = (),
        materials: tuple[str, ...] = (),
        variant: str = "",
    ) -> str:
        """The name of the step with this meaning; a new one is called `kind:label` unless another meaning is.

        `variant` is what the module with the step's code is called behind the step's kind.
        """
        wanted = [[item.name, item.step, str(item.path), item.select] for item in inputs]
        identity = digest_json([kind, fields, wanted, materials])
        name = self._names.get(identity)
        if name is None:
            name = f"{kind}:{label}"
            if name in self.steps:
                name = f"{name}-{identity[:8]}"
            self._names[identity] = name
            self.steps[name] = Step(kind, name, f"{STEPS}.{kind}{variant}", fields, inputs, materials)
        return name

    def _once(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        if key not in self._known:
            self._known[key] = make()
        known: _T = self._known[key]
        return known


def config_of(model: Model, lock: Callable[[Model], Locked | None]) -> Mapping[str, Any]:
    """The model's config.json, from its folder or from recipes.lock. Raises MlcBuildError where it cannot be read."""
    if model.source.path is not None:
        return read_config(model.source.path / "config.json")
    found = lock(model)
    if found is None:
        raise NotLocked(f"{model.source} is not in recipes.lock: `mlcbuild lock {model.name}` asks the hub")
    return found.config


def _form(structure: Structure, blocks: bool = False) -> _Form:
    label = f"{structure.label}-blocks" if blocks else structure.label
    return _Form(structure.digest, label, structure.library_json(), blocks)


def _variant(target: Target) -> str:
    """GPUs have modules of their own, so that a change of one kind of library rebuilds none of the other kind."""
    return "_gpu" if targets.is_gpu(target) else ""


def _vulkan(target: Target) -> str:
    """Its code generator is ours, and no other library is made anew when that changes."""
    return "_vulkan" if target.device["kind"] == "vulkan" else ""


def _prefix(form: _Form, quantization: str) -> str:
    """What the symbols of a static library begin with: an app may hold several, and variants share one."""
    model, _, digest = form.label.rpartition("-")
    return re.sub(r"[^A-Za-z0-9_]", "_", f"{model}_{quantization}_{digest}_")


def _format(quantization: Quantization) -> str:
    """The name of the format whose bytes these are: roundings and classes of one format share its libraries."""
    return quantization.format or quantization.name


def _too_large(shape: _Shape, verify: Verify) -> bool:
    """By a declared bound and not by this machine's memory: `quality.json` shall be the same everywhere."""
    return 4 * shape.parameters > verify.memory * 1e9


def _checkpoint_files(folder: Path) -> tuple[str, ...]:
    """Patterns of a local folder's files: the same weights as pickles beside safetensors are not even hashed."""
    named = any(folder.glob("*.safetensors")) or not folder.is_dir()
    return CHECKPOINT_FILES if named else (*CHECKPOINT_FILES, *_TORCH_FILES)


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))  # as the steps read it, and transformers
    except FileNotFoundError:
        raise MlcBuildError(f"{path}: no such file: a checkpoint in Hugging Face format has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MlcBuildError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise MlcBuildError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config
