"""A tiny random checkpoint through the real steps and a compiled library, with an independent model beside it.

convert -> quantize -> library -> session, and transformers (or a reference written in these tests) on the weights that
the quantized tensors stand for.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.table import read_table
from mlcbuild.engine.job import local_job
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.models.parameters import Parameter, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.models.wrappers import unwrapped
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.recipes.types import Architecture
from mlcbuild.runtime import weights
from mlcbuild.runtime.library import Library, Network, match
from mlcbuild.runtime.session import Session
from mlcbuild.steps import convert, quantize
from tests.support import architectures, llama

Array = npt.NDArray[Any]
Config = Mapping[str, Any]

ARCHITECTURES = architectures.STOCK
CHUNK, CONTEXT = 24, 96  # a prompt of 40 takes two chunks
IDS = [int(i) for i in np.random.default_rng(1).integers(3, 90, 40)]


@dataclass(frozen=True)
class Case:
    """A model of an architecture: the content of its `config.json`, small.

    transformers makes and computes it, unless there is a `reference`: the shapes of a checkpoint's tensors, and the
    logits float32 [n, V] of token ids from such tensors.
    """

    architecture: str
    config: Config
    shapes: Callable[[Config], Mapping[str, tuple[int, ...]]] | None = None
    reference: Callable[[Config, Mapping[str, Any], list[int]], Any] | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)
    quantizations: tuple[str, ...] = ("q0f32", "q4f32_1")
    centres: Mapping[str, float] = field(default_factory=dict)  # of norms, by the ends of their names
    noise: float = 1  # how many times as much as others its float32 sums differ between two right ways to add them


def known_architectures() -> dict[str, Architecture]:
    return _known(ARCHITECTURES)


@cache
def _known(folder: Path) -> dict[str, Architecture]:
    return architectures.known(folder)


def structure_of(case: Case, folder: Path, **changes: Any) -> Structure:
    """The structure of the checkpoint in `folder`, its architecture chosen as a build chooses it."""
    config = json.loads((folder / "config.json").read_text())
    known = known_architectures()
    chosen = choose(known, config)
    assert chosen.name == case.architecture
    limits = {"context_window_size": CONTEXT, "prefill_chunk_size": CHUNK, "max_batch_size": 2, **case.overrides}
    return dataclasses.replace(resolve(chosen, config, limits), **changes)


def config_of(case: Case) -> dict[str, Any]:
    """A whole `config.json` as the hub has it: transformers writes what the case leaves out."""
    if case.shapes is not None:
        return dict(case.config)
    from transformers import AutoConfig

    config = dict(case.config)
    whole: dict[str, Any] = AutoConfig.for_model(config.pop("model_type"), **config).to_dict()
    return whole


def save(case: Case, folder: Path) -> None:
    """A checkpoint of random numbers, biases and norms random too."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    if case.shapes is not None:
        made = {
            name: _random(random, name, shape, float("norm" in name or "ln_" in name))
            for name, shape in case.shapes(case.config).items()
        }
        (folder / "config.json").write_text(json.dumps(dict(case.config)))
        _write(folder, made)
        return
    import torch
    from transformers import AutoConfig

    config = dict(case.config)
    model = _class_of(case).from_config(AutoConfig.for_model(config.pop("model_type"), **config)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = float(parameter.flatten()[0]) if parameter.dim() < 2 or "norm" in name else 0.0
            start = next((centre for end, centre in case.centres.items() if name.endswith(end)), start)
            parameter.copy_(torch.tensor(_random(random, name, tuple(parameter.shape), start)))
        for name, buffer in model.named_buffers():
            if "correction" in name or "balancing" in name or "scalar" in name:
                start = float("scalar" in name) - float("balancing" in name)
                buffer.copy_(torch.tensor(_random(random, name, tuple(buffer.shape), start)))
                if "balancing" in name:
                    buffer[-1] = -1  # what transformers makes of Zaya's, whatever a checkpoint has
    model.save_pretrained(folder)


def _class_of(case: Case) -> Any:
    """What transformers makes it with: of wrappers, what sees and hears, too."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as SEEING

    wrapper = case.config["model_type"] in SEEING
    return transformers.AutoModelForMultimodalLM if wrapper else transformers.AutoModelForCausalLM


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...], start: float) -> Array:
    """Matrices keep a vector's length; biases are small; norms lie around `start`, what they are initialised with."""
    if name.endswith("bias"):
        return random.normal(0, 0.2, shape).astype(np.float32)
    if len(shape) < 2 or "norm" in name:
        return (start + random.uniform(-0.5, 0.5, shape)).astype(np.float32)
    return random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


def _write(folder: Path, tensors: Mapping[str, Array]) -> None:
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(values).reshape(values.shape) for name, values in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


class Agreement:
    """A case in one quantization: its library, and what its weights ought to give."""

    def __init__(
        self,
        case: Case,
        quantization: str,
        folder: Path,
        build: Callable[[Structure, Any, Path], Path] | None = llama.build_library,
        **changes: Any,
    ) -> None:
        """`changes` are fields of the structure that the library is compiled with in spite of the checkpoint.

        Without `build` nothing is compiled, and there is no session.
        """
        self.case, self._checkpoint = case, folder / "checkpoint"
        save(case, folder / "checkpoint")
        form = llama.QUANTIZATIONS[quantization]
        self.structure = structure_of(case, folder / "checkpoint")
        fields = {"structure": self.structure.to_json()}
        job = local_job({"checkpoint": folder / "checkpoint"}, fields, folder / "convert")
        convert.run(job)
        fields |= {"quantization": dataclasses.asdict(form)}
        packing = local_job({"convert": job.output, "checkpoint": folder / "checkpoint"}, fields, folder / "quantize")
        quantize.run(packing)
        self.weights = packing.output
        self.document = json.loads((job.output / "parameters.json").read_text())
        self.blobs = {entry.digest: entry.path for entry in job.inputs["checkpoint"].files.values()}
        self.blobs |= {entry.digest: entry.path for entry in packing.inputs["convert"].files.values()}
        self._meant = self._stood_for(form, folder)
        if build is None:
            return
        compiled = dataclasses.replace(self.structure, **changes)
        self.network = network(build(compiled, form, folder), self.weights, compiled.vocab_size)

    def session(self, sequences: int = 1) -> Session:
        return Session(self.network, sequences)

    def expected(self, ids: list[int]) -> Array:
        """Logits [n, V] of the reference on the numbers that the quantized weights stand for."""
        return reference_logits(self.case, self._meant, ids)

    def rounded(self, ids: list[int]) -> Array:
        """The same as transformers computes it in float16: what rounding alone does."""
        return reference_logits(self.case, self._meant, ids, "float16")

    def unquantized(self, ids: list[int]) -> Array:
        """Logits [n, V] of the reference on the checkpoint."""
        return reference_logits(self.case, self._checkpoint, ids)

    def _stood_for(self, form: Any, folder: Path) -> Path:
        """A checkpoint of the dequantized weights, under the checkpoint's own names."""
        wanted = parameters(self.structure)
        values = dict(dequantized(self.weights, wanted, form))
        tensors = _read(folder / "checkpoint")
        names = {name.removeprefix(self.structure.optional_prefix): name for name in tensors}
        names |= unwrapped({name: name for name in tensors}) if self.structure.wrapped else {}
        for parameter in wanted:
            for source, array in originals(parameter, values[parameter.name], tensors, names).items():
                tensors[source] = array
        meant = folder / "meant"
        meant.mkdir()
        (meant / "config.json").write_text((folder / "checkpoint" / "config.json").read_text())
        _write(meant, tensors)
        return meant


def network(library: Path, folder: Path, vocab_size: int, all_of_them: bool = True) -> Network:
    """A library with the weights of a folder, which are what it wants; or else more."""
    opened = Library(library)
    wanted = opened.metadata.parameters
    records = weights.read_index(folder)
    if all_of_them:
        match(wanted, records, library, folder)
    by_name = {record.name: record for record in records}
    loaded = weights.load([by_name[parameter.name] for parameter in wanted])
    return Network(opened, [opened.device.place(tensor) for tensor in loaded], vocab_size, 2)


def originals(
    parameter: Parameter, values: Array, tensors: Mapping[str, Array], names: Mapping[str, str]
) -> dict[str, Array]:
    """The checkpoint tensors that a parameter is made of: the inverse of what convert does, written anew."""
    sources = parameter.sources
    if parameter.alternative and sources[0] not in tensors and all(each in tensors for each in parameter.alternative):
        sources = parameter.alternative
    source = sources[0]
    if parameter.role.startswith("latent_"):
        assert parameter.groups is not None
        heads, _, width, _ = parameter.groups
        whole = tensors[names.get(source, source)].reshape(heads, -1, parameter.stored[1]).copy()
        if parameter.role == "latent_keys_proj":
            whole[:, :width] = np.swapaxes(values, 1, 2)
        else:
            whole[:, width:] = values
        return {names.get(source, source): whole.reshape(parameter.stored)}
    if "first_rows" in parameter.convert:
        values = np.concatenate([values, tensors[names.get(source, source)][len(values) :]])
    if "last_rows" in parameter.convert and len(sources) == 1:
        values = np.concatenate([tensors[source][: -len(values)], values])
    if "differential" in parameter.convert:
        return {}  # not quantized
    if "join_heads" in parameter.convert:
        return {}  # nor is this
    if "evens_first" in parameter.convert:
        values = np.stack(np.split(values, 2), axis=1).reshape(values.shape)
    if "add_one" in parameter.convert:
        values = values - 1
    if "negative_exp" in parameter.convert:
        values = np.log(-values)
    if "exp_negative_exp" in parameter.convert:
        values = np.log(-np.log(values))
    if "square" in parameter.convert:
        values = np.sqrt(values)
    if "times" in parameter.convert:
        values = values / np.float32(parameter.times)
    if "halve" in parameter.convert:
        values = values * np.float32(2**parameter.halvings)
    if "softplus" in parameter.convert:
        values = np.log(np.expm1(values))
    if "by_expert" in parameter.convert:
        turned = np.swapaxes(values, -1, -2) if "transpose" in parameter.convert else values
        parts = np.split(turned, len(parameter.sources), axis=1)
        return {name: part.reshape(-1, part.shape[-1]) for name, part in zip(parameter.sources, parts, strict=True)}
    if "deinterleave" in parameter.convert:
        values = np.stack(np.split(values, 2, axis=1), axis=2).reshape(values.shape)
    if "ungroup_qvk" in parameter.convert:
        queries, keys, rest = (part.reshape(4, -1, *values.shape[1:]) for part in np.split(values, 3))
        values = np.concatenate([queries, rest, keys], axis=1).reshape(values.shape)
    if "ungroup_qkv" in parameter.convert:
        assert parameter.groups is not None
        count, query, key, value = parameter.groups
        ends = np.cumsum([count * query, count * key])
        parts = [part.reshape(count, size, *values.shape[1:]) for part, size in
                 zip(np.split(values, ends), (query, key, value), strict=True)]  # fmt: skip
        values = np.concatenate(parts, axis=1).reshape(values.shape)
    found, start = {}, 0
    rows_of_all = values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values
    for source in sources:
        name = source if source in tensors else names.get(source, names.get(source.partition(".")[2], source))
        shape = tensors[name].shape if name in tensors else values.shape
        shape = (*shape[:-2], *shape[:-3:-1]) if "transpose" in parameter.convert else shape
        rows = int(np.prod(shape)) if values.ndim == 1 else int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        part = rows_of_all[start : start + rows].reshape(shape)
        found[name] = np.swapaxes(part, -1, -2) if "transpose" in parameter.convert else part
        start += rows
    return found


def _read(folder: Path) -> dict[str, Array]:
    from mlcbuild.checkpoints.mapped import FLOATS, read

    files = {path.name: path for path in folder.iterdir()}
    return {name: np.array(read(ref)) for name, ref in read_table(files).items() if ref.dtype in FLOATS}


def reference_logits(case: Case, folder: Path, ids: list[int], dtype: str = "float32") -> Array:
    """float32 [n, V] of the checkpoint in `folder`: by transformers in `dtype`, or by the case's own reference."""
    import torch

    if case.reference is not None:
        tensors = {name: torch.tensor(values) for name, values in _read(folder).items()}
        with torch.no_grad():
            computed: Array = case.reference(case.config, tensors, ids).float().numpy()
        return computed
    model = _class_of(case).from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    if case.architecture == "llama4":  # which transformers 5.24 does not compute without an image
        model = model.language_model
    with torch.no_grad(), _token_by_token(model):
        if not case.config.get("is_moe"):  # whose prompts transformers 5.24 gives each other's experts
            logits: Array = model(torch.tensor([ids])).logits[0].float().numpy()
            return logits
        made = [model(torch.tensor([ids[:1]]), use_cache=True)]
        for token in ids[1:]:
            made.append(model(torch.tensor([[token]]), cache=made[-1].cache, use_cache=True))
    return np.concatenate([each.logits[0].float().numpy() for each in made])


@contextmanager
def _token_by_token(model: Any) -> Iterator[None]:
    """Delta rules as transformers computes them while it decodes: in chunks, its float32 loses up to 2e-4 of logits."""
    module, forms = sys.modules[type(model).__module__], ("gated_delta_rule", "kimi_delta_attention")
    with ExitStack() as stack:
        for prefix, form in itertools.product(("", "torch_"), forms):
            if hasattr(module, f"{prefix}chunk_{form}"):
                sequential = getattr(module, f"{prefix}recurrent_{form}")
                stack.enter_context(mock.patch.object(module, f"{prefix}chunk_{form}", sequential))
        yield


def error(got: Array, expected: Array) -> float:
    """The largest difference over the standard deviation of the expected logits."""
    return float(np.abs(got - expected).max() / expected.std())
