"""A LoRA adapter as PEFT saves it, read and sorted: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

Both files say which modules are trained, and what PEFT only warns of is refused: a module that the configuration names
and the weights lack. Which options there are: huggingface/peft, src/peft/tuners/lora/config.py (0.21).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.header import TensorRef, read_header
from mlcbuild.checkpoints.mapped import FLOATS
from mlcbuild.checkpoints.torch_files import read_torch
from mlcbuild.errors import POINTER, CheckpointError, pointer
from mlcbuild.models.config import is_above

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first of them counts
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<form>embedding_)?(?P<side>[AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?)?\.weight")
_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
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
    "use_bdlora": (False, None),
    "monteclora_config": (None, {}),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
}
# Initialisations that also subtract from the base's weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
class Parts:
    """Its tensors by module: factors (`A`, `B`, `embedding_A`, `embedding_B`), modules saved whole, and the base's own
    weights of modules with factors, which PEFT saves beside those of embeddings and output matrices."""

    factors: Mapping[str, Mapping[str, TensorRef]]
    saved: Mapping[str, TensorRef]
    copies: Mapping[str, TensorRef]


def read(files: Mapping[str, Path], blobs: Mapping[str, str]) -> Adapter:
    """Raises CheckpointError, each line with `lora` in front, for missing files and for what is not merged."""
    if CONFIG not in files:
        raise CheckpointError(f"lora: {CONFIG} is missing: an adapter in PEFT's format has one")
    content = files[CONFIG].read_bytes()
    if content.startswith(POINTER):
        raise CheckpointError(f"lora: {pointer(CONFIG)}")
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
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


def sort(adapter: Adapter, problems: list[str]) -> Parts:
    """What each tensor is; `problems` are told of those that are none of it, and of trained modules that are absent."""
    factors: dict[str, dict[str, TensorRef]] = {}
    saved: dict[str, TensorRef] = {}
    copies: dict[str, TensorRef] = {}
    for name, ref in adapter.table.items():
        plain = name.removeprefix(_PREFIX)
        if ref.dtype not in FLOATS:
            problems.append(f"{ref.file}: tensor {name}: dtype {ref.dtype}, expected one of {', '.join(FLOATS)}")
        elif match := _FACTOR.fullmatch(plain):
            factors.setdefault(match["module"], {})[(match["form"] or "") + match["side"]] = ref
        elif match := _COPY.fullmatch(plain):
            copies[match["module"]] = ref
        elif "lora_" not in plain and ".original_module." not in plain and (match := _SAVED.fullmatch(plain)):
            saved[match["module"]] = ref
        elif ".original_module." not in plain:
            problems.append(f"{ref.file}: tensor {name} is no factor A or B of a matrix, and only those are merged")
    return Parts(factors, saved, copies)


def absent(adapter: Adapter, parts: Parts, modules: Collection[str]) -> list[str]:
    """Which of the base's `modules` the configuration says are trained, without a tensor of them in the file."""
    trained = {*parts.factors, *parts.saved}
    endings = {ending for name in trained for ending in _endings(name)}
    problems = []
    for key in ("modules_to_save", "target_modules"):
        named = adapter.config.get(key)
        if not isinstance(named, list) or (key == "target_modules" and _narrowed(adapter.config)):
            continue  # a pattern, or `all-linear`
        for target in map(str, named):
            # Experts are one tensor in newer versions of transformers, which PEFT then leaves alone.
            meant = [name for name in modules if f".{name}".endswith(f".{target}") and ".experts." not in name]
            missing = [name for name in meant if name not in endings and trained.isdisjoint(_endings(name))]
            if missing:
                problems.append(
                    f"{CONFIG}: {key} names {target}, but the weights hold nothing of {missing[0]}"
                    + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                    + ": the file is cut short, or belongs to another configuration"
                )
    return problems


def other_base(adapter: Adapter, base: str | None) -> str | None:
    """What is said where the adapter names another repository than `base`, which may be a copy of it."""
    named = adapter.config.get("base_model_name_or_path")
    if base is None or not isinstance(named, str) or not _REPOSITORY.fullmatch(named) or named.lower() == base.lower():
        return None
    return f"{CONFIG} says that the adapter was trained on {named}, and it is laid over {base}: are they the same?"


def _narrowed(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))


def _endings(name: str) -> list[str]:
    """The name, and what is left of it without its first parts."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


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
