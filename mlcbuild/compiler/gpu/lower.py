"""Structure and quantization in, a scheduled module for a GPU out: what the step `lower` does for GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tvm import IRModule

from mlcbuild.compiler.assemble import Backend, assemble, declare
from mlcbuild.compiler.gpu import attention, encoder, graphs, lru, recurrent, sampling, schedules
from mlcbuild.compiler.gpu.device import Device, device_of
from mlcbuild.compiler.gpu.memories import sharing
from mlcbuild.compiler.gpu.operations import factories
from mlcbuild.compiler.pipeline import Passes
from mlcbuild.errors import MlcBuildError
from mlcbuild.models import indexer
from mlcbuild.models.few_layers import one_layer
from mlcbuild.models.kinds import DECODER, HYBRID, MLSTM, RECURRENT
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import Quantization

_NARROW = ("uint8", "uint16")
_MAX_STATE = 256  # a thread's registers
_NO_BFLOAT16 = ("metal", "opencl", "vulkan", "webgpu")


def lower(
    structure: Structure,
    quantization: Quantization,
    name: str,
    device: Mapping[str, Any],
    debug_dump: Path | None = None,
    activation_bits: int | None = None,
    blocks: bool = False,
) -> IRModule:
    """The library of `structure` in `quantization` (called `name` in its metadata) for a GPU, the TVM target `device`.

    `activation_bits` is for CPUs and not used. `blocks`: not a model's library but that of its pieces, one layer of
    each kind. Raises MlcBuildError for a structure or a format that GPU kernels do not have.
    """
    gpu = device_of(device)
    _check(structure, gpu.threads)
    if quantization.model_dtype == "bfloat16" and gpu.kind in _NO_BFLOAT16:
        raise MlcBuildError(
            f"quantization {name}: its model dtype is bfloat16, which {gpu.kind} does not have; "
            "use a float16 or float32 format for this target"
        )
    structure = one_layer(structure) if blocks else structure
    declared = declare(structure, quantization)
    narrow = next((p for p in declared if p.dtype in _NARROW), None)
    if gpu.kind == "webgpu" and narrow is not None:
        raise MlcBuildError(
            f"quantization {name}: {narrow.name} is {narrow.dtype}, which WGSL does not have; "
            "use a format with storage_dtype uint32 for this target"
        )
    backend = Backend(
        factories=partial(factories, device=gpu, wide=structure.kind in (HYBRID, *RECURRENT)),
        cache_kernels=partial(attention.cache_kernels, threads=gpu.threads),
        recurrence=recurrent.recurrence,
        masked=encoder.masked,
        threads=gpu.threads,
        emit_more=partial(sampling.emit, threads=gpu.threads, drafts_too=gpu.kind != "webgpu"),
        passes=_passes(gpu, structure, blocks),
    )
    return assemble(structure, declared, name, quantization.model_dtype, device, backend, debug_dump, blocks)


def _check(structure: Structure, threads: int) -> None:
    """Raise MlcBuildError, naming it, for a choice that the GPU kernels do not have."""
    s = structure
    kept = s.head_dim if s.kind in ("rwkv5", "rwkv6") else s.state_size
    if kept > _MAX_STATE:
        raise MlcBuildError(f"a channel's state has {kept} values: the GPU kernels keep up to {_MAX_STATE}")
    mixer, wanted = s.mixer or s.kind, 0
    if mixer in ("delta", "kda", "mamba2", "lightning", MLSTM):
        wanted = sharing(s.state_size).threads
    elif mixer == "rglru":
        wanted = lru.THREADS
    if wanted > threads:
        raise MlcBuildError(
            f"mixer is {mixer}: its kernel has blocks of {wanted} threads, and the device takes {threads}"
        )
    if s.kind not in (DECODER, HYBRID):
        return
    indexer.check(s)
    if s.absorbed:
        return
    if s.head_dim % 4 or not 32 <= s.head_dim <= 512:
        raise MlcBuildError(f"head_dim is {s.head_dim}: GPU attention takes multiples of 4 from 32 to 512")
    if s.num_attention_heads % s.num_key_value_heads:
        raise MlcBuildError(
            f"num_attention_heads is {s.num_attention_heads}, num_key_value_heads {s.num_key_value_heads}: "
            "GPU attention needs a whole number of query heads for each key head"
        )


def _passes(device: Device, structure: Structure, blocks: bool) -> Passes:
    kernels = partial(schedules.schedule, device=device)
    # A model that is there for the vectors of texts writes none, token by token.
    if device.kind != "cuda" or blocks or structure.embedding is not None:
        return Passes(kernels=kernels)
    return Passes(model=graphs.prepare, kernels=kernels, memory=graphs.capture)
