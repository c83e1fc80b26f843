"""A module of a decoder's pieces put together (mlcbuild.models.layer_pieces)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tvm import IRModule, relax

from mlcbuild.compiler import pipeline
from mlcbuild.compiler.abi import metadata
from mlcbuild.compiler.assemble import Backend
from mlcbuild.models.decoder import Decoder
from mlcbuild.models.layer_pieces import emit_layer_pieces
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared


def assemble_blocks(
    structure: Structure,
    declared: Sequence[Declared],
    name: str,
    dtype: str,
    backend: Backend,
    dump: Path | None = None,
) -> IRModule:
    """The same as assemble.assemble, of the pieces of a decoder with one layer of each kind."""
    builder = relax.BlockBuilder()
    emit_layer_pieces(Decoder(builder, structure, declared, backend.operations(builder, dtype), dtype))
    backend.emit_kv_cache(builder, structure, dtype)
    facts = metadata.describe(structure, name, declared)
    return pipeline.optimise(builder.finalize(), structure, facts, dump, backend.passes)
