"""What the YAML files mean once they are read, checked and resolved.

Everything here is plain data: no file is opened, nothing is computed from a checkpoint. Mappings are never changed
after construction; `data` on some classes is the file's own content, for the parts that only one package understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: exactly one of a local folder and a Hugging Face repository."""

    path: Path | None = None  # absolute: resolved against the YAML file that says it
    hf: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return (
            str(self.path)
            if self.path is not None
            else f"hf:{self.hf}" + (f"@{self.revision}" if self.revision else "")
        )


@dataclass(frozen=True)
class Verify:
    """Bounds of the numerical check; None means the quantization class's own."""

    kl: float | None = None  # nats per token, mean over the evaluation text
    perplexity_increase: float | None = None  # fraction: 0.1 is 10 %
    gate: Literal["fail", "report"] = "fail"
    text: Path | None = None  # evaluation text; None means the default text that ships with mlcbuild


@dataclass(frozen=True)
class Weights:
    """Group quantization of weight matrices (formulas: docs/quantization.md)."""

    bits: int
    group_size: int
    storage_dtype: str  # uint32
    layout: Literal["NK", "KN"]
    symmetric: bool


@dataclass(frozen=True)
class Quantization:
    """A numeric format: `weights` is None where nothing is quantized."""

    name: str
    kind: str  # the class whose thresholds apply: q0, q3, q4, q8 (YAML key `class`)
    model_dtype: Literal["float16", "float32", "bfloat16"]
    weights: Weights | None = None
    embedding: Literal["quantized", "kept"] = "kept"
    lm_head: Literal["quantized", "kept"] = "kept"
    rounding: str = "nearest"
    scheme_version: int = 1


def quantization_from_json(fields: Mapping[str, Any]) -> Quantization:
    """The quantization with these fields (`dataclasses.asdict`); the name, which is in no key, may be missing."""
    weights = fields.get("weights")
    return Quantization(**{"name": "", **fields, "weights": Weights(**weights) if weights else None})


@dataclass(frozen=True)
class Linker:
    kind: Literal["zig"]
    target: str  # a zig target triple, or `native`
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # sonames that the library declares, without their files being here


@dataclass(frozen=True)
class Target:
    """A device, its host, and how the library is linked."""

    name: str
    device: Mapping[str, Any]  # a TVM target; `mcpu: native` is resolved by compiler.targets before anything is keyed
    library: Literal["so", "dylib", "dll", "tar", "wasm"]
    linker: Linker
    executes: str  # which machines can run the library: native, or a CPU level such as x86-64-v3
    host: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Template:
    """A conversation template, field for field MLC's `conv_template`."""

    name: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How a `config.json` becomes a decoder, and how its tensors are named (read by mlcbuild.models.architecture)."""

    name: str
    model_type: str  # MLC's name, written into metadata and mlc-chat-config.json
    match: Mapping[str, tuple[str, ...]]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    name: str
    source: Source
    template: str
    architecture: str | None = None  # None: chosen by config.json's model_type
    overrides: Mapping[str, int] = field(default_factory=dict)
    verify: Verify = Verify()


@dataclass(frozen=True)
class Recipe:
    """One model x quantization x target, everything looked up."""

    name: str
    model: Model
    quantization: Quantization
    target: Target
    template: Template
    overrides: Mapping[str, int]  # the model's, then the recipe's own on top
    origin: str  # "recipes/stories-cpu.yaml", or "recipes/matrix/stories.yaml" for a cell
    verify: Verify = Verify()  # likewise: this one counts, not the model's


@dataclass(frozen=True)
class Catalog:
    """Everything that a workspace can build, by name and sorted by name."""

    root: Path
    recipes: Mapping[str, Recipe]
    models: Mapping[str, Model]
    architectures: Mapping[str, Architecture]
    quantizations: Mapping[str, Quantization]
    targets: Mapping[str, Target]
    templates: Mapping[str, Template]
    warnings: tuple[str, ...] = ()  # stock files that the workspace's own take the place of
