"""Structure and quantization in, a module of a decoder's pieces out (mlcbuild.models.blocks)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm import IRModule, relax, target

from mlcbuild.compiler import pipeline
from mlcbuild.compiler.assemble import declare
from mlcbuild.compiler.contract import metadata
from mlcbuild.compiler.cpu import kv_cache, sources
from mlcbuild.compiler.cpu.operations import operations
from mlcbuild.compiler.lower import check, kernels
from mlcbuild.models.blocks import emit_blocks
from mlcbuild.models.decoder import Decoder
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import Quantization


def lower(
    structure: Structure,
    quantization: Quantization,
    name: str,
    device: Mapping[str, Any],
    dump: Path | None = None,
    activation_bits: int | None = None,
) -> IRModule:
    """The pieces of `structure` in `quantization`, scheduled for the CPU `device`.

    Raises MlcBuildError for a structure that the device's kernels cannot run.
    """
    check(structure)
    structure = structure.one_layer
    declared = declare(structure, quantization)
    dtype = quantization.model_dtype
    builder = relax.BlockBuilder()
    with target.Target(dict(device)):
        emit_blocks(Decoder(builder, structure, declared, operations(builder, dtype), dtype))
        kv_cache.emit_create(builder, structure, dtype)
        facts = metadata.describe(structure, name, declared)
        module = pipeline.optimise(builder.finalize(), structure, facts, dump)
        return sources.attach(module, kernels(declared, dtype, activation_bits=activation_bits))
