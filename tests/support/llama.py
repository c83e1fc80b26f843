"""Tiny random llamas: transformers' own, their parameters as MLC names them, and libraries that mlcbuild compiles."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.convert import quantization
from mlcbuild.recipes.types import Architecture, Linker, Quantization, Target
from tests.support import architectures

Array = npt.NDArray[Any]

_ROOT = Path(__file__).parents[2]
QUANTIZATIONS = {  # all that differ in bytes: not other roundings of the same formats, nor mixtures of formats
    path.stem: quantization(path.stem, data, {})
    for path in sorted((_ROOT / "recipes" / "quantizations").glob("*.yaml"))
    if not {"format", "formats", "overrides"} & (data := yaml.safe_load(path.read_text())).keys()
}
_LINKER = Linker("zig", "native", ("-shared", "-nostdlib", "-Wl,-z,undefs", "-s"), ("libm.so.6", "libc.so.6"))
CPU = Target("cpu", {"kind": "llvm", "mcpu": "native"}, "so", _LINKER, "native")
# LLVM's passes over TVM's code take as long as all else; the C kernels, in which models compute, are compiled as ever.
UNOPTIMISED = replace(CPU, device={**CPU.device, "opt-level": 0})

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def transformers_llama(**changes: Any) -> Any:
    """A seeded random LlamaForCausalLM in float32, norm weights random too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def architecture(name: str = "llama") -> Architecture:
    return architectures.architecture(name)


def structure_of(model: Any, **overrides: int) -> Structure:
    return resolve(architecture(), model.config.to_dict(), {"max_batch_size": 8, **overrides})


def mlc_parameters(model: Any) -> dict[str, Array]:
    """The model's parameters under MLC's names, fused as MLC fuses them: float32."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return {p.name: np.concatenate([state[s] for s in p.sources]) for p in parameters(structure_of(model))}


def with_parameters(model: Any, values: dict[str, Array]) -> Any:
    """The same model with other parameters, given under MLC's names."""
    import torch

    state = dict(model.state_dict())
    for p in parameters(structure_of(model)):
        start = 0
        for source in p.sources:
            rows = state[source].shape[0]
            state[source] = torch.tensor(np.ascontiguousarray(values[p.name][start : start + rows], np.float32))
            start += rows
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def reference_logits(model: Any, ids: list[int]) -> Array:
    """float32 [len(ids), vocab_size], as transformers computes them."""
    import torch

    with torch.no_grad():
        logits: Array = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def pack(weight: Array, dtype: str) -> tuple[Array, Array, Array]:
    """4-bit groups of 32 by the formulas of docs/quantization.md: words, scales, and the weights that they stand for.

    Written from the formulas for these tests, with the arithmetic in `dtype`, rounded at each step.
    """
    rows, columns = weight.shape
    groups = -(-columns // 32)
    padded = np.zeros((rows, groups * 32), dtype)
    padded[:, :columns] = weight.astype(dtype)
    grouped = padded.reshape(rows, groups, 32)
    seven = np.array(7, dtype)
    scale = (np.abs(grouped).max(-1) / seven).astype(dtype)
    codes = np.round((grouped / scale[..., None] + seven).astype(dtype)).clip(0, 14).astype(np.uint32)
    values = ((codes.astype(np.float32) - 7) * scale[..., None].astype(np.float32)).reshape(rows, -1)[:, :columns]
    flat = codes.reshape(rows, -1)
    flat[:, columns:] = 0
    words = np.zeros((rows, groups * 4), np.uint32)
    for j in range(8):
        words |= flat[:, j::8] << np.uint32(4 * j)
    return words, scale, values


def build_library(
    structure: Structure,
    quantization: str | Quantization,
    folder: Path,
    target: Target = UNOPTIMISED,
    blocks: bool = False,
) -> Path:
    """Lower, generate code and link, in this process; the library's file."""
    from mlcbuild.compiler import assemble, targets
    from mlcbuild.compiler.cpu.build import build
    from mlcbuild.compiler.cpu.lower import lower

    folder.mkdir(parents=True, exist_ok=True)
    output, lowered = folder / "model.so", folder / "module.json"
    device = targets.resolve(target)
    given = QUANTIZATIONS[quantization] if isinstance(quantization, str) else quantization
    assemble.save(lower(replace(structure, vocab_size=1), given, given.name, device, blocks=blocks), lowered)
    build(lowered, device, {}, target.linker, output, folder)
    lowered.unlink()
    return output


# As a build for the stock target `cpu` compiles it.
build_optimised = functools.partial(build_library, target=CPU)
