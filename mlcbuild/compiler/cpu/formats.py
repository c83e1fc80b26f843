"""Weight formats of the CPU kernels: what a quantization's `Weights` are called in kernels/linear.c."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlcbuild.compiler.cpu.sources import Source
from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization.schemes import STORAGE_BITS, elements_per_word
from mlcbuild.recipes.types import FEW_BITS, Weights


@dataclass(frozen=True)
class Format:
    """One compilation of linear.c. `name` is part of its symbols, `defines` are its macros."""

    name: str
    defines: tuple[tuple[str, str | int], ...]
    padded_to: int  # columns that packed activations fill up to; the most that any CPU's kernels do
    bits: int = 32  # of a weight's code; 32 where nothing is packed


_MAX_LANES = 16
_WORDS_AT_ONCE = 4  # of a row, whose activations share a scale; at most that in dot_digits.h


def format_of(weights: Weights | None) -> Format:
    """The format of a matrix packed as `weights` say, or of one that is only cast to the model dtype.

    Raises MlcBuildError for a format that the kernels do not have.
    """
    if weights is None:
        return Format("dense", (("SCHEME_DENSE", 1),), _MAX_LANES)
    transposed = weights.layout == "KN"
    if weights.scheme == "minmax_outer":
        if not transposed:
            raise MlcBuildError("scheme minmax_outer: the CPU kernels take layout KN only")
        return Format("minmax", (("SCHEME_MINMAX", 1),), _MAX_LANES)
    assert weights.group_size is not None
    if weights.scheme == "awq":
        return Format(f"awq_g{weights.group_size}", (("SCHEME_AWQ", 1), ("GROUP_SIZE", weights.group_size)), _MAX_LANES)
    storage = STORAGE_BITS[weights.storage_dtype]
    kind = "group" if weights.symmetric else "minmax_group"
    return Format(
        f"{kind}{weights.group_size}_int{weights.bits}_{weights.storage_dtype}_{weights.layout.lower()}",
        (
            ("SCHEME_GROUP", 1),
            ("BITS", weights.bits),
            ("WORD_BITS", storage),
            ("GROUP_SIZE", weights.group_size),
            ("TRANSPOSED", int(transposed)),
            ("ASYMMETRIC", int(not weights.symmetric)),
        ),
        _MAX_LANES * _WORDS_AT_ONCE * elements_per_word(weights),
        weights.bits,
    )


def sources(
    formats: Iterable[Format],
    dtype: str,
    files: Sequence[str] = ("attention", "rows"),
    activation_bits: int | None = None,
) -> tuple[Source, ...]:
    """What a library of model dtype `dtype` with weights in `formats` is made from: `files` (without .c), and those.

    `activation_bits` is how precise products with weights of few bits take activations; None: as precise as `dtype`.
    """
    model = ("MODEL", dtype)
    fewer = () if activation_bits is None else (("ACTIVATION_BITS", activation_bits),)
    once = [Source(name, f"{name}.c", (model,)) for name in files]
    linear = [
        Source(
            f"linear_{each.name}",
            "linear.c",
            (model, *(fewer if each.bits <= FEW_BITS else ()), ("FORMAT", each.name), *each.defines),
        )
        for each in sorted(set(formats), key=lambda each: each.name)
    ]
    return (*once, *linear)
