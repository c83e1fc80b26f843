"""A library's module put together, for any kind of device: the decoder, what runtimes call beside it, the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm import IRModule, relax

from mlcbuild.compiler import canonical, pipeline
from mlcbuild.compiler.abi import auxiliary, metadata, rnn_state
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.decoder import Decoder
from mlcbuild.models.kinds import DECODER, ENCODER, RECURRENT
from mlcbuild.models.operations import Operations
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Declared
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes.types import Quantization

if TYPE_CHECKING:
    from mlcbuild.models.encoder import Attend
    from mlcbuild.models.recurrent.operations import Recurrence


@dataclass(frozen=True)
class Backend:
    """What differs between kinds of devices.

    operations      the decoder's operations, emitting into a builder
    emit_kv_cache   adds `create_tir_paged_kv_cache`
    logits          the functions that change logits in place, by their names
    recurrence      the operations of recurrent models, None where there are none yet
    attend          the attention of encoders, likewise
    emit_more       adds what only this kind of device has: samplers on GPUs
    passes          the compiler passes of this kind of device
    as_written      whether kernels of the contract run as they are written, or are scheduled by `passes`
    """

    operations: Callable[[relax.BlockBuilder, str], Operations]
    emit_kv_cache: Callable[[relax.BlockBuilder, Structure, str], None]
    logits: Callable[[], Mapping[str, Any]]
    recurrence: Callable[[relax.BlockBuilder, str], Recurrence] | None = None
    attend: Callable[[relax.BlockBuilder, str], Attend] | None = None
    emit_more: Callable[[relax.BlockBuilder], None] = lambda builder: None
    passes: pipeline.Passes = field(default_factory=pipeline.Passes)
    as_written: bool = True


def assemble(
    structure: Structure,
    declared: Sequence[Declared],
    name: str,
    dtype: str,
    backend: Backend,
    dump: Path | None = None,
) -> IRModule:
    """The scheduled module of `structure` with the parameters `declared`, called `name` in its metadata.

    `dtype` is the model dtype. The current TVM target is the device. Raises MlcBuildError for a kind of model that the
    device has no operations for.
    """
    builder = relax.BlockBuilder()
    ops = backend.operations(builder, dtype)
    decoder = Decoder(builder, structure, declared, ops, dtype)
    _emit_model(decoder, backend)
    if structure.kind != ENCODER:  # whose caller has nothing to sample
        auxiliary.emit(builder, ops, structure.prefill_chunk_size, structure.hidden_size, dtype, backend.as_written)
        for symbol, function in backend.logits().items():
            builder.add_func(function.with_attr("global_symbol", symbol), symbol)
        backend.emit_more(builder)
    facts = metadata.describe(structure, name, declared)
    return pipeline.optimise(builder.finalize(), structure, facts, dump, backend.passes)


def _emit_model(d: Decoder, backend: Backend) -> None:
    """Add the model's own functions, and the one that creates its state where it has any.

    A kind of model is imported where it is compiled.
    """
    kind = d.structure.kind
    if kind == DECODER:
        from mlcbuild.models.entry_points import emit_decoder

        emit_decoder(d)
        backend.emit_kv_cache(d.builder, d.structure, d.dtype)
    elif kind == ENCODER and backend.attend is not None:
        from mlcbuild.models.encoder import emit_encoder

        emit_encoder(d, backend.attend(d.builder, d.dtype))
    elif kind in RECURRENT and backend.recurrence is not None:
        from mlcbuild.models.recurrent.layers import slots
        from mlcbuild.models.recurrent.model import emit_recurrent

        emit_recurrent(d, backend.recurrence(d.builder, d.dtype))
        rnn_state.emit_create(d.builder, d.structure.num_hidden_layers, slots(d.structure))
    else:
        raise MlcBuildError(
            f"architecture {d.structure.model_type}: models of kind `{kind}` are compiled for CPUs only; "
            "choose a target such as cpu"
        )


def declare(structure: Structure, quantization: Quantization) -> tuple[Declared, ...]:
    """The parameters of the library, in the order in which it takes them."""
    # The vocabulary stays symbolic: its size is in no shape of the module, so that variants share the library.
    known = {p.name: p for p in parameters(replace(structure, vocab_size=1))}
    return tuple(
        Declared(p.name, p.shape, p.dtype, known[p.source].role, known[p.source].layer, p.weights, p.rows_axis)
        for p in quantized_parameters(tuple(known.values()), quantization)
    )


def save(module: IRModule, path: Path) -> None:
    path.write_text(canonical.to_text(module))
