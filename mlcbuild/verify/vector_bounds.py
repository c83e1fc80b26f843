"""Which figures of a model of texts are good enough, and what is said of those that are not.

As mlcbuild.verify.bounds is for language models. No text says which vectors are right, so of the reference only this
can be judged: that it tells documents apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The mean cosine below which there is a warning, or a failure. At a bound is still good."""

    warn_cosine: float
    fail_cosine: float


# docs/verification.md says where the numbers come from.
BOUNDS = {
    "q0f32": Bounds(0.9999, 0.9999),
    "q0": Bounds(0.9995, 0.999),
    "q8": Bounds(0.999, 0.995),
    "q4": Bounds(0.98, 0.94),
    "q3": Bounds(0.93, 0.8),
}

# Stock quantizations of the next class; rounding by a text is for models that write.
FINER = {
    **{("q3", "float16"): "q4f16_1", ("q4", "float16"): "q8f16_1", ("q4", "float32"): "q8f32_1"},
    **{("q4", "bfloat16"): "q0bf16", ("q8", "float16"): "q0f16", ("q8", "float32"): "q0f32"},
    **{("q0", "float16"): "q0f32", ("q0", "bfloat16"): "q0f32"},
}


def bounds(fields: Mapping[str, Any], figures: Mapping[str, float]) -> Bounds:
    """The bounds of a quantization class, or the model's own (in verify's `fields`), which warns of no more."""
    kind, dtype, cosine = fields["class"], fields["model_dtype"], fields["cosine"]
    if cosine is not None:
        return Bounds(cosine, cosine)
    return BOUNDS["q0f32" if (kind, dtype) == ("q0", "float32") else kind]


def judge(figures: Mapping[str, float], limits: Bounds) -> tuple[str, list[str]]:
    """("passed" | "warned" | "failed", what is beyond which bound), for rounded figures."""
    cosine = figures["cosine"]
    failures = []
    if figures["texts"] < 2:
        failures.append("the evaluation text is one document: nothing tells whether the model knows texts apart")
    elif _all_alike(figures):
        failures.append(f"the unquantized model itself gives all {figures['texts']} texts the same vector")
    if cosine < limits.fail_cosine:
        failures.append(f"cosine {cosine:g} to the unquantized model's vectors is below {limits.fail_cosine:g}")
    if failures:
        return "failed", failures
    if cosine < limits.warn_cosine:
        return "warned", [
            f"cosine {cosine:g} to the unquantized model's vectors is below {limits.warn_cosine:g}, "
            "where a closer look pays"
        ]
    return "passed", []


def advice(figures: Mapping[str, float], limits: Bounds, fields: Mapping[str, Any]) -> str:
    """What a user is told of a package that missed a bound; `fields` are verify's."""
    said = (
        f"Cosine {figures['cosine']:g} (at least {limits.fail_cosine:g}), lowest {figures['lowest_cosine']:g}, "
        f"error of hidden states {figures['hidden_error']:.1%}, "
        f"over {figures['texts']} texts of {figures['tokens']} tokens.\n"
    )
    if figures["texts"] < 2:
        return f"{said}Name a text of several documents in the model's YAML file, with <|endoftext|> between them"
    if _all_alike(figures):
        return (
            f"{said}Package and reference share what is wrong, so look at that: which tensor is which (the "
            "architecture's YAML file), config.json, the tokenizer (another model's?). `verify: {gate: report}` in the "
            "model's YAML file records a miss only"
        )
    finer = FINER.get((fields["class"], fields["model_dtype"]))
    return (
        f"{said}Use a finer quantization{f' (`{finer}`)' if finer else ''}, or, where this is right for the model, say "
        "so in its YAML file: `verify: {cosine: ...}` for another bound, `verify: {gate: report}` to record a miss only"
    )


def _all_alike(figures: Mapping[str, float]) -> bool:
    return figures["likeness"] >= 1
