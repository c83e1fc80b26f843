"""Structure and quantization in, a scheduled module for a CPU out: what the step `lower` does for CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm import IRModule

from mlcbuild.compiler.assemble import Backend, assemble, declare
from mlcbuild.compiler.cpu import attention, encoder, formats, recurrent, sources
from mlcbuild.compiler.cpu.operations import factories
from mlcbuild.compiler.cpu.sources import Source
from mlcbuild.errors import MlcBuildError
from mlcbuild.models import indexer
from mlcbuild.models.few_layers import one_layer
from mlcbuild.models.kinds import HYBRID, MLSTM, RECURRENT, STATE_SPACES
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared
from mlcbuild.recipes.types import Quantization

_MAX_HEAD_DIM = 512  # MAX_HEAD_DIM and MAX_ROTARY in the CPU kernels
_MAX_STATE, _MAX_TAPS = 256, 32  # MAX_STATE and MAX_TAPS there
_OF_MIXERS = {"delta": ("delta",), "kda": ("delta",), "rglru": ("lru",)}  # C sources beside state_space.c
_BACKEND = Backend(factories, attention.cache_kernels, recurrent.recurrence, encoder.masked)


def lower(
    structure: Structure,
    quantization: Quantization,
    name: str,
    device: Mapping[str, Any],
    debug_dump: Path | None = None,
    activation_bits: int | None = None,
    blocks: bool = False,
) -> IRModule:
    """The library of `structure` in `quantization` (called `name` in its metadata) for a CPU, the TVM target `device`.

    `activation_bits` is how precise products with weights of few bits take activations. `blocks`: not a model's library
    but that of its pieces, one layer of each kind. Raises MlcBuildError for a structure that the kernels cannot run.
    """
    _check(structure)
    structure = one_layer(structure) if blocks else structure
    declared, dtype = declare(structure, quantization), quantization.model_dtype
    module = assemble(structure, declared, name, dtype, device, _BACKEND, debug_dump, blocks)
    return sources.attach(module, _kernels(declared, dtype, _files(structure), activation_bits))


def _files(structure: Structure) -> tuple[str, ...]:
    """The C sources of a kind of model, without .c, beside those of its formats."""
    if structure.kind == HYBRID:
        return "attention", "rows", "state_space", *_OF_MIXERS.get(structure.mixer, ())
    own = {MLSTM: MLSTM, **dict.fromkeys(STATE_SPACES, "state_space")}.get(structure.kind, "recurrent")
    attending = "choice" if structure.indexer else "attention"  # which has attention.c in it
    return (own, "rows") if structure.kind in RECURRENT else (attending, "rows")


def _kernels(
    declared: Sequence[Declared], dtype: str, files: Sequence[str], activation_bits: int | None
) -> tuple[Source, ...]:
    """The C sources of a library with these parameters, of model dtype `dtype`: those of their formats, and `files`."""
    needed = {formats.format_of(p.packing) for p in declared if len(p.shape) > 1}
    stacks = ("router", "key_router", "latent_keys_proj")
    several = any(p.role in stacks or (p.role == "step_proj" and len(p.shape) > 2) for p in declared)
    experts = ("experts",) if several else ()
    return formats.sources(needed, dtype, sorted((*files, *experts)), activation_bits)


def _check(structure: Structure) -> None:
    plain = structure.kind not in RECURRENT and not structure.absorbed
    if plain and (structure.head_dim > _MAX_HEAD_DIM or structure.head_dim % 2):
        raise MlcBuildError(
            f"head_dim is {structure.head_dim}: the CPU kernels take even numbers up to {_MAX_HEAD_DIM}"
        )
    indexer.check(structure)
    if structure.state_size > _MAX_STATE:
        raise MlcBuildError(f"state_size is {structure.state_size}: the CPU kernels keep up to {_MAX_STATE} values")
    if structure.conv_kernel > _MAX_TAPS:
        raise MlcBuildError(f"conv_kernel is {structure.conv_kernel}: the CPU kernels take up to {_MAX_TAPS} tokens")
