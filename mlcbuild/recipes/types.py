"""What the YAML files mean once they are read, checked and resolved.

Everything here is plain data: no file is opened, nothing is computed from a checkpoint. Mappings are never changed
after construction; `data` on some classes is the file's own content, for the parts that only one package understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: exactly one of a local folder, or GGUF file, and a Hugging Face repository."""

    path: Path | None = None  # absolute: resolved against the YAML file that says it
    hf: str | None = None
    revision: str | None = None
    file: str | None = None  # of a repository: a GGUF file's name, or the part of it that says how it is quantized

    @property
    def gguf(self) -> bool:
        """Whether it is in llama.cpp's format."""
        return self.file is not None or (self.path is not None and self.path.suffix == ".gguf")

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        file, revision = (f"{sign}{text}" if text else "" for sign, text in ((":", self.file), ("@", self.revision)))
        return f"hf:{self.hf}{file}{revision}"


@dataclass(frozen=True)
class LockedFile:
    """A file of a repository, as recipes.lock pins it."""

    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Locked:
    """A repository at the commit that is built: its config.json, and the files that a build needs."""

    commit: str
    config: Mapping[str, Any]
    files: Mapping[str, LockedFile]


@dataclass(frozen=True)
class Verify:
    """Bounds of the numerical check; None means the quantization class's own."""

    kl: float | None = None  # nats per token, mean over the evaluation text
    perplexity_increase: float | None = None  # fraction: 0.1 is 10 %
    perplexity: float | None = None  # the unquantized model's own; None: that of knowing only how often tokens come
    gate: Literal["fail", "report"] = "fail"
    text: Path | None = None  # evaluation text; None means the default text that ships with mlcbuild
    cosine: float | None = None  # models of texts: mean cosine to the unquantized model's vectors
    memory: float = 8.0  # GB (10^9 bytes): a model that takes more as float32 is verified layer by layer


@dataclass(frozen=True)
class Weights:
    """How weight matrices `[N out, K in]` are packed (formulas: docs/quantization.md).

    `scheme` says what the codes mean:
    group         neighbours along K share a scale; symmetric: (code - m) * scale, otherwise code * scale + min
    minmax_outer  no groups: (code + 1/2) * scale_in[k] * scale_out[n] + min_in[k] + min_out[n]
    awq           (code - zero) * scale per group, codes packed along N in AutoAWQ's order; read from checkpoints only
    """

    bits: int
    group_size: int  # values along K; 0 where the scheme has no groups
    storage_dtype: str  # of the words that codes are packed into: uint32, uint16, uint8
    layout: Literal["NK", "KN"]  # KN: the packed tensors are transposed
    symmetric: bool
    scheme: Literal["group", "minmax_outer", "awq"] = "group"
    scale_floor: float = 0.0  # symmetric groups: a largest magnitude below this counts as this
    packed_scale_min: Literal["bf16x2"] | None = None  # asymmetric groups: scale (low half) and min in one uint32


@dataclass(frozen=True)
class Quantization:
    """A numeric format: `weights` is None where nothing is quantized."""

    name: str
    kind: str  # the class whose thresholds apply: q0, q3, q4, q8 (YAML key `class`)
    model_dtype: Literal["float16", "float32", "bfloat16"]
    weights: Weights | None = None
    embedding: Literal["quantized", "kept"] = "kept"
    lm_head: Literal["quantized", "kept"] = "kept"
    rounding: Literal["nearest", "mse", "calibrated", "gptq"] = "nearest"
    scheme_version: int = 2  # 1: the bytes of the 2023 tutorials, whose names mean other bytes now
    overrides: tuple[
        tuple[str, Weights | None], ...
    ] = ()  # (pattern, its weights or None: kept); the last match counts
    bits_per_weight: float | None = None  # a budget: of `formats`, each kind of matrix gets what the model needs
    formats: tuple[tuple[str, Weights | None], ...] = ()  # (name of the format, its weights or None: kept)
    format: str = ""  # what runtimes are told: the name of the format whose bytes these are; "" means `name`


CHOICE = "choice.json"  # what libraries and weights of a budget depend on: a format by kind of matrix
FEW_BITS = 4  # products with weights of so many bits, or fewer, may round activations (a target's `activation_bits`)


def has_few_bits(quantization: Quantization) -> bool:
    """Whether some weights are in groups of at most FEW_BITS."""
    every = (quantization.weights, *(weights for _, weights in (*quantization.overrides, *quantization.formats)))
    return any(weights is not None and weights.scheme == "group" and weights.bits <= FEW_BITS for weights in every)


def quantization_json(quantization: Quantization) -> dict[str, Any]:
    """What decides the bytes of quantized weights. No name: two names for one format share everything.

    Of a budget, what is chosen comes on top (mlcbuild.quantization.budget).
    """
    fields = asdict(quantization)
    others = ("name", "format", "kind", "bits_per_weight", "formats")
    return {key: value for key, value in fields.items() if key not in others}


def format_json(quantization: Quantization) -> dict[str, Any]:
    """What decides names, shapes and meaning of the tensors, which is what a library depends on; not the rounding."""
    fields = quantization_json(quantization)
    del fields["rounding"]
    return fields


def quantization_from_json(fields: Mapping[str, Any]) -> Quantization:
    """The quantization with these fields; those that `quantization_json` and `format_json` leave out may be missing."""
    weights = fields.get("weights")
    changed = {
        "weights": Weights(**weights) if weights else None,
        "overrides": tuple(
            (pattern, Weights(**other) if other else None) for pattern, other in fields.get("overrides", ())
        ),
    }
    return Quantization(**{"name": "", "kind": "", **fields, **changed})


@dataclass(frozen=True)
class Linker:
    kind: Literal["zig", "tar", "wasm"]
    target: str = ""  # zig: a target triple, or `native`
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # sonames that the library declares, without their files being here
    imports: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # Windows: DLL -> what is taken from it


def linker_from_json(fields: Mapping[str, Any]) -> Linker:
    """The linker whose `asdict` these are, or a part of it."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Linker(**given)


@dataclass(frozen=True)
class Target:
    """A device, its host, and how the library is linked."""

    name: str
    device: Mapping[str, Any]  # a TVM target; `mcpu: native` is resolved by compiler.targets before anything is keyed
    library: Literal["so", "dylib", "dll", "tar", "wasm"]
    linker: Linker
    executes: str  # which machines can run the library: native, a CPU level such as x86-64-v3, aarch64, or `elsewhere`
    host: Mapping[str, Any] = field(default_factory=dict)  # the CPU that drives a GPU: a TVM target without its kind
    activation_bits: int | None = None  # in a CPU's products with weights of few bits; None: as the model dtype has
    architectures: tuple[str, ...] = ()  # what a GPU library holds machine code for: sm_90, gfx1100


@dataclass(frozen=True)
class Template:
    """A conversation template, field for field MLC's `conv_template`."""

    name: str
    data: Mapping[str, Any]


# No file: worked out from the checkpoint's own chat template once that is here (mlcbuild.chat.derive).
AUTO_TEMPLATE = Template("auto", {})


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
    delta_of: Source | None = None  # the base that `source` is the difference to
    lora: Source | None = None  # an adapter, merged into `source`
    tokenizer_from: Source | None = None  # whose tokenizer's files a GGUF file gets; None: they are made of its own
    calibration: Path | None = (
        None  # text for `rounding: calibrated` and `gptq`; None means the one that ships with mlcbuild
    )

    @property
    def sources(self) -> list[Source]:
        """Every checkpoint that the model is made of, its own first."""
        every = (self.source, self.delta_of, self.lora, self.tokenizer_from)
        return [source for source in every if source is not None]

    @property
    def hub_sources(self) -> list[Source]:
        """Those that are on a hub."""
        return [source for source in self.sources if source.hf is not None]


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
    manual: bool = False  # built only when a selection or a task's name asks for it


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
