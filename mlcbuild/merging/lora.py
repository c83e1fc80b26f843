"""Base + LoRA adapter, as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

    W' = W + scale · B A        A [r, in], B [out, r]; scale = alpha / r, or alpha / sqrt(r) with `use_rslora`
    E' = E + scale · (B A)ᵀ     of an embedding: A [r, tokens], B [dim, r]

(Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; names: huggingface/peft.) With
`fan_in_fan_out` W is stored [in, out] and the product is transposed. A module that was trained as a whole
(`modules_to_save`) takes the place of the base's. Products are summed rank by rank in float32 and not by a matrix
library, whose order of summation depends on the machine: the same inputs shall give the same bytes.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, row_pieces
from mlcbuild.checkpoints.header import TensorRef, read_header
from mlcbuild.checkpoints.mapped import FLOATS, view
from mlcbuild.checkpoints.torch_files import read_torch
from mlcbuild.errors import CheckpointError
from mlcbuild.models.config import is_above
from mlcbuild.quantization import floats

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first of them counts
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<form>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?)?\.weight")
# Keys of the configuration that change the arithmetic in ways that are not merged here, and the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that also subtract from the base's weights


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors and how they are scaled."""

    table: Mapping[str, TensorRef]
    config: Mapping[str, Any]

    def scale(self, module: str) -> float:
        """alpha / r; both can be set for single modules by a pattern that matches the end of their name."""
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        rank = self.rank(module)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))


@dataclass(frozen=True)
class _Product:
    """What is added to one tensor: `scale · left[:, k] right[k, :]`, summed over k.

    `left` [rows, r], `right` [r, columns].
    """

    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]
    scale: float


def read(files: Mapping[str, Path], blobs: Mapping[str, str]) -> Adapter:
    """Raises CheckpointError, each line with `lora` in front, for missing files and for what is not merged."""
    if CONFIG not in files:
        raise CheckpointError(f"lora: {CONFIG} is missing: an adapter in PEFT's format has one")
    try:
        config = json.loads(files[CONFIG].read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"lora: {CONFIG}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"lora: {CONFIG}: expected a mapping")
    problems = _unsupported(config)
    if problems:
        raise CheckpointError("\n".join(f"lora: {CONFIG}: {problem}" for problem in problems))
    name = next((name for name in WEIGHTS if name in files), None)
    if name is None:
        raise CheckpointError(f"lora: no {' and no '.join(WEIGHTS)}")
    reader = read_header if name.endswith(".safetensors") else read_torch
    try:
        refs = reader(files[name], name, blobs.get(name, ""))
    except CheckpointError as error:
        raise CheckpointError("\n".join(f"lora: {line}" for line in str(error).splitlines())) from None
    return Adapter({ref.name: ref for ref in refs}, config)


def merged(adapter: Adapter, base: Mapping[str, TensorRef], needed: Collection[str]) -> list[Computed]:
    """The tensors of `base` that the adapter changes, and how.

    Raises CheckpointError for an adapter that changes a tensor which the model does not have, or one of another
    shape, and for tensors in it that are no LoRA factors and no saved modules.
    """
    factors: dict[str, dict[str, TensorRef]] = {}
    saved: dict[str, TensorRef] = {}
    problems: list[str] = []
    for name, ref in adapter.table.items():
        plain = name.removeprefix(_PREFIX)
        if ref.dtype not in FLOATS:
            problems.append(f"{ref.file}: tensor {name}: dtype {ref.dtype}, expected one of {', '.join(FLOATS)}")
        elif match := _FACTOR.fullmatch(plain):
            factors.setdefault(match["module"], {})[(match["form"] or "") + match["side"]] = ref
        elif "lora_" not in plain and ".original_module." not in plain and (match := _SAVED.fullmatch(plain)):
            saved[match["module"]] = ref
        elif ".original_module." not in plain:
            problems.append(f"{ref.file}: tensor {name} is no factor A or B of a matrix, and only those are merged")
    made: dict[str, Computed] = {}
    for module, parts in factors.items():
        target = _target(module, base, needed, problems)
        if target is not None:
            found = _product(adapter, module, parts, target, problems)
            if found is not None:
                made[target.name] = Computed(target, partial(_sums, target, found))
    for module, ref in saved.items():
        target = _target(module, base, needed, problems)
        if target is None:
            continue
        if target.name in made:
            problems.append(f"{ref.file}: tensor {ref.name}: the module is both trained as a whole and by factors")
        elif target.shape != ref.shape:
            resized = ref.shape[1:] == target.shape[1:]
            problems.append(
                f"{ref.file}: tensor {ref.name}: shape {list(ref.shape)}, the base's {target.name} is "
                f"{list(target.shape)}"
                + ("; the vocabulary was resized: merge with PEFT and save the whole model" if resized else "")
            )
        else:
            made[target.name] = Computed(target, partial(_copies, ref, target.dtype))
    if not made and not problems:
        problems.append("the adapter has no tensors")
    if problems:
        raise CheckpointError("\n".join(f"lora: {problem}" for problem in problems))
    return list(made.values())


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = []
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {kind!r}: only LORA adapters are merged; merge it with PEFT and save the whole model"]
    numbers = {key: config[key] for key in ("r", "lora_alpha") if key in config}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            problems.append(f"{key} is {patterns!r}, expected an object of modules and numbers")
            continue
        numbers |= {f"{key}: {module}": value for module, value in patterns.items()}
        problems += [
            f"{key}: {module!r} is no pattern of a module's name" for module in patterns if not _pattern(module)
        ]
    for key, value in numbers.items():
        if not is_above(0, value) or ("alpha" not in key and not isinstance(value, int)):
            problems.append(f"{key} is {value!r}, expected a {'' if 'alpha' in key else 'whole '}number above 0")
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            problems.append(f"{key} is {config[key]!r}, which is not merged here: merge with PEFT and save the model")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        problems.append(
            f"init_lora_weights is {start!r}, so the adapter belongs to changed base weights: "
            "merge with PEFT and save the model"
        )
    return problems


def _pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def _target(
    module: str, base: Mapping[str, TensorRef], needed: Collection[str], problems: list[str]
) -> TensorRef | None:
    """The base's tensor that the module's weight is, by its whole name or with the family's prefix more or less."""
    name = f"{module}.weight"
    found = [name] if name in needed else [n for n in needed if n.endswith(f".{name}") or name.endswith(f".{n}")]
    if len(found) == 1 and found[0] in base:
        return base[found[0]]
    near = difflib.get_close_matches(name, sorted(needed)[:1000], n=1, cutoff=0.8)
    hint = f"; the model has {near[0]}" if near else ""
    problems.append(f"the adapter changes {name}, which is no tensor of the base that the model uses{hint}")
    return None


def _product(
    adapter: Adapter, module: str, parts: Mapping[str, TensorRef], target: TensorRef, problems: list[str]
) -> _Product | None:
    embedding = any(name.startswith("embedding_") for name in parts)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(parts) != set(names):
        missing = ", ".join(f"lora_{name}" for name in names if name not in parts)
        problems.append(f"the adapter has no {missing or 'single pair of factors'} of {module}")
        return None
    refs = [parts[name] for name in names]
    a, b = (_widened(ref) for ref in refs)
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    if fits:
        # W [out, in] += B A; where W is stored the other way round, Wᵀ [in, out] += Aᵀ Bᵀ.
        turned = embedding or bool(adapter.config.get("fan_in_fan_out"))
        left, right = (a.T, b.T) if turned else (b, a)
        if (left.shape[0], right.shape[1]) == target.shape:
            if a.shape[0] == adapter.rank(module):
                return _Product(np.ascontiguousarray(left), np.ascontiguousarray(right), adapter.scale(module))
            problems.append(
                f"{refs[0].file}: tensor {refs[0].name} has rank {a.shape[0]}, but {CONFIG} says "
                f"{adapter.rank(module)} (r, or rank_pattern), and what is added is scaled by it"
            )
            return None
    shapes = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in refs)
    problems.append(f"{refs[0].file}: {shapes} do not fit {target.name} {list(target.shape)} of the base")
    return None


def _widened(ref: TensorRef) -> npt.NDArray[np.float32]:
    return np.array(floats.widen(np.ascontiguousarray(view(ref)), FLOATS[ref.dtype][0]))


def _sums(target: TensorRef, product: _Product) -> Iterator[npt.NDArray[Any]]:
    weights, dtype = view(target), FLOATS[target.dtype][0]
    scale = np.float32(product.scale)
    for rows in row_pieces(target.shape):
        left = product.left[rows]
        total = np.zeros((len(left), target.shape[1]), np.float32)
        for k in range(left.shape[1]):
            total += left[:, k, None] * product.right[k]
        total *= scale
        total += floats.widen(np.ascontiguousarray(weights[rows]), dtype)
        yield floats.cast(total, "float32", dtype)


def _copies(ref: TensorRef, dtype: str) -> Iterator[npt.NDArray[Any]]:
    values = view(ref)
    for rows in row_pieces(ref.shape):
        yield floats.cast(np.ascontiguousarray(values[rows]), FLOATS[ref.dtype][0], FLOATS[dtype][0])
