"""The tensors of GGUF files under the names, in the order and in the floats that a Hugging Face checkpoint has."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import PIECE, Computed
from mlcbuild.checkpoints.header import TensorRef, first_of
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.gguf.config import LLAMA3, LONG, SHORT, rules
from mlcbuild.gguf.header import Header, Tensor
from mlcbuild.models.parameters import Parameter

Array = npt.NDArray[Any]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_INTERLEAVED = re.compile(r"\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?$")
_LATENT = re.compile(r"\.(\d+)\.self_attn\.kv_b_proj\.weight$")
_JOINED = re.compile(r"\.(\d+)\.(?:block_sparse_moe|(shared_mlp))\.input_linear\.weight$")
_ENDINGS = (".weight", ".bias")
# Ends of names as a checkpoint has them, and as the converter does before it looks into its table.
_RENAMED = {"_correction_bias": "_correction.bias", ".dt_bias": ".dt_proj.bias", ".expert_bias": ".expert_bias.bias"}
_UNUSED = ("*.attn_rot_embd", "*.rope_freqs.weight", LLAMA3, SHORT, LONG)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file, or one expert's part of it: `ref` has the bytes as they are, `kind` is ggml's type."""

    ref: TensorRef
    kind: Any
    undo: str | None


def sizes(header: Header, paths: Mapping[str, Path]) -> dict[str, int]:
    """The bytes of each tensor.

    Raises CheckpointError for a type that is unknown or not computed, and for a file that is too short.
    """
    from gguf.constants import GGML_QUANT_SIZES

    problems, found = list[str](), dict[str, int]()
    ends = dict[str, tuple[int, str]]()  # of the last tensor of each file
    lengths = {file: path.stat().st_size for file, path in paths.items()}
    for each in header.tensors.values():
        where = f"{each.file}: tensor {each.name}"
        try:
            block, nbytes = GGML_QUANT_SIZES[kind(each)]
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if kind(each) not in computed_kinds():
            problems.append(f"{where}: floats of the type {kind(each).name} are not computed; known are {_known()}")
            continue
        if not each.shape or each.shape[-1] % block:
            problems.append(f"{where}: {kind(each).name} {list(each.shape)}: rows are not whole blocks of {block}")
            continue
        found[each.name] = prod(each.shape) // block * nbytes
        ends[each.file] = max(ends.get(each.file, (0, "")), (each.offset + found[each.name], each.name))
    for file, (end, name) in ends.items():
        if end > lengths[file]:
            end_of_file = f"it ends at byte {end}, the file has {lengths[file]}"
            problems.append(f"{file}: tensor {name}: truncated: {end_of_file}; get it again")
    if problems:
        raise CheckpointError(first_of(problems))
    return found


@functools.cache
def computed_kinds() -> tuple[Any, ...]:
    """The types that `gguf` computes floats of."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    found = []
    for each in GGMLQuantizationType:
        with contextlib.suppress(NotImplementedError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[each][1]), np.uint8), each)
            found.append(each)
    return tuple(found)


def _known() -> str:
    return ", ".join(each.name for each in computed_kinds())


def read(
    header: Header,
    paths: Mapping[str, Path],
    blobs: Mapping[str, str],
    parameters: Sequence[Parameter],
    config: Mapping[str, Any],
) -> tuple[dict[str, TensorRef], list[Computed]]:
    """The table of tensors by the names that the parameters want, and how to make those that are computed.

    `header` is that of all files of the model, whose `paths` and sha256 (`blobs`) these are. Tensors that no parameter
    wants keep their own names. F32, F16 and BF16 stay as they are where nothing is to be undone.
    """
    undo, nbytes = rules(header).get("undo", {}), sizes(header, paths)
    stored = {
        name: _stored(each, paths[each.file], blobs.get(each.file, ""), nbytes[name], undo)
        for name, each in header.tensors.items()
    }
    names = _names(header, parameters)
    table: dict[str, TensorRef] = {}
    made: list[Computed] = []
    used = {name for name in stored if any(fnmatchcase(name, pattern) for pattern in _UNUSED)}
    for parameter in parameters:
        for name in parameter.sources:
            parts = _parts(name, rules(header).get("interleaved", ()), stored)
            if parts and all(part in stored for part in parts):
                make = _key_and_value if "kv_b" in name else _stacked if "input_linear" in name else _joined
                made.append(make(name, [stored[part] for part in parts]))
                table[name] = made[-1].target
                used |= {*parts}
        rest = [name for name in parameter.sources if name not in table]
        sources = {name: found for name in rest if (found := _source(names.get(name), name, stored))}
        used |= {names[name] for name in sources}
        plain = {each.ref.dtype for each in sources.values() if each.undo is None}
        mixed = len(plain) != 1 or any(each.undo for each in sources.values()) or not plain <= FLOATS.keys()
        for name, each in sources.items():
            if mixed and (each.undo or len(plain) > 1 or each.ref.dtype not in FLOATS or len(sources) > 1):
                computed = _computed(name, each, config)
                made.append(computed)
                table[name] = computed.target
            else:
                table[name] = replace(each.ref, name=name)
    return {name: each.ref for name, each in stored.items() if name not in used} | table, made


def kind(tensor: Tensor) -> Any:
    """ggml's type, by gguf's own names. Raises CheckpointError for one that is unknown."""
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: ggml's type {tensor.kind} is unknown; known are {_known()}"
        ) from None


def told(header: Header) -> str | None:
    """What is lost in the file already, by the types of its matrices; None where nothing is."""
    counts = Counter(kind(each).name for each in header.tensors.values() if len(each.shape) > 1)
    lossy = {name: count for name, count in counts.most_common() if name not in FLOATS}
    if not lossy:
        return None
    said = ", ".join(f"{count} of {name}" for name, count in lossy.items())
    return f"{said}: matrices that llama.cpp quantized are dequantized; what was lost then stays lost"


def _stored(tensor: Tensor, path: Path, blob: str, nbytes: int, undo: Mapping[str, str]) -> _Stored:
    short = re.sub(r"^blk\.\d+\.", "", tensor.name)
    how = next((how for pattern, how in undo.items() if fnmatchcase(short, pattern)), None)
    shape = (prod(tensor.shape),) if how in ("flat", "log_flat") else tensor.shape
    shape = (tensor.shape[0], 1, *tensor.shape[1:]) if how == "apart" else shape
    ref = TensorRef(tensor.name, tensor.file, blob, path, tensor.offset, nbytes, kind(tensor).name, shape)
    return _Stored(ref, kind(tensor), {"apart": None, "flat": None, "log_flat": "log"}.get(how or "", how))


def _names(header: Header, parameters: Sequence[Parameter]) -> dict[str, str]:
    """The name in the file of each tensor that a parameter wants, by gguf's own table."""
    from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    layers = header.facts.get(f"{header.architecture}.block_count", 0)
    table = get_tensor_name_map(by_name.get(header.architecture, MODEL_ARCH.LLAMA), layers)
    found = {}
    for wanted in (name for parameter in parameters for name in parameter.sources):
        key = _EXPERT.sub(".experts.", wanted)
        for mine, theirs in _RENAMED.items():
            key = key.removesuffix(mine) + theirs if key.endswith(mine) else key
        begins = (key.removeprefix(each) for each in ("", "transformer.", "model."))
        others = (*begins, *(key.replace(each, ".mlp.") for each in (".block_sparse_moe.", ".feed_forward.")))
        others = (*others, key.replace("backbone.", "model.").replace(".mixer.", ".mlp."))
        name = next((name for each in others if (name := table.get_name(each, _ENDINGS))), None)
        if name is not None:
            # What a checkpoint calls a shared expert is, without others, a plain MLP.
            others = (name, f"{name}.weight", name.replace("_shexp", ""))
            found[wanted] = next((each for each in others if each in header.tensors), name)
    return found


def _source(name: str | None, wanted: str, stored: Mapping[str, _Stored]) -> _Stored | None:
    """The tensor, or where the file has all experts in one, the part of it that is wanted."""
    found = stored.get(name or "")
    expert = _EXPERT.search(wanted)
    if found is None or expert is None or len(found.ref.shape) < 3:
        return found
    number, (count, *shape) = int(expert[1]), found.ref.shape
    if number >= count:
        return None
    size = found.ref.nbytes // count
    ref = replace(found.ref, offset=found.ref.offset + number * size, nbytes=size, shape=tuple(shape))
    return replace(found, ref=ref)


def _parts(name: str, interleaved: Sequence[str], stored: Collection[str]) -> list[str]:
    """The file's tensors that one of latent attention, or of all experts of a layer, is made of; none of another."""
    if latent := _LATENT.search(name):
        return [f"blk.{latent[1]}.attn_{part}_b.weight" for part in "kv"]
    if joined := _JOINED.search(name):
        both = [f"blk.{joined[1]}.ffn_{part}_{'shexp' if joined[2] else 'exps'}.weight" for part in ("gate", "up")]
        return both if both[0] in stored else [each.replace("_shexp", "") for each in both]
    match = _INTERLEAVED.search(name) if interleaved else None
    if match is None:
        return []
    layer, of, bias = match.groups()
    parts = interleaved if of == "gate_up" else ["down"]
    return [f"blk.{layer}.ffn_{part}_exps.{'bias' if bias else 'weight'}" for part in parts]


def _joined(name: str, parts: Sequence[_Stored]) -> Computed:
    count, rows, *inner = parts[0].ref.shape
    shape = (count, *inner, rows * len(parts))
    return Computed(TensorRef(name, "", "", Path(), 0, 4 * prod(shape), "F32", shape), partial(_turns, parts))


def _stacked(name: str, parts: Sequence[_Stored]) -> Computed:
    """The rows of a part after those of the other, of each expert where there are several."""
    *experts, rows, columns = parts[0].ref.shape
    target = TensorRef(name, "", "", Path(), 0, 8 * prod(parts[0].ref.shape), "F32", (*experts, 2 * rows, columns))

    def pieces() -> Iterator[Array]:
        for values in zip(*map(_apart, parts), strict=True):
            yield np.concatenate(values).astype(np.float32, copy=False)[None]

    return Computed(target, pieces if experts else lambda: chain.from_iterable(_pieces(each, {}) for each in parts))


def _key_and_value(name: str, parts: Sequence[_Stored]) -> Computed:
    """kv_b_proj [heads * (K + V), R] of keys [heads, R, K], which stand transposed, and values [heads, V, R]."""
    (heads, rank, key), (_, value, _) = (each.ref.shape for each in parts)
    shape = (heads * (key + value), rank)

    def pieces() -> Iterator[Array]:
        for keys, values in zip(*map(_apart, parts), strict=True):
            yield np.concatenate([keys.T, values]).astype(np.float32, copy=False)

    return Computed(TensorRef(name, "", "", Path(), 0, 4 * prod(shape), "F32", shape), pieces)


def _apart(each: _Stored) -> Iterator[Array]:
    """A tensor's floats by its first axis, an expert or a head at a time."""
    from gguf.quants import dequantize

    count, *shape = each.ref.shape
    for row in MappedFile(each.ref.path).bytes(each.ref.offset, each.ref.nbytes).reshape(count, -1):
        rows = row.reshape(shape[0], -1) if len(shape) > 1 else row.reshape(1, -1)
        values: Array = dequantize(rows, each.kind).reshape(shape)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{each.ref.file}: tensor {each.ref.name}: numbers that are none or infinite")
        yield values


def _turns(parts: Sequence[_Stored]) -> Iterator[Array]:
    """Expert by expert the rows of the parts in turn, as columns: float32 [1, K, N], of biases [1, N]."""
    for values in zip(*map(_apart, parts), strict=True):
        turned = np.stack(values, axis=1).reshape(-1, *values[0].shape[1:])
        yield np.ascontiguousarray(turned.T, dtype=np.float32)[None]


def _computed(name: str, stored: _Stored, config: Mapping[str, Any]) -> Computed:
    shape = stored.ref.shape[::-1] if stored.undo == "transpose" else stored.ref.shape
    target = TensorRef(name, "", "", Path(), 0, 4 * prod(shape), "F32", shape)
    return Computed(target, partial(_pieces, stored, config))


def _pieces(stored: _Stored, config: Mapping[str, Any]) -> Iterator[Array]:
    """Some rows of float32 after the others; of a transposed matrix, all at once."""
    from gguf.quants import dequantize

    ref = stored.ref
    rows = ref.shape[0] if len(ref.shape) > 1 else 1
    content = MappedFile(ref.path).bytes(ref.offset, ref.nbytes).reshape(rows, -1)
    order = _ORDERS[stored.undo](ref, config) if stored.undo in _ORDERS else None
    step = rows if stored.undo == "transpose" else max(1, PIECE // max(1, prod(ref.shape[1:])))
    if order is not None and len(ref.shape) == 1:  # a bias: its values are rows
        yield dequantize(content, stored.kind).reshape(-1)[order].astype(np.float32)
        return
    for start in range(0, rows, step):
        chosen = slice(start, start + step) if order is None else order[start : start + step]
        values: Array = dequantize(np.ascontiguousarray(content[chosen]), stored.kind).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{ref.file}: tensor {ref.name}: numbers that are none or infinite; it is damaged")
        values = values.reshape(-1, *ref.shape[1:]) if len(ref.shape) > 1 else values.reshape(-1)
        if stored.undo == "subtract_one":
            values = values - np.float32(1)
        if stored.undo == "log":
            values = np.log(-values)
        yield np.ascontiguousarray(values.T) if stored.undo == "transpose" else values


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    heads = config.get("num_attention_heads", config.get("n_head"))
    groups = config.get("num_key_value_heads", config.get("num_kv_heads", heads))
    return int(str(heads)), int(str(groups))


def _split_halves(ref: TensorRef, config: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """The file's row for each row of the checkpoint: of a head, 0 2 4 ... 1 3 5 ..."""
    count = _heads(config)["attn_k" in ref.name]
    return np.arange(ref.shape[0]).reshape(count, -1, 2).swapaxes(1, 2).ravel()


def _group_qkv(ref: TensorRef, config: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    heads, groups = _heads(config)
    size = ref.shape[0] // (heads + 2 * groups)
    rows = np.arange(ref.shape[0])
    parts = np.split(rows, [heads * size, (heads + groups) * size])
    return np.concatenate([part.reshape(groups, -1) for part in parts], axis=1).ravel()


_ORDERS: dict[str | None, Callable[[TensorRef, Mapping[str, Any]], npt.NDArray[np.int64]]] = {
    "split_halves": _split_halves,
    "group_qkv": _group_qkv,
}
