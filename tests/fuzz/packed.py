"""Checkpoints that are quantized already, with config.json, dtypes, shapes and numbers that do not fit each other.

Bytes that are put into a header rarely leave one. Here what the bytes choose is what is wrong with the document.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from mlcbuild.checkpoints.header import BITS, is_number, read_header
from mlcbuild.merging import low_floats, low_ints, prequantized

# For each format a config.json, and tensors: dtype, shape, and what is in them (numbers, or a mapping as JSON).
_STATE = {"blocksize": 8, "shape": [4, 8], "nested_blocksize": 4, "nested_offset": 0.5}
_GROUPS = {"g": {"weights": {"num_bits": 4, "type": "int"}}}
_FUSED = {"config_groups": {"r": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}
FORMATS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": _GROUPS,
                                 "transform_config": _FUSED}},
        {"x.weight_packed": ["I32", [8, 4]], "x.weight_shape": ["I64", [2], [8, 32]],
         "x.weight_scale": ["F16", [8, 2]], "x.weight_zero_point": ["I32", [1, 2]],
         "x.weight_g_idx": ["I32", [32], [0, 1] * 16], "y.weight": ["I8", [4, 4]], "y.weight_scale": ["F32", [4, 1]]},
    ),
    "mlx": (
        {"quantization": {"bits": 4, "group_size": 32, "x": {"bits": 8, "group_size": 16}}},
        {"x.weight": ["U32", [4, 8]], "x.scales": ["F16", [4, 2]], "x.biases": ["F16", [4, 2]],
         "y.weight": ["U32", [2, 4]], "y.scales": ["BF16", [2, 1]], "y.biases": ["BF16", [2, 1]]},
    ),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"x.weight": ["U8", [16, 1]], "x.weight.quant_state.bitsandbytes__nf4": ["U8", [], _STATE],
         "x.weight.quant_map": ["F32", [16]], "x.weight.absmax": ["U8", [4]],
         "x.weight.nested_absmax": ["F32", [1]], "x.weight.nested_quant_map": ["F32", [256]],
         "y.weight": ["I8", [4, 8]], "y.SCB": ["F32", [4]], "y.weight_format": ["U8", [], [0]]},
    ),
    "awq gemv": (
        {"quantization_config": _AWQ},
        {"x.qweight": ["I32", [4, 4]], "x.qzeros": ["I32", [4, 1]], "x.scales": ["F16", [4, 8]]},
    ),
    "awq": (
        {"quantization_config": {**_AWQ, "version": "gemm"}},
        {"x.qweight": ["I32", [16, 2]], "x.qzeros": ["I32", [2, 2]], "x.scales": ["F16", [2, 16]]},
    ),
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 16}},
        {"x.qweight": ["I32", [3, 32]], "x.qzeros": ["I32", [2, 3]], "x.scales": ["F16", [2, 32]],
         "x.g_idx": ["I32", [32], [0, 1] * 16]},
    ),
    "bitnet": (
        {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}},
        {"x_proj.weight": ["U8", [4, 8]], "x_proj.weight_scale": ["F32", [1]]},
    ),
    "bitnet online": (
        {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                 "quantization_mode": "online"}},
        {"x_proj.weight": ["F16", [4, 8]]},
    ),
    "fp8": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}},
        {"x.weight": ["F8_E4M3", [8, 8]], "x.weight_scale_inv": ["F32", [2, 2]]},
    ),
    "mxfp4": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"x_blocks": ["U8", [2, 4, 1, 16]], "x_scales": ["U8", [2, 4, 1]]},
    ),
}  # fmt: skip
_ODD = [None, True, 0, 1, -1, 2, 3, 5, 8, 1 << 40, 1 << 62, 1 << 70, 0.5, float("inf"), "a", "", [], [4], [[1], 2], {},
        {"bits": 2}, *BITS, "gemm", "online", "weight_output", "input"]  # fmt: skip
_MOST = 1 << 16  # bytes of a tensor


def run(name: str, folder: Path, content: bytes) -> None:
    """The format's document with what `content` changes of it; as it is where that is the name itself."""
    whole = content == name.encode()
    random, given = Random(content), FORMATS[name]
    share = random.choice((0.01, 0.03, 0.1))
    config, tensors = given if whole else (_changed(each, random, share) for each in given)
    path = folder / "x.safetensors"
    _write(path, tensors if isinstance(tensors, dict) else {})
    table = {ref.name: ref for ref in read_header(path, path.name)}
    scheme = prequantized.scheme(config) if isinstance(config, dict) else None
    if scheme is None:
        prequantized.check_absent(table)
        made = []
    elif scheme.method in prequantized.METHODS:
        made = [prequantized.numbers(layer) for layer in prequantized.plan(table, scheme)[1].values()]
    elif scheme.method in prequantized.FLOATS_OF:
        made = low_floats.plan(table, scheme)[1]
    else:
        made = low_ints.plan(table, scheme)[1] if scheme.method in prequantized.INTS else []
    assert made or not whole
    for each in made:
        assert sum(piece.nbytes for piece in each.pieces()) == each.target.nbytes
    if scheme is not None:
        assert scheme.told(len(made))


def _changed(value: Any, random: Random, share: float) -> Any:
    """The document, with a share of its values replaced or left out."""
    if random.random() < share:
        return random.choice(_ODD)
    if isinstance(value, dict):
        kept = [name for name in value if random.random() >= share / 2]
        return {name: _changed(value[name], random, share) for name in kept}
    if isinstance(value, list):
        return [_changed(each, random, share) for each in value if random.random() >= share / 2]
    return value


def _write(path: Path, tensors: Mapping[str, Any]) -> None:
    """A file of those tensors that can be one."""
    header, data = dict[str, Any](), b""
    for name, entry in tensors.items():
        dtype, shape, *rest = entry if isinstance(entry, list) and len(entry) in (2, 3) else (None, None)
        held = rest[0] if rest else None
        if isinstance(held, dict):
            text = json.dumps(held).encode()
            dtype, shape = "U8", [len(text)]
        if not isinstance(dtype, str) or dtype not in BITS or not isinstance(shape, list):
            continue
        if not all(map(is_number, shape)) or prod(shape) * BITS[dtype] > 8 * _MOST or prod(shape) * BITS[dtype] % 8:
            continue
        size = prod(shape) * BITS[dtype] // 8
        if isinstance(held, list):
            fitting = [n for n in held if is_number(n) and n < 1 << BITS[dtype]]
            text = b"".join(n.to_bytes(max(1, BITS[dtype] // 8), "little") for n in fitting)
        elif not isinstance(held, dict):
            text = b"\1" * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += text[:size].ljust(size, b"\0")
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
