"""Structure and quantization in, a scheduled module for a GPU out: what the step `lower` does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tvm import IRModule, target

from mlcbuild.compiler.assemble import Backend, assemble, declare
from mlcbuild.compiler.gpu import graphs, kv_cache, logits, sampling, schedules
from mlcbuild.compiler.gpu.device import Device, device_of
from mlcbuild.compiler.gpu.operations import operations
from mlcbuild.compiler.pipeline import Passes
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.kinds import DECODER
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import Quantization

_NARROW = ("uint8", "uint16")
_NO_BFLOAT16 = ("metal", "opencl", "vulkan", "webgpu")


def lower(
    structure: Structure,
    quantization: Quantization,
    name: str,
    target_of: Mapping[str, Any],
    dump: Path | None = None,
    activation_bits: int | None = None,
    pieces: bool = False,
) -> IRModule:
    """The library of `structure` in `quantization` (called `name` in its metadata) for a GPU's TVM target.

    `activation_bits` is for CPUs, and so are libraries of `pieces`. Raises MlcBuildError for a structure or a format
    that GPU kernels do not have.
    """
    assert not pieces, "nothing asks a GPU for them"
    device = device_of(target_of)
    if structure.kind == DECODER:
        kv_cache.check(structure)
    if quantization.model_dtype == "bfloat16" and device.kind in _NO_BFLOAT16:
        raise MlcBuildError(
            f"quantization {name}: its model dtype is bfloat16, which {device.kind} does not have; "
            "use a float16 or float32 format for this target"
        )
    declared = declare(structure, quantization)
    narrow = next((p for p in declared if p.dtype in _NARROW), None)
    if device.kind == "webgpu" and narrow is not None:
        raise MlcBuildError(
            f"quantization {name}: {narrow.name} is {narrow.dtype}, which WGSL does not have; "
            "use a format with storage_dtype uint32 for this target"
        )
    backend = Backend(
        operations=partial(operations, device=device),
        emit_kv_cache=kv_cache.emit_create,
        logits=partial(logits.functions, min(device.threads, 256)),
        emit_more=partial(sampling.emit, threads=min(device.threads, 256), drafts_too=device.kind != "webgpu"),
        passes=_passes(device),
        as_written=False,
    )
    with target.Target(dict(target_of)):
        return assemble(structure, declared, name, quantization.model_dtype, backend, dump)


def _passes(device: Device) -> Passes:
    kernels = partial(schedules.schedule, device=device)
    if device.kind != "cuda":
        return Passes(kernels=kernels)
    return Passes(model=graphs.prepare, kernels=kernels, memory=graphs.capture)
