"""A random checkpoint of a model's own architecture and shape: two layers (of a hybrid, one of each kind), a vocabulary
of bytes, bfloat16.

For a quantization that is only read from AutoAWQ's checkpoints, its layers are packed like theirs. It lies in a folder
named by the digest of what decides its content, so that the same one is made once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from mlcbuild.cache.tree import digest_json
from mlcbuild.models.architecture import resolve
from mlcbuild.models.fields import keys, names_in
from mlcbuild.models.kinds import HYBRID
from mlcbuild.models.parameters import Parameter, parameters
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.types import Architecture

VERSION = 1  # of the numbers: raise it when they change
VOCABULARY = 512
# Keys of config.json: a letter for each layer; how many layers read the keys of others.
_PATTERN, _BORROWING = "hybrid_override_pattern", "num_kv_shared_layers"
_SEPARATOR = "<|endoftext|>"
_PERIOD = 1_000_003  # random numbers; a prime, so that no two rows of a matrix are alike
_BYTES = {"BF16": 2, "F16": 2, "I32": 4}
# Of BitNet's matrices: the structure follows from it, and random ones are rounded to three values at convert.
_BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
_AWQ_PER_WORD, _AWQ_DEVIATION = 8, 6.5  # of a random code from a random zero point

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def small_config(config: Mapping[str, Any], architecture: Architecture, awq_group: int | None = None) -> dict[str, Any]:
    """`config.json` of the small model: the same but for layers, vocabulary, and what the tokens mean.

    `awq_group` is the size of AWQ's groups, for a checkpoint that is packed.
    """
    small = {name: value for name, value in config.items() if name not in ("quantization_config", "quantization")}
    whole = resolve(architecture, config, {})
    kept = _kept(whole)
    for field, size in (("num_hidden_layers", len(kept)), ("vocab_size", VOCABULARY)):
        for key in keys(architecture.data["config"][field]):
            if key in small:
                small[key] = size
    for name in names_in(architecture.data["config"]["num_hidden_layers"].get("value")):  # of pairs
        for key in keys(architecture.data["config"].get(name, {})):
            small |= {key: 1} if type(small.get(key)) is int else {}
    for name, value in small.items():
        if (isinstance(value, list) or name == _PATTERN) and len(value) == whole.num_hidden_layers:
            some = [value[layer] for layer in kept]
            small[name] = some if isinstance(value, list) else "".join(some)
    small |= {_BORROWING: 0} if _BORROWING in small else {}  # no layer is left to borrow from
    if isinstance(own := small.get("per_layer_config"), Mapping):
        small["per_layer_config"] = {str(kept.index(layer)): each for layer, each in _numbered(own) if layer in kept}
    found = config.get("quantization_config")
    if isinstance(found, Mapping) and found.get("quant_method") == _BITNET["quant_method"]:
        small["quantization_config"] = _BITNET
    if awq_group is not None:
        awq = {"quant_method": "awq", "bits": 4, "group_size": awq_group, "version": "gemm", "zero_point": True}
        small["quantization_config"] = awq
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return {name: _written(value) for name, value in small.items()}


def _numbered(layers: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """What single layers have, by their numbers."""
    return ((int(key), each) for key, each in layers.items() if key.isdecimal())


def _written(value: Any) -> Any:
    """Infinity as transformers 5 writes it, in lists too: JSON has none."""
    if isinstance(value, list | tuple):
        return [_written(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _kept(whole: Structure) -> tuple[int, ...]:
    """The layers that are kept: the first of two types; of a hybrid, the first of each kind."""
    if whole.kind != HYBRID:
        types = [whole.layer_type(layer) for layer in range(whole.num_hidden_layers)]
        return 0, next((layer for layer, kind in enumerate(types) if kind != types[0]), 1)
    kinds = whole.layer_kinds
    firsts = tuple(sorted({kind: kinds.index(kind) for kind in kinds}.values()))
    return firsts if len(firsts) > 1 else (0, 1)


def make(folder: Path, config: Mapping[str, Any], architecture: Architecture, special: Sequence[str]) -> Path:
    """The checkpoint for `config` (a `small_config`) under `folder`, made unless it is there.

    `special` are tokens that its tokenizer has besides bytes. Raises MlcBuildError for a config that the architecture
    cannot express.
    """
    model = resolve(architecture, config, {})
    tensors = list(_tensors(model))
    packed = config.get("quantization_config", {})
    if packed.get("quant_method") == "awq":
        linear = {source for each in parameters(model) if each.role.endswith("_proj") for source in each.sources}
        group = packed["group_size"]
        tensors = [each for tensor in tensors for each in (_packed(tensor, group) if tensor[0] in linear else [tensor])]
    identity = [VERSION, config, special, tensors]
    place = folder / digest_json(identity)
    if place.is_dir():
        return place
    making = folder / f".{place.name}.{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    (making / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (making / "tokenizer.json").write_text(_tokenizer(special))
    with (making / "model.safetensors").open("wb") as file:
        _write(file, tensors, {source: 1 / each.times for each in parameters(model) for source in each.sources})
    try:
        making.rename(place)
    except OSError:  # another process was faster
        shutil.rmtree(making)
    return place


def _tensors(model: Structure) -> Iterator[Tensor]:
    """As a checkpoint has them, each once: what MLC joins is apart, what convert transposes is not yet."""
    seen = set()
    for parameter in parameters(model):
        columns = parameter.shape[-1:] if len(parameter.shape) > 1 else ()
        for source, rows in zip(parameter.sources, _rows(parameter), strict=True):
            shape = parameter.stored if len(parameter.sources) == 1 else (rows, *columns)
            if source not in seen:
                turned = "transpose" in parameter.convert
                shape = (*shape[:-2], *shape[:-3:-1]) if turned else shape
                yield source, "BF16", (prod(shape[:-1]), shape[-1]) if "by_expert" in parameter.convert else shape
            seen.add(source)


def _packed(tensor: Tensor, group: int) -> Iterator[Tensor]:
    """What AutoAWQ makes of a linear layer's matrix."""
    name, _, shape = tensor
    (rows, columns), prefix = shape, name.removesuffix("weight")
    yield f"{prefix}qweight", "I32", (columns, rows // _AWQ_PER_WORD)
    yield f"{prefix}qzeros", "I32", (columns // group, rows // _AWQ_PER_WORD)
    yield f"{prefix}scales", "F16", (columns // group, rows)


def _rows(parameter: Parameter) -> list[int]:
    """The rows of each of the parameter's sources, which for experts are matrices of one of them each."""
    shape = parameter.shape if len(parameter.shape) == 1 else parameter.shape[:-1]
    count, rows = len(parameter.sources), prod(shape)
    if "differential" in parameter.convert:
        return [64] * count  # any length, for all of them
    if parameter.groups is not None and count == 3:
        heads, *widths = parameter.groups
        return [heads * width for width in widths]
    return [rows // count] * (count - 1) + [rows - rows // count * (count - 1)]


def _write(file: BinaryIO, tensors: Sequence[Tensor], vectors: Mapping[str, float]) -> None:
    """A safetensors file: the header's length, the header, numbers. Matrices `[N, K]` have a deviation of K^-1/2.

    `vectors`: the number that each is full of, so that what convert makes of it is 1; 1 of those that are not there.
    """
    import numpy as np

    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + _BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    random = np.random.default_rng(0)
    numbers = random.standard_normal(_PERIOD, np.float32)
    words = random.integers(0, 1 << 32, _PERIOD, np.uint32).tobytes()
    made: dict[Any, bytes] = {}
    position, columns = 0, 1
    for name, dtype, shape in tensors:
        if dtype == "I32":
            columns = shape[0] if name.endswith("qweight") else columns  # qweight comes first
            position = _repeat(file, words, 4, prod(shape), position)
        elif dtype == "F16":
            file.write(np.full(prod(shape), columns**-0.5 / _AWQ_DEVIATION, np.float16).tobytes())
        elif len(shape) == 1:
            file.write(np.float32(vectors.get(name, 1.0)).tobytes()[2:] * shape[0])  # the upper half
        else:
            width = shape[-1]
            if width not in made:
                values = numbers * np.float32(width**-0.5)
                made[width] = values.view(np.uint16)[1::2].tobytes()  # the upper halves
            position = _repeat(file, made[width], 2, prod(shape), position)


def _repeat(file: BinaryIO, numbers: bytes, itemsize: int, count: int, position: int) -> int:
    """Write `count` of the numbers, again from the first after the last; where the next ones begin."""
    view = memoryview(numbers)
    while count:
        now = min(count, _PERIOD - position)
        file.write(view[itemsize * position : itemsize * (position + now)])
        count -= now
        position = (position + now) % _PERIOD
    return position


def _tokenizer(special: Sequence[str]) -> str:
    """tokenizer.json with a token for each byte, and the special ones before them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    first = list(dict.fromkeys([_SEPARATOR, *special]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*first, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in first])
    text: str = tokenizer.to_str()
    return text
