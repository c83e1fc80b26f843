"""Recipes -> steps, each once: what has to exist for the recipes to be built, and what depends on what.

Planning reads a model's `config.json` (from its folder, or from recipes.lock) and nothing else of a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.chat.config import TOKENIZER_FILES
from mlcbuild.compiler import targets, tools
from mlcbuild.compiler.web import emscripten
from mlcbuild.engine.graph import Goal, Graph, Input
from mlcbuild.errors import MlcBuildError, NotLocked, Unavailable
from mlcbuild.planning.adding import Steps
from mlcbuild.planning.backends import PAGES, backend
from mlcbuild.planning.budgets import check, chosen, first, spending
from mlcbuild.planning.fetching import fetched, unpacked
from mlcbuild.planning.files import (
    ADAPTER_FILES,
    OTHER_TOKENIZER,
    POOLING_FILES,
    TENSOR_FILES,
    TEXT_FILES,
    TOKEN_FILES,
)
from mlcbuild.planning.goals import goals_of
from mlcbuild.planning.once import once
from mlcbuild.planning.shapes import Form, Shape, adapter_of, config_of, format_name, method_of, prefix, shape_of
from mlcbuild.recipes.types import (
    Catalog,
    Locked,
    Model,
    Quantization,
    Recipe,
    Source,
    Target,
    Template,
    format_json,
    has_few_bits,
    quantization_json,
)

STEPS = "mlcbuild.steps"  # the package with one module per kind of step
# The reference that every package is compared with, on a machine that everybody has; what stands for a GPU's precision.
_UNQUANTIZED, _HERE, _EXACT = "q0f32", "cpu", "cpu-exact"
_EVERYWHERE = "cpu-x86_64"  # calibration decides what weights become: its code is the same on every such machine
BOUNDS = ("kl", "perplexity_increase", "perplexity", "cosine", "gate")  # of recipes' `verify`
_EVALUATION_TEXT = Path(__file__).parents[1] / "verify" / "evaluation.txt"
_CALIBRATION_TEXT = Path(__file__).parents[1] / "verify" / "calibration.txt"


def plan(catalog: Catalog, recipes: Iterable[Recipe], lock: Callable[[Model], Locked | None]) -> Graph:
    """The steps of the recipes; `lock` gives the commit and files of a model on a hub, or None where it has none."""
    planner = Planner(catalog, lock)
    return goals_of(planner.steps.added, planner.goal, recipes)


class Planner:
    """Adds steps, each once. What several recipes share is worked out once."""

    def __init__(self, catalog: Catalog, lock: Callable[[Model], Locked | None]) -> None:
        self.catalog = catalog
        self.lock = lock
        self.steps = Steps(STEPS)
        self._add = self.steps.add
        self.shapes: dict[bytes, Shape] = {}  # by all that they follow from
        self.known: dict[tuple[Any, ...], Any] = {}  # what `once` knows

    def goal(self, recipe: Recipe) -> Goal:
        model, quantization, target = recipe.model, recipe.quantization, recipe.target
        self._device(target)  # whether it can be built here at all
        shape = self._shape(model, tuple(sorted(recipe.overrides.items())))
        steps = {
            **self._weights(model, quantization),
            **self._compiled(shape.whole, shape.two_layers, quantization, target, self._allocate(model, quantization)),
        }
        steps["package"] = self._package(recipe, shape, steps)
        steps["measure"] = self._measure(recipe, shape, steps)
        steps["verify"] = self._verify(recipe, shape, steps)
        return Goal(recipe, steps)

    @once
    def _weights(self, model: Model, quantization: Quantization) -> dict[str, str]:
        """The steps that make weights, those of the model first."""
        check(quantization, self._shape(model, ()))
        steps = {"download": self._fetched(model, model.source, model.name), **self._merged(model)}
        steps |= {"unpack": self._download(model), **self._tokenizer(model)} if model.source.gguf else {}
        steps["convert"] = self._convert(model)
        if quantization.rounding == "calibrated":
            steps["calibrate"] = self._calibrate(model)
        elif quantization.rounding == "gptq":
            steps["round"] = self._round(model, quantization)
        if (budget := self._allocate(model, quantization)) is not None:
            steps["allocate"] = budget
        return {**steps, "quantize": self._quantize(model, quantization)}

    @once
    def _download(self, model: Model) -> str:
        """The step that has the checkpoint, or that makes it of a GGUF file."""
        download = self._fetched(model, model.source, model.name)
        tokenizer = self._tokenizer(model).get("tokenizer")
        return unpacked(self._add, model.name, download, tokenizer) if model.source.gguf else download

    def _tokenizer(self, model: Model) -> dict[str, str]:
        """The step that fetches another checkpoint's tokenizer for a GGUF file, by its kind."""
        other, names = model.tokenizer_from, (f"{model.name}-tokenizer", OTHER_TOKENIZER)
        return {"tokenizer": self._fetched(model, other, *names)} if other is not None else {}

    @once
    def _fetched(self, model: Model, source: Source, label: str, files: tuple[str, ...] | None = None) -> str:
        return fetched(self._add, label, source, files, lambda: self._locked(model, source))

    @once
    def _convert(self, model: Model) -> str:
        # The recipe's overrides are limits of the library; what the weights are does not depend on them.
        download = self._download(model)
        inputs = [Input("checkpoint", step=download, select=TENSOR_FILES)]
        for name, step in self._merged(model).items():
            inputs.append(Input(name, step=step, select=TENSOR_FILES if name == "base" else ADAPTER_FILES))
        shape = self._shape(model, ())
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
        return self._measured("calibrate", model.name, model, {})

    @once
    def _round(self, model: Model, quantization: Quantization) -> str:
        fields, more = {"quantization": self._packing(quantization)}, chosen(self._allocate(model, quantization))
        return self._measured("round", f"{model.name}-{quantization.name}", model, fields, more)

    @once
    def _allocate(self, model: Model, quantization: Quantization) -> str | None:
        """What spends a budget, by the model's weights in the first of its formats; None for other quantizations."""
        if not quantization.formats:
            return None
        weights = (Input("quantize", step=self._quantize(model, first(quantization))),)
        fields = {"quantization": self._packing(first(quantization)), **spending(quantization)}
        return self._measured("allocate", f"{model.name}-{quantization.name}", model, fields, weights)

    def _measured(
        self, kind: str, label: str, model: Model, fields: Mapping[str, Any], more: tuple[Input, ...] = ()
    ) -> str:
        """A step that runs the calibration text through the model."""
        everywhere = self.catalog.targets[_EVERYWHERE]
        target = everywhere if targets.runs_here(everywhere) else self.catalog.targets[_HERE]
        shape = self._shape(model, ())
        assert shape.blocks is not None, "`check` refuses others"
        download, convert = self._download(model), self._convert(model)
        inputs = (
            Input("convert", step=convert),
            Input("blocks", step=self._library(shape.blocks, self.catalog.quantizations[_UNQUANTIZED], target)),
            Input("checkpoint", step=download, select=TOKENIZER_FILES),
            Input("text", path=model.calibration or _CALIBRATION_TEXT),
            *more,
        )
        return self._add(kind, label, {"structure": shape.fields, **fields}, inputs, (download, convert))

    @once
    def _quantize(self, model: Model, quantization: Quantization) -> str:
        convert = self._convert(model)
        fields = {
            "structure": self._shape(model, ()).fields,
            "quantization": self._packing(quantization),
        }
        inputs = [Input("convert", step=convert), *chosen(self._allocate(model, quantization))]
        if quantization.rounding == "calibrated":
            inputs.append(Input("calibration", step=self._calibrate(model)))
        elif quantization.rounding == "gptq":
            inputs.append(Input("rounded", step=self._round(model, quantization)))
        materials = (self._download(model), convert)
        return self._add("quantize", f"{model.name}-{quantization.name}", fields, tuple(inputs), materials)

    @once
    def _compiled(
        self, whole: Form, small: Form, quantization: Quantization, target: Target, budget: str | None
    ) -> dict[str, str]:
        """The library's steps, with the one that tries its kernels where something here can run them."""
        steps = {
            "lower": self._lower(whole, quantization, target, budget),
            "library": self._library(whole, quantization, target, budget),
        }
        if not targets.not_executed(target):
            steps["execute"] = self._execute(whole, small, quantization, target, budget)
        return steps

    @once
    def _lower(self, form: Form, quantization: Quantization, target: Target, budget: str | None = None) -> str:
        name = format_name(quantization)
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
        label = f"{form.label}-{name}-{target.name}"
        return self._add("lower", label, fields, chosen(budget), entry=backend(target).lower)

    @once
    def _library(self, form: Form, quantization: Quantization, target: Target, budget: str | None = None) -> str:
        name = format_name(quantization)
        fields: dict[str, Any] = {
            "device": self._device(target),
            "host": dict(target.host),
            "linker": dataclasses.asdict(target.linker),
            "library": target.library,
        }
        options = {
            "architectures": list(target.architectures),
            # Two models may choose otherwise: an app that holds both must tell their libraries apart.
            "prefix": prefix(form, budget.partition(":")[2] if budget else name) if target.library == "tar" else "",
        }
        by = backend(target)
        fields |= {name: options[name] for name in by.options}
        lower = self._lower(form, quantization, target, budget)
        label = f"{form.label}-{name}-{target.name}"
        inputs = [Input("lower", step=lower)]
        if target.linker.kind == "wasm":
            inputs.append(Input("runtime", step=self._runtime()))
        return self._add("library", label, fields, tuple(inputs), entry=by.build, takes=by.takes)

    @once
    def _runtime(self) -> str:
        fields = {"emscripten": emscripten.version(), "sources": emscripten.source_tree()}
        return self._add("runtime", "webgpu", fields)

    def _execute(self, whole: Form, form: Form, quantization: Quantization, target: Target, budget: str | None) -> str:
        """The step that tries the kernels of a library for a GPU: in the library of the small model `form`."""
        here = self.catalog.targets[_EXACT]
        device = targets.real_device(target)
        inputs = [Input("cpu_library", step=self._library(form, quantization, here, budget)), *chosen(budget)]
        fields: dict[str, Any] = {"structure": form.fields, "quantization": self._format(quantization)}
        if device:
            fields["device"] = device
            inputs.append(Input("library", step=self._library(form, quantization, target, budget)))
        else:
            fields |= {"device": self._device(target), "host": dict(target.host)}
            fields["linker"] = dataclasses.asdict(target.linker)
            inputs.append(Input("lower", step=self._lower(form, quantization, target, budget)))
        label = f"{whole.label}-{format_name(quantization)}-{target.name}"
        return self._add("execute", label, fields, tuple(inputs))

    def _package(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        fields = {
            "model": recipe.model.name,
            "quantization": recipe.quantization.name,
            "format": format_name(recipe.quantization),
            "target": recipe.target.name,
            "template": self._template(recipe.template),
            "model_type": shape.fields["model_type"],
            "model_config": shape.model_config,
        }
        if shape.fields.get("embedding") is not None:
            fields["embedding"] = shape.fields["embedding"]
        inputs = (
            Input("quantize", step=steps["quantize"]),
            Input("library", step=steps["library"]),
            Input("checkpoint", step=self._download(recipe.model), select=TEXT_FILES),
        )
        page = PAGES.get(recipe.target.linker.kind, "")
        return self._add("package", recipe.name, fields, inputs, entry=page)

    def _measure(self, recipe: Recipe, shape: Shape, steps: Mapping[str, str]) -> str:
        """Figures belong to weights and to the library that runs: one here, in place of every target that is not."""
        quantization, verify = recipe.quantization, recipe.verify
        how, budget = method_of(shape, verify), steps.get("allocate")
        layers = shape.blocks if how == "layers" else None
        runs, reference, library = self._run(layers or shape.whole, quantization, recipe.target, budget)
        fields: dict[str, Any] = {"method": how}
        checkpoint = self._download(recipe.model)
        inputs = [
            Input("quantize", step=steps["quantize"]),
            Input("checkpoint", step=checkpoint, select=TOKEN_FILES),
            Input("convert", step=steps["convert"]),
            Input("text", path=verify.text or _EVALUATION_TEXT),
            Input("reference", step=reference),
            Input("library" if layers is None else "blocks", step=library),
        ]
        if layers is not None:
            fields["structure"] = self._shape(recipe.model, ()).fields
            fields["quantization"] = self._format(quantization)
            inputs += chosen(budget)
            fields["context_window_size"] = shape.model_config.get("context_window_size", -1)  # pieces take more
        if how == "embeddings":
            fields["embedding"] = shape.fields["embedding"]
            inputs[1] = Input("checkpoint", step=checkpoint, select=(*TOKEN_FILES, *POOLING_FILES))
        label = f"{recipe.model.name}-{quantization.name}-{runs}"
        return self._add("measure", label, fields, tuple(inputs), (checkpoint, steps["convert"]))

    @once
    def _run(self, form: Form, quantization: Quantization, target: Target, budget: str | None) -> tuple[str, str, str]:
        """What weights are measured with: a target's name, the unquantized library and the quantized one."""
        runs = target if not form.blocks and targets.runs_here(target) else self._stand_in(target)
        reference = self._library(form, self.catalog.quantizations[_UNQUANTIZED], self.catalog.targets[_HERE])
        return runs.name, reference, self._library(form, quantization, runs, budget)

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
            "executed": how != "layers" and self._runs_here(recipe.target),
            **{name: getattr(verify, name) for name in BOUNDS},
            "notes": list(shape.notes),
            **({} if shape.blocks is not None else {"by_layer": False}),  # no rounding measures it
        }
        given = ("package", "measure", "execute", "allocate")
        inputs = [Input(name, step=steps[name]) for name in given if name in steps]
        if targets.is_gpu(recipe.target) and "execute" not in steps:
            fields["not_executed"] = targets.not_executed(recipe.target)
        return self._add("verify", recipe.name, fields, tuple(inputs))

    # What is asked again and again

    @once
    def _shape(self, model: Model, overrides: tuple[tuple[str, int], ...]) -> Shape:
        for source in model.hub_sources:
            self._locked(model, source)
        adapter = adapter_of(model, lambda source: self._locked(model, source))
        config = self._config(model)
        # Not `digest_json`, which refuses the NaN that a config.json may have.
        told = json.dumps([config, adapter, model.architecture, overrides], sort_keys=True)
        known = hashlib.sha256(told.encode()).digest()  # fine-tuned models have the config.json of their base
        if known not in self.shapes:
            self.shapes[known] = shape_of(self.catalog, model, config, dict(overrides), adapter)
        return self.shapes[known]

    @once
    def _config(self, model: Model) -> Mapping[str, Any]:
        return config_of(model, lambda model: self._locked(model, model.source))

    @once
    def _packing(self, quantization: Quantization) -> dict[str, Any]:
        return quantization_json(quantization)

    @once
    def _format(self, quantization: Quantization) -> dict[str, Any]:
        return format_json(quantization)

    @once
    def _template(self, template: Template) -> dict[str, Any]:
        return {"name": template.name, **template.data}

    @once
    def _runs_here(self, target: Target) -> bool:
        return targets.runs_here(target)

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
