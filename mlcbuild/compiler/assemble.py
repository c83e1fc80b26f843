"""A library's module put together, for any kind of device: the decoder, what runtimes call beside it, the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm import IRModule, relax, target, tirx

from mlcbuild.compiler import canonical, pipeline
from mlcbuild.compiler.abi import auxiliary, kv_cache, logits, metadata, rnn_state
from mlcbuild.compiler.operations import Factories, call, operations
from mlcbuild.compiler.script import quick
from mlcbuild.models.decoder import Decoder
from mlcbuild.models.kinds import DECODER, ENCODER, HYBRID
from mlcbuild.models.operations import Expr
from mlcbuild.models.parameters import parameters
from mlcbuild.models.per_layer import width
from mlcbuild.models.rope import Rotary
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

    factories       what makes the kernels of the decoder's operations, for a model dtype
    cache_kernels   those that the KV cache calls, for a structure, a model dtype, a page size and what is turned in it
    recurrence      the operations of recurrent models
    masked          the attention of encoders in TIR, for a number of heads, their width, a model dtype, and how many
                    distances have a bias (mlcbuild.models.encoder)
    threads         of a block, for the kernels of the contract; None: they run as they are written
    emit_more       adds what only this kind of device has: samplers on GPUs
    passes          the compiler passes of this kind of device
    """

    factories: Callable[[str], Factories]
    cache_kernels: Callable[[Structure, str, tirx.Var, Rotary], kv_cache.Kernels]
    recurrence: Callable[[relax.BlockBuilder, str], Recurrence]
    masked: Callable[[int, int, str, int], Any]
    threads: int | None = None
    emit_more: Callable[[relax.BlockBuilder], None] = lambda builder: None
    passes: pipeline.Passes = field(default_factory=pipeline.Passes)


def assemble(
    structure: Structure,
    declared: Sequence[Declared],
    name: str,
    dtype: str,
    device: Mapping[str, Any],
    backend: Backend,
    debug_dump: Path | None = None,
    blocks: bool = False,
) -> IRModule:
    """The scheduled module of `structure` with the parameters `declared`, called `name` in its metadata.

    `dtype` is the model dtype, `device` a TVM target. `blocks`: the module of a model's pieces, with one layer of
    each kind.
    """
    with quick(), target.Target(dict(device)):
        builder = relax.BlockBuilder()
        d = Decoder(builder, structure, declared, operations(builder, dtype, backend.factories(dtype)), dtype)
        if blocks:
            _emit_pieces(d, backend)
        else:
            _emit_model(d, backend)
            _emit_around(d, backend)
        facts = metadata.describe(structure, name, declared)
        return pipeline.optimise(builder.finalize(), structure, facts, debug_dump, backend.passes)


def _emit_pieces(d: Decoder, backend: Backend) -> None:
    if d.structure.kind == ENCODER:
        from mlcbuild.models.encoder_pieces import emit_encoder_pieces

        emit_encoder_pieces(d, _attend(d, backend))
    else:
        from mlcbuild.models.layer_pieces import emit_layer_pieces

        emit_layer_pieces(d)
        kv_cache.emit_create(d.builder, d.structure, d.dtype, backend.cache_kernels)


def _emit_model(d: Decoder, backend: Backend) -> None:
    """Add the model's own functions, and the one that creates its state where it has any.

    A kind of model is imported where it is compiled.
    """
    kind = d.structure.kind
    if kind == DECODER:
        from mlcbuild.models.entry_points import emit_decoder

        emit_decoder(d)
        kv_cache.emit_create(d.builder, d.structure, d.dtype, backend.cache_kernels)
    elif kind == ENCODER:
        from mlcbuild.models.encoder import emit_encoder

        emit_encoder(d, _attend(d, backend))
    elif kind == HYBRID:
        from mlcbuild.models.hybrid.model import emit_hybrid, slots

        emit_hybrid(d, backend.recurrence(d.builder, d.dtype))
        kv_cache.emit_create(d.builder, d.structure, d.dtype, backend.cache_kernels)
        rnn_state.emit_create(d.builder, len(d.structure.keeping), slots(d.structure))
    else:
        from mlcbuild.models.recurrent.model import emit_recurrent, slots

        emit_recurrent(d, backend.recurrence(d.builder, d.dtype))
        rnn_state.emit_create(d.builder, d.structure.num_hidden_layers, slots(d.structure))


def _attend(d: Decoder, backend: Backend) -> Attend:
    """What mlcbuild.models.encoder calls so."""

    def attend(qkv: Expr, mask: Expr, bias: Expr | None, heads: int) -> Expr:
        width = int(qkv.ty.shape[1]) // 3
        function = backend.masked(heads, width // heads, d.dtype, 0 if bias is None else int(bias.ty.shape[1]))
        given = [qkv, mask] if bias is None else [qkv, mask, bias]
        return call(d.builder, function, "attention", given, [qkv.ty.shape[0], width], d.dtype)

    return attend


def _emit_around(d: Decoder, backend: Backend) -> None:
    """Add what engines call beside the model: on logits, and to sample. The caller of an encoder samples nothing."""
    s = d.structure
    if s.kind == ENCODER:
        return
    as_written = backend.threads is None
    auxiliary.emit(d.builder, d.operations, s.prefill_chunk_size, width(s), d.dtype, as_written)
    for symbol, function in logits.functions(backend.threads).items():
        d.builder.add_func(function.with_attr("global_symbol", symbol), symbol)
    backend.emit_more(d.builder)


def declare(structure: Structure, quantization: Quantization) -> tuple[Declared, ...]:
    """The parameters of the library, in the order in which it takes them."""
    # The vocabulary stays symbolic: its size is in no shape of the module, so that variants share the library.
    known = {p.name: p for p in parameters(replace(structure, vocab_size=1))}
    return tuple(
        Declared(p.name, p.shape, p.dtype, of.role, of.layer, p.weights, p.rows_axis, of.users)
        for p in quantized_parameters(tuple(known.values()), quantization)
        for of in [known[p.source]]
    )


def save(module: IRModule, path: Path) -> None:
    path.write_text(canonical.to_text(module))
