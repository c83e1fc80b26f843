"""Checkpoints that are quantized already: what config.json says of it, and those by AutoAWQ or GPTQ.

`scheme` reads all that are known; `plan` is for the two. Instead of `x.weight` these have `x.qweight`, `x.qzeros`,
`x.scales` (and GPTQ `x.g_idx`); each gets its place as an ordinary `x.weight` that is made: dequantized.
mlcbuild.merging.low_floats and low_ints have a `plan` for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, place
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.index import part
from mlcbuild.checkpoints.mapped import FLOATS, MappedFile
from mlcbuild.errors import CheckpointError
from mlcbuild.quantization import awq, floats

METHODS = ("awq", "gptq")
GGUF = "gguf"  # what mlcbuild.gguf.config writes: its tensors say themselves how they are quantized
FLOATS_OF = ("fp8", "mxfp4", "bitnet")  # and numbers of few bits (mlcbuild.merging.low_floats, of ternary)
INTS = ("compressed-tensors", "bitsandbytes", "mlx", "awq_gemv")  # and whole numbers (mlcbuild.merging.low_ints)
_NAMES = {"fbgemm_fp8": "fp8"}  # what else FLOATS_OF are called
_SHOWN = {"awq_gemv": "AWQ", "bitnet": "BitNet"} | {name: name for name in ("bitsandbytes", "compressed-tensors")}
_FUSED = ("weight_input", "weight_output")  # where compressed-tensors' transforms are in the numbers already
_PIECE = 1 << 20  # elements that are dequantized at once


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint was quantized, from `quantization_config` in its config.json."""

    method: str  # of METHODS, FLOATS_OF or INTS
    bits: int
    # awq, awq_gemv, gptq, mlx: columns that a scale is for; -1: all
    group_size: int
    # gptq: what is added to a stored zero point
    zero_offset: int
    # fp8: rows and columns that a scale is for
    block: tuple[int, int] = (128, 128)
    # bitnet: whether the checkpoint has what the matrices are rounded from
    online: bool = False
    # bitnet: whether values are divided by their scale, and not multiplied
    divides: bool = False
    # compressed-tensors: bits that its groups of layers have
    choices: tuple[int, ...] = ()
    # mlx: what single layers have otherwise
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return _SHOWN.get(self.method, self.method.upper())

    @property
    def size(self) -> str:
        """What each number was quantized to."""
        if self.method == "bitnet":
            return "three values"
        own = [each.get("bits") for each in self.layers.values() if isinstance(each, Mapping)]
        every = sorted({self.bits, *self.choices, *(bits for bits in own if type(bits) is int)})
        return f"{' and '.join(map(str, every))} bits"

    def told(self, count: int) -> str:
        """The note about `count` matrices that are made."""
        if self.online:
            return f"{count} matrices are rounded to the three values that {self.title} computes with"
        packed = f"{count} matrices that {self.title} quantized to {self.size}"
        return f"{packed} are dequantized; what was lost then stays lost"


@dataclass(frozen=True)
class Prequantized:
    """One linear layer `name` (`x.weight`), by its tensors; `target` is where its numbers `[N, K]` go."""

    scheme: Scheme
    qweight: TensorRef
    qzeros: TensorRef
    scales: TensorRef
    g_idx: TensorRef | None
    target: TensorRef


def scheme(config: Mapping[str, Any]) -> Scheme | None:
    """None for a checkpoint that is not quantized. Raises CheckpointError for a quantization that is not read."""
    found, mlx = config.get("quantization_config"), config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        return _mlx(mlx)
    if found is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is not a mapping")
    method = found.get("quant_method")
    if method == GGUF:
        return Scheme(GGUF, 0, -1, 0)
    if method == "compressed-tensors":
        return _compressed(found, where)
    if method == "bitnet":
        return _ternary(found, where)
    if method == "bitsandbytes":
        return Scheme(method, 8 if found.get("load_in_8bit") else 4, -1, 0)
    if (kind := _NAMES.get(str(method), method)) in FLOATS_OF:
        return _floats(found.get("weight_block_size"), str(kind), where)
    if method not in METHODS:
        raise CheckpointError(
            f"{where}.quant_method is {method!r}: only {', '.join(METHODS)}, {', '.join(FLOATS_OF)}, "
            "compressed-tensors, bitsandbytes and MLX checkpoints are read; use the model's unquantized checkpoint"
        )
    bits, group_size = found.get("bits", found.get("w_bit")), found.get("group_size", found.get("q_group_size"))
    if type(bits) is not int or bits not in ((4,) if method == "awq" else (2, 3, 4, 8)):
        readable = "4" if method == "awq" else "2, 3, 4 or 8"
        raise CheckpointError(f"{where}.bits is {bits!r}: {method} checkpoints are read with {readable} bits")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise CheckpointError(f"{where}.group_size is {group_size!r}: expected a positive number, or -1")
    version = str(found.get("version", "gemm")).lower()
    if method == "awq" and version not in ("gemm", "gemv"):
        raise CheckpointError(f"{where}.version is {version!r}: only AutoAWQ's gemm and gemv packings are read")
    if version == "gemv":
        return Scheme("awq_gemv", 4, group_size, 0)
    offset = int(method == "gptq" and found.get("checkpoint_format", "gptq") != "gptq_v2")
    return Scheme(method, bits, group_size, offset)


def _compressed(found: Mapping[str, Any], where: str) -> Scheme:
    _check_fused(found.get("transform_config"), f"{where}.transform_config")
    groups = found.get("config_groups")
    given = [each if isinstance(each, dict) else {} for each in groups.values()] if isinstance(groups, dict) else []
    weights = [each["weights"] if isinstance(each.get("weights"), dict) else {} for each in given]
    kinds = [(each.get("type", "int"), each.get("num_bits")) for each in weights]
    if kinds and all(kind == ("float", 8) for kind in kinds):
        return _floats(weights[0].get("block_structure"), "fp8", where)
    if not kinds or any(kind != "int" or type(bits) is not int or not 0 < bits < 9 for kind, bits in kinds):
        raise CheckpointError(
            f"{where}: compressed-tensors has {found.get('format')!r:.40}: only floats of 8 bits, and whole numbers "
            "of up to 8, are read; use the model's unquantized checkpoint"
        )
    choices = tuple(sorted({bits for _, bits in kinds}))
    return Scheme("compressed-tensors", choices[0], -1, 0, choices=choices)


def _check_fused(given: Any, where: str) -> None:
    """Refuse rotations that are computed while the model runs (compressed-tensors, transform_args.py: `is_online`)."""
    if not given:
        return
    try:
        groups = list(given["config_groups"].values())
        found = {str(each["location"]) for group in groups for each in group.get("apply") or ()}
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{where}: not the transforms that compressed-tensors writes") from None
    if online := sorted(found.difference(_FUSED)):
        raise CheckpointError(
            f"{where}: transforms with location {', '.join(online):.80} are computed while the model runs; only those "
            "of weights are read; use the model's unquantized checkpoint"
        )


def _mlx(found: Mapping[str, Any]) -> Scheme:
    bits, group_size, mode = found["bits"], found.get("group_size"), found.get("mode", "affine")
    if mode != "affine" or type(bits) is not int or type(group_size) is not int or group_size < 1:
        raise CheckpointError(
            f"config.json: quantization: MLX has mode {mode!r:.40}, bits {bits!r:.20} and group_size "
            f"{group_size!r:.20}: only its affine groups are read; use the checkpoint that it was made from"
        )
    return Scheme("mlx", bits, group_size, 0, layers=found)


def _floats(block: Any, kind: str, where: str) -> Scheme:
    if block is None:
        return Scheme(kind, 4 if kind == "mxfp4" else 8, -1, 0)
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise CheckpointError(f"{where}.weight_block_size is {block!r}: expected two positive numbers")
    return Scheme(kind, 8, -1, 0, (block[0], block[1]))


def _ternary(found: Mapping[str, Any], where: str) -> Scheme:
    """transformers' quantizer_bitnet.py: what its two classes of layers make of a checkpoint."""
    layers, mode = found.get("linear_class", "bitlinear"), found.get("quantization_mode", "offline")
    if layers not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise CheckpointError(
            f"{where}: linear_class {layers!r} with quantization_mode {mode!r}: only bitlinear and autobitlinear are "
            "read, offline or online"
        )
    if found.get("use_rms_norm"):
        raise CheckpointError(f"{where}.use_rms_norm is true: norms inside of matrices are not computed")
    online = layers == "autobitlinear" and mode == "online"
    return Scheme("bitnet", 2, -1, 0, online=online, divides=layers == "bitlinear")


def check_absent(table: Mapping[str, TensorRef]) -> None:
    """Raises CheckpointError for packed tensors in a checkpoint whose config.json says nothing of them."""
    for name, ref in table.items():
        if name.endswith(".qweight"):
            raise CheckpointError(
                f"{ref.file}: tensor {name}: the checkpoint is quantized, but config.json has no quantization_config; "
                'add one: {"quant_method": "awq" or "gptq", "bits": 4, "group_size": 128}, with the numbers that are '
                "right for it (older tools kept them in quant_config.json or quantize_config.json)"
            )


def plan(table: Mapping[str, TensorRef], scheme: Scheme) -> tuple[dict[str, TensorRef], dict[str, Prequantized]]:
    """The table with an `x.weight` for every `x.qweight`, and how to make those, by their names.

    The new entries are placed in files `tensors-N.bin` that `numbers` fills. Raises CheckpointError with everything
    that is wrong with the packed tensors.
    """
    layers: list[Prequantized] = []
    problems: list[str] = []
    used = set()
    for name, ref in table.items():
        if not name.endswith(".qweight"):
            continue
        prefix = name.removesuffix("qweight")
        tensors = {part: table.get(prefix + part) for part in ("qzeros", "scales", "g_idx")}
        used |= {name, *(prefix + part for part in tensors)}
        found = _layer(prefix, ref, tensors, scheme, problems)
        if found is not None:
            layers.append(found)
    if problems:
        raise CheckpointError("\n".join(problems))
    if not layers:
        raise CheckpointError(
            f"config.json says that the checkpoint was quantized by {scheme.method}, but it has no tensor .qweight"
        )
    placed = {
        each.target.name: replace(layer, target=each.target)
        for layer, each in zip(layers, place(map(numbers, layers)), strict=True)
    }
    plain = {name: ref for name, ref in table.items() if name not in used}
    return plain | {name: layer.target for name, layer in placed.items()}, placed


def numbers(layer: Prequantized) -> Computed:
    """The layer's matrix `[N, K]`. Making it raises CheckpointError for scales or groups that are damaged."""
    return Computed(layer.target, partial(_dequantized, layer))


def joined(layers: Mapping[str, Prequantized], sources: tuple[str, ...]) -> dict[str, Any] | None:
    """`packed` of a parameter in parameters.json: the checkpoint's own AWQ words, where all its sources have them.

    {"scheme": "awq", "bits": 4, "group_size", "tensors": {"qweight": [part, ...], "qzeros": [..], "scales": [..]}}
    """
    found = [layers[source] for source in sources if source in layers]
    if not found or len(found) < len(sources) or found[0].scheme.method != "awq":
        return None
    forms = ("qweight", "qzeros", "scales")
    tensors = {form: [_typed_part(getattr(layer, form)) for layer in found] for form in forms}
    scheme = found[0].scheme
    return {"scheme": "awq", "bits": scheme.bits, "group_size": scheme.group_size, "tensors": tensors}


def _typed_part(ref: TensorRef) -> dict[str, Any]:
    return {**part(ref), "dtype": FLOATS[ref.dtype][0] if ref.dtype in FLOATS else "uint32"}


def _layer(
    prefix: str,
    qweight: TensorRef,
    tensors: Mapping[str, TensorRef | None],
    scheme: Scheme,
    problems: list[str],
) -> Prequantized | None:
    """The layer with its target's shape and dtype; a problem for what does not fit together."""
    where = f"{qweight.file}: tensor {qweight.name}"
    qzeros, scales, g_idx = tensors["qzeros"], tensors["scales"], tensors["g_idx"]
    if qzeros is None or scales is None:
        problems.append(f"{where}: there is no {prefix}{'scales' if qzeros else 'qzeros'} beside it")
        return None
    per_word = 32 / scheme.bits
    if any(len(ref.shape) != 2 or not prod(ref.shape) for ref in (qweight, qzeros, scales)):
        problems.append(f"{where}: it, its qzeros and its scales are not all matrices")
        return None
    if scheme.method == "awq":
        k, n = qweight.shape[0], int(qweight.shape[1] * per_word)
    else:
        k, n = int(qweight.shape[0] * per_word), qweight.shape[1]
    groups = 1 if scheme.group_size == -1 else -(-k // scheme.group_size)
    if scheme.method == "awq" and k % groups:
        problems.append(f"{where}: {k} input columns are not whole groups of {scheme.group_size}")
    for ref, shape in ((qzeros, (groups, -(-n * scheme.bits // 32))), (scales, (groups, n))):
        if ref.shape != shape:
            problems.append(
                f"{ref.file}: tensor {ref.name}: shape {list(ref.shape)}, but {list(qweight.shape)} of its qweight in "
                f"groups of {scheme.group_size} make it {list(shape)}"
            )
    integers = [qweight, qzeros] if g_idx is None else [qweight, qzeros, g_idx]
    for ref in integers:
        if ref.dtype not in ("I32", "U32"):
            problems.append(f"{ref.file}: tensor {ref.name}: dtype {ref.dtype}, expected I32")
    if scales.dtype not in FLOATS:
        problems.append(f"{scales.file}: tensor {scales.name}: dtype {scales.dtype}, expected {', '.join(FLOATS)}")
        return None
    if g_idx is not None and g_idx.shape != (k,):
        problems.append(f"{g_idx.file}: tensor {g_idx.name}: shape {list(g_idx.shape)}, expected {[k]}")
    itemsize = FLOATS[scales.dtype][1].itemsize
    target = TensorRef(f"{prefix}weight", "", "", Path(), 0, n * k * itemsize, scales.dtype, (n, k))
    return Prequantized(scheme, qweight, qzeros, scales, g_idx, target)


def _dequantized(layer: Prequantized) -> Iterator[npt.NDArray[Any]]:
    """The matrix `[N, K]` in the scales' dtype, some rows at a time."""
    dtype = FLOATS[layer.scales.dtype][0]
    n, k = layer.target.shape
    per_word = 32 // layer.scheme.bits
    qweight, qzeros = _words(layer.qweight), _words(layer.qzeros)
    scales = floats.widen(_mapped(layer.scales).view(FLOATS[layer.scales.dtype][1]), dtype).reshape(layer.scales.shape)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"{layer.scales.file}: tensor {layer.scales.name}: not finite; the checkpoint is damaged")
    step = max(1, _PIECE // k // per_word) * per_word
    group_of = _groups(layer, k, len(scales))
    zeros = np.empty(0, np.float32)
    if layer.scheme.method == "gptq":
        zeros = awq.unpack_natural(qzeros, layer.scheme.bits)[:, :n] + np.float32(layer.scheme.zero_offset)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        if layer.scheme.method == "awq":
            words = slice(start // per_word, -(-rows.stop // per_word))
            values = awq.dequantize_awq(qweight[:, words], qzeros[:, words], scales[:, rows])
        else:
            values = awq.dequantize_gptq(qweight[:, rows], zeros[:, rows], scales[:, rows], group_of, layer.scheme.bits)
        yield np.ascontiguousarray(floats.cast(np.ascontiguousarray(values), "float32", dtype))


def _groups(layer: Prequantized, k: int, groups: int) -> npt.NDArray[np.int64]:
    """`[K]`: the group of each input column."""
    if layer.g_idx is None:
        size = k if layer.scheme.group_size == -1 else layer.scheme.group_size
        return np.arange(k, dtype=np.int64) // size
    found: npt.NDArray[np.int64] = _mapped(layer.g_idx).view("<i4").astype(np.int64)
    if k and not (found.min() >= 0 and found.max() < groups):
        raise CheckpointError(
            f"{layer.g_idx.file}: tensor {layer.g_idx.name}: names a group outside 0 to {groups - 1}; "
            "the checkpoint is damaged"
        )
    return found


def _mapped(ref: TensorRef) -> npt.NDArray[np.uint8]:
    return MappedFile(ref.path).bytes(ref.offset, ref.nbytes)


def _words(ref: TensorRef) -> npt.NDArray[np.uint32]:
    words: npt.NDArray[np.uint32] = _mapped(ref).view("<u4").reshape(ref.shape)
    return words
