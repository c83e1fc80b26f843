"""Recipes -> steps, each once: what has to exist for the recipes to be built, and what depends on what.

Planning reads a model's `config.json` (from its folder, or from recipes.lock) and nothing else of a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.cache.tree import digest_json
from mlcbuild.chat.config import TOKENIZER_FILES
from mlcbuild.compiler import targets, tools
from mlcbuild.compiler.web import emscripten
from mlcbuild.engine.graph import Goal, Graph, Input, Step
from mlcbuild.errors import MlcBuildError, NotLocked, Unavailable
from mlcbuild.models.kinds import HYBRID
from mlcbuild.planning.backends import COSTS, PAGES, backend
from mlcbuild.planning.files import (
    ADAPTER_FILES,
    POOLING_FILES,
    TENSOR_FILES,
    TEXT_FILES,
    TOKEN_FILES,
    checkpoint_files,
)
from mlcbuild.planning.once import once
from mlcbuild.planning.shapes import Form, Shape, adapter_of, config_of, method_of, prefix, shape_of
from mlcbuild.recipes.types import (
    Catalog,
    Locked,
    Model,
    Quantization,
    Recipe,
    Source,
    Target,
    format_json,
    has_few_bits,
    quantization_json,
)

STEPS = "mlcbuild.steps"  # the package with one module per kind of step
# The reference that every package is compared with, on a machine that everybody has; what stands for a GPU's precision.
_UNQUANTIZED, _HERE, _EXACT = "q0f32", "cpu", "cpu-exact"
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


class _Planner:
    """Adds steps, each once. What several recipes share is worked out once."""

    def __init__(self, catalog: Catalog, lock: Callable[[Model], Locked | None]) -> None:
        self.catalog = catalog
        self.lock = lock
        self.steps: dict[str, Step] = {}
        self._names: dict[str, str] = {}  # identity -> task name
        self._digests: dict[int, tuple[Any, list[str]]] = {}  # by id, with what has it, so that it is nobody else's
        self.known: dict[tuple[Any, ...], Any] = {}  # what `once` knows

    def goal(self, recipe: Recipe) -> Goal:
        model, quantization, target = recipe.model, recipe.quantization, recipe.target
        self._device(target)  # whether it can be built here at all
        for source in model.hub_sources:
            self._locked(model, source)
        shape = self._shape(model, recipe.overrides)
        if shape.fields.get("kind") == HYBRID and targets.is_gpu(target):
            raise Unavailable(f"target {target.name}: models of kind `{HYBRID}` are compiled for CPUs only")
        steps = {"download": self._download(model), **self._merged(model), "convert": self._convert(model)}
        if quantization.rounding == "calibrated":
            steps["calibrate"] = self._calibrate(model)
        elif quantization.rounding == "gptq":
            steps["round"] = self._round(model, quantization)
        steps["quantize"] = self._quantize(model, quantization)
        steps["lower"] = self._lower(shape.whole, quantization, target)
        steps["library"] = self._library(shape.whole, quantization, target)
        executed = self._execute(shape, quantization, target)
        steps |= {"execute": executed} if executed else {}
        steps["package"] = self._package(recipe, shape, steps)
        steps["measure"] = self._measure(recipe, shape, steps)
        steps["verify"] = self._verify(recipe, shape, steps)
        return Goal(recipe, steps)

    def _download(self, model: Model) -> str:
        return self._fetched(model, model.source, model.name)

    @once
    def _fetched(self, model: Model, source: Source, label: str, files: tuple[str, ...] | None = None) -> str:
        if source.path is not None:
            patterns = files if files is not None else checkpoint_files(source.path)
            return self._add("download", label, {}, (Input("files", path=source.path, select=patterns),))
        locked = self._locked(model, source)
        contents = {name: {"sha256": file.sha256, "size": file.size} for name, file in locked.files.items()}
        fields = {"repo": source.hf, "commit": locked.commit, "files": contents}
        return self._add("download", label, fields, brings=sum(file.size for file in locked.files.values()))

    @once
    def _convert(self, model: Model) -> str:
        # The recipe's overrides are limits of the library; what the weights are does not depend on them.
        download = self._download(model)
        inputs = [Input("checkpoint", step=download, select=TENSOR_FILES)]
        for name, step in self._merged(model).items():
            inputs.append(Input(name, step=step, select=TENSOR_FILES if name == "base" else ADAPTER_FILES))
        shape = self._shape(model, {})
        fields: dict[str, Any] = {"structure": shape.fields, **({"untied": True} if shape.untied else {})}
        if model.source.hf is not None:  # what the structure is made of is compared with the file, once it is here
            fields["config"] = dict(self._config(model))
            fields |= {"base": model.source.hf} if model.lora is not None else {}
        return self._add("convert", model.name, fields, tuple(inputs), (download,))

    def _merged(self, model: Model) -> dict[str, str]:
        """What is merged with the checkpoint: the steps that fetch it, by the name of convert's input."""
        steps = {}
        if model.delta_of is not None:
            steps["base"] = self._fetched(model, model.delta_of, f"{model.name}-base")
        if model.lora is not None:
            steps["lora"] = self._fetched(model, model.lora, f"{model.name}-lora", ADAPTER_FILES)
        return steps

    @once
    def _calibrate(self, model: Model) -> str:
        return self._measured("calibrate", model.name, model, "calibrated", {})

    @once
    def _round(self, model: Model, quantization: Quantization) -> str:
        fields = {"quantization": self._weights(quantization)}
        return self._measured("round", f"{model.name}-{quantization.name}", model, "gptq", fields)

    def _measured(self, kind: str, label: str, model: Model, rounding: str, fields: Mapping[str, Any]) -> str:
        """A step that runs the calibration text through the model."""
        everywhere = self.catalog.targets[_EVERYWHERE]
        target = everywhere if targets.runs_here(everywhere) else self.catalog.targets[_HERE]
        shape = self._shape(model, {})
        if shape.blocks is None:
            raise MlcBuildError(
                f"rounding `{rounding}` measures a decoder layer by layer, and "
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
        return self._add(kind, label, {"structure": shape.fields, **fields}, inputs, (download, convert))

    @once
    def _quantize(self, model: Model, quantization: Quantization) -> str:
        convert = self._convert(model)
        fields = {
            "structure": self._shape(model, {}).fields,
            "quantization": self._weights(quantization),
        }
        inputs = [Input("convert", step=convert)]
        if quantization.rounding == "calibrated":
            inputs.append(Input("calibration", step=self._calibrate(model)))
        elif quantization.rounding == "gptq":
            inputs.append(Input("rounded", step=self._round(model, quantization)))
        materials = (self._download(model), convert)
        return self._add("quantize", f"{model.name}-{quantization.name}", fields, tuple(inputs), materials)

    @once
    def _lower(self, form: Form, quantization: Quantization, target: Target) -> str:
        name = _format(quantization)
        fields = {
            "structure": form.fields,
            "quantization": self._format(quantization),
            "name": name,  # the library's metadata tells it to the runtime
            "device": self._device(target),
            **({"blocks": True} if form.blocks else {}),
            **(
                {"activation_bits": target.activation_bits}
                if target.activation_bits and has_few_bits(quantization)
                else {}
            ),
        }
        return self._add("lower", f"{form.label}-{name}-{target.name}", fields, entry=backend(target).lower)

    @once
    def _library(self, form: Form, quantization: Quantization, target: Target) -> str:
        name = _format(quantization)
        fields: dict[str, Any] = {
            "device": self._device(target),
            "host": dict(target.host),
            "linker": dataclasses.asdict(target.linker),
            "library": target.library,
        }
        options = {
            "architectures": list(target.architectures),
            "prefix": prefix(form, name) if target.library == "tar" else "",
        }
        chosen = backend(target)
        fields |= {name: options[name] for name in chosen.options}
        lower = self._lower(form, quantization, target)
        label = f"{form.label}-{name}-{target.name}"
        inputs = [Input("lower", step=lower)]
        if target.linker.kind == "wasm":
            inputs.append(Input("runtime", step=self._runtime()))
        return self._add("library", label, fields, tuple(inputs), entry=chosen.build, takes=chosen.takes)

    @once
    def _runtime(self) -> str:
        fields = {"emscripten": emscripten.version(), "sources": emscripten.source_tree()}
        return self._add("runtime", "webgpu", fields)

    def _execute(self, shape: Shape, quantization: Quantization, target: Target) -> str | None:
        """The step that tries the kernels of a library for a GPU; None where nothing here can run them."""
        if targets.not_executed(target):
            return None
        here = self.catalog.targets[_EXACT]
        form, device = shape.two_layers, targets.real_device(target)
        inputs = [Input("cpu_library", step=self._library(form, quantization, here))]
        fields: dict[str, Any] = {"structure": form.fields, "quantization": self._format(quantization)}
        if device:
            fields["device"] = device
            inputs.append(Input("library", step=self._library(form, quantization, target)))
        else:
            fields |= {"device": self._device(target), "host": dict(target.host)}
            fields["linker"] = dataclasses.asdict(target.linker)
            inputs.append(Input("lower", step=self._lower(form, quantization, target)))
        label = f"{shape.whole.label}-{_format(quantization)}-{target.name}"
        return self._add("execute", label, fields, tuple(inputs))

    def _package(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
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
            Input("checkpoint", step=steps["download"], select=TEXT_FILES),
        )
        page = PAGES.get(recipe.target.linker.kind, "")
        return self._add("package", recipe.name, fields, inputs, entry=page)

    def _measure(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        """Figures belong to weights and to the library that runs: one here, in place of every target that is not."""
        quantization, verify = recipe.quantization, recipe.verify
        here, unquantized = self.catalog.targets[_HERE], self.catalog.quantizations[_UNQUANTIZED]
        how = method_of(shape, verify)
        layers = shape.blocks if how == "layers" else None
        runs = recipe.target if layers is None and targets.runs_here(recipe.target) else self._stand_in(recipe.target)
        fields: dict[str, Any] = {"method": how}
        inputs = [
            Input("quantize", step=steps["quantize"]),
            Input("checkpoint", step=steps["download"], select=TOKEN_FILES),
            Input("convert", step=steps["convert"]),
            Input("text", path=verify.text or _EVALUATION_TEXT),
            Input("reference", step=self._library(layers or shape.whole, unquantized, here)),
        ]
        if layers is not None:
            fields["structure"] = self._shape(recipe.model, {}).fields
            fields["quantization"] = self._format(quantization)
            fields["context_window_size"] = shape.model_config.get("context_window_size", -1)  # pieces take more
            inputs.append(Input("blocks", step=self._library(layers, quantization, runs)))
        else:
            inputs.append(Input("library", step=self._library(shape.whole, quantization, runs)))
        if how == "embeddings":
            fields["embedding"] = shape.fields["embedding"]
            inputs[1] = Input("checkpoint", step=steps["download"], select=(*TOKEN_FILES, *POOLING_FILES))
        label = f"{recipe.model.name}-{quantization.name}-{runs.name}"
        return self._add("measure", label, fields, tuple(inputs), (steps["download"], steps["convert"]))

    def _stand_in(self, target: Target) -> Target:
        """A target that this machine runs and that rounds activations as `target` says: its figures are the other's."""
        bits = None if targets.is_gpu(target) else target.activation_bits
        here, exact = self.catalog.targets[_HERE], self.catalog.targets[_EXACT]
        other = dataclasses.replace(exact, name=f"{_HERE}@{bits}", activation_bits=bits)
        return next((each for each in (here, exact) if each.activation_bits == bits), other)

    def _verify(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        how, verify = method_of(shape, recipe.verify), recipe.verify
        fields: dict[str, Any] = {
            "method": how,
            "class": recipe.quantization.kind,
            "model_dtype": recipe.quantization.model_dtype,
            "executed": how != "layers" and targets.runs_here(recipe.target),
            **{name: getattr(verify, name) for name in ("kl", "perplexity_increase", "perplexity", "cosine", "gate")},
            "notes": list(shape.notes),
            **({} if shape.blocks is not None else {"by_layer": False}),  # no rounding measures it
        }
        inputs = [Input(name, step=steps[name]) for name in ("package", "measure", "execute") if name in steps]
        if targets.is_gpu(recipe.target) and "execute" not in steps:
            fields["not_executed"] = targets.not_executed(recipe.target)
        return self._add("verify", recipe.name, fields, tuple(inputs))

    # What is asked again and again

    @once
    def _shape(self, model: Model, overrides: Mapping[str, int]) -> Shape:
        adapter = adapter_of(model, lambda source: self._locked(model, source))
        return shape_of(self.catalog, model, self._config(model), overrides, adapter)

    @once
    def _config(self, model: Model) -> Mapping[str, Any]:
        return config_of(model, lambda model: self._locked(model, model.source))

    @once
    def _weights(self, quantization: Quantization) -> dict[str, Any]:
        return quantization_json(quantization)

    @once
    def _format(self, quantization: Quantization) -> dict[str, Any]:
        return format_json(quantization)

    @once
    def _lock(self, model: Model, source: Source) -> Locked | None:
        return self.lock(dataclasses.replace(model, source=source))

    def _locked(self, model: Model, source: Source) -> Locked:
        found = self._lock(model, source)
        if found is None:
            raise NotLocked(f"{source} is not in recipes.lock: `mlcbuild lock {model.name}` asks the hub")
        return found

    @once
    def _device(self, target: Target) -> dict[str, Any]:
        reason = tools.wrong(target)
        if reason:
            raise MlcBuildError(f"target {target.name}: {reason}")
        reason = tools.missing(target)
        if reason:
            raise Unavailable(f"target {target.name}: {reason}")
        return targets.resolve(target)

    def _digest(self, value: dict[str, Any]) -> list[str]:
        """Of what many steps share, like a structure: worked out once. In a list, which no field has of one text."""
        known = self._digests.get(id(value))
        if known is None:
            known = self._digests[id(value)] = (value, [digest_json(value)])
        return known[1]

    def _add(
        self,
        kind: str,
        label: str,
        fields: Mapping[str, Any],
        inputs: tuple[Input, ...] = (),
        materials: tuple[str, ...] = (),
        entry: str = "",
        takes: tuple[str, ...] = (),
        brings: int = 0,
    ) -> str:
        """The name of the step with this meaning; a new one is called `kind:label` unless another meaning is.

        `entry` is the function of a backend that the step calls; `takes` is added to what its kind takes.
        """
        wanted = [[item.name, item.step, str(item.path), item.select] for item in inputs]
        told = {name: self._digest(value) if isinstance(value, dict) else value for name, value in fields.items()}
        identity = digest_json([kind, told, wanted, materials, entry])
        name = self._names.get(identity)
        if name is None:
            name = f"{kind}:{label}"
            if name in self.steps:
                name = f"{name}-{identity[:8]}"
            self._names[identity] = name
            cost = dataclasses.replace(COSTS[kind], takes=(*COSTS[kind].takes, *takes)) if takes else COSTS[kind]
            self.steps[name] = Step(kind, name, f"{STEPS}.{kind}", fields, inputs, materials, entry, cost, brings)
        return name


def _format(quantization: Quantization) -> str:
    """The name of the format whose bytes these are: roundings and classes of one format share its libraries."""
    return quantization.format or quantization.name
