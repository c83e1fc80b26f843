"""Structure and quantization in, a scheduled module out: what the step `lower` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm import IRModule, relax, target

from mlcbuild.compiler import canonical, pipeline
from mlcbuild.compiler.contract import auxiliary, logits, metadata
from mlcbuild.compiler.cpu import formats, kv_cache, sources
from mlcbuild.compiler.cpu.operations import operations
from mlcbuild.compiler.cpu.sources import Source
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.decoder import Decoder, emit_decoder, emit_layers
from mlcbuild.models.entry_points import emit_entry_points
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.types import Quantization

_MAX_HEAD_DIM = 512  # MAX_HEAD_DIM and MAX_ROTARY in the CPU kernels


def lower(
    structure: Structure,
    quantization: Quantization,
    name: str,
    device: Mapping[str, Any],
    dump: Path | None = None,
) -> IRModule:
    """The library of `structure` in `quantization` (called `name` in its metadata) for a TVM target `device`.

    Raises MlcBuildError for a structure that the device's kernels cannot run.
    """
    check(structure)
    declared = declare(structure, quantization)
    dtype = quantization.model_dtype
    builder = relax.BlockBuilder()
    with target.Target(dict(device)):
        ops = operations(builder, dtype)
        decoder = Decoder(builder, structure, declared, ops, dtype)
        emit_entry_points(decoder, emit_decoder(decoder, emit_layers(decoder)))
        kv_cache.emit_create(builder, structure, dtype)
        auxiliary.emit(builder, ops, structure.prefill_chunk_size, structure.hidden_size, dtype)
        for symbol, function in logits.functions().items():
            builder.add_func(function.with_attr("global_symbol", symbol), symbol)
        facts = metadata.describe(structure, name, declared)
        module = pipeline.optimise(builder.finalize(), structure, facts, dump)
        return sources.attach(module, kernels(declared, dtype))


def declare(structure: Structure, quantization: Quantization) -> tuple[Declared, ...]:
    """The parameters of the library, in the order in which it takes them."""
    # The vocabulary stays symbolic: its size is in no shape of the module, so that variants share the library.
    known = {p.name: p for p in parameters(replace(structure, vocab_size=1))}
    return tuple(
        Declared(p.name, p.shape, p.dtype, known[p.source].role, known[p.source].layer, p.weights, p.rows_axis)
        for p in quantized_parameters(tuple(known.values()), quantization)
    )


def kernels(declared: Sequence[Declared], dtype: str) -> tuple[Source, ...]:
    """The C sources of a library with these parameters, of model dtype `dtype`."""
    needed = {formats.format_of(p.packing) for p in declared if len(p.shape) > 1}
    return formats.sources(needed, dtype, experts=any(p.role == "router" for p in declared))


def save(module: IRModule, path: Path) -> None:
    path.write_text(canonical.to_text(module))


def check(structure: Structure) -> None:
    if structure.head_dim > _MAX_HEAD_DIM or structure.head_dim % 2:
        raise MlcBuildError(
            f"head_dim is {structure.head_dim}: the CPU kernels take even numbers up to {_MAX_HEAD_DIM}"
        )
