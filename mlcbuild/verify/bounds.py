"""Which figures of a language model are good enough, and what is said of those that are not.

Bounds apply to rounded figures (mlcbuild.verify.evaluate). The reference is judged too: it shares tokenizer,
config.json and tensor mapping with the package, so a mistake there leaves no difference between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST_TOKENS = 256  # scored; the mean surprise of fewer says little
_LITTLE = 4  # two bits a token better than order 0: what a model learns of a language first
_BELOW_ROUNDING = 0.0001  # the smallest divergence that figures tell from none
_PLACES = (
    "Package and reference share what is wrong, so look at that: which tensor is which (the architecture's YAML file), "
    "config.json (rope: theta, scaling, pairing), the tokenizer (another model's?)"
)


@dataclass(frozen=True)
class Bounds:
    """Divergences in nats per token; the increase of perplexity as a fraction. At a bound is still good."""

    warn_kl: float
    fail_kl: float
    fail_perplexity_increase: float
    warn_reference_perplexity: float = 0.0
    fail_reference_perplexity: float = 0.0


# docs/verification.md says where the numbers come from. float32 arithmetic has no error that these figures could show.
BOUNDS = {
    "q0f32": Bounds(_BELOW_ROUNDING, 2 * _BELOW_ROUNDING, 0.001),
    "q0": Bounds(0.001, 0.005, 0.005),
    "q8": Bounds(0.003, 0.01, 0.01),
    "q4": Bounds(0.05, 0.12, 0.1),
    "q3": Bounds(0.2, 0.4, 0.35),
}

# By class and model dtype: stock quantizations that lose less, the smallest first (docs/rounding.md has their figures).
FINER = {
    ("q3", "float16"): "`q3f16_1-gptq` loses least in 3.7 bits a number, `q4f16_1-gptq` in 4.5",
    ("q4", "float16"): "`q4f16_1-gptq` loses least in 4.5 bits a number, `q4f16_mixed` has 5 to 8, `q8f16_1` 8.5",
    ("q4", "float32"): "`q4f32_1-calibrated` loses least in 5 bits a number, `q8f32_1` has 9",
    ("q4", "bfloat16"): "`q4bf16_1-calibrated` loses least in 4.5 bits a number, `q0bf16` is unquantized",
    ("q8", "float16"): "`q0f16` is unquantized",
    ("q8", "float32"): "`q0f32` is unquantized",
    ("q0", "float16"): "`q0f32` computes as the reference does",
    ("q0", "bfloat16"): "`q0f32` computes as the reference does",
}

# Where they differ, for models whose weights are not rounded layer by layer.
FINER_BY_ITSELF = {
    ("q3", "float16"): "`q4f16_1` loses less in 4.5 bits a number, `q8f16_1` in 8.5",
    ("q4", "float16"): "`q4f16_mixed` has 5 to 8 bits a number, `q8f16_1` 8.5",
    ("q4", "float32"): "`q8f32_1` has 9 bits a number",
    ("q4", "bfloat16"): "`q0bf16` is unquantized",
}


def bounds(fields: Mapping[str, Any], figures: Mapping[str, float]) -> Bounds:
    """The bounds of a quantization class, with the model's own in their place where `fields` (of verify) has some.

    A model's own bound on the divergence warns of nothing below it: whoever set it knows the model. The reference is to
    be better than a model that knows how often each token comes in the text, and nothing else.
    """
    kind, dtype = fields["class"], fields["model_dtype"]
    common = BOUNDS["q0f32" if (kind, dtype) == ("q0", "float32") else kind]

    def own(name: str, default: float) -> float:
        found = fields.get(name)
        return default if found is None else found

    return Bounds(
        own("kl", common.warn_kl),
        own("kl", common.fail_kl),
        own("perplexity_increase", common.fail_perplexity_increase),
        own("perplexity", round(figures["unigram_perplexity"] / _LITTLE, 1)),
        own("perplexity", figures["unigram_perplexity"]),
    )


def judge(figures: Mapping[str, float], limits: Bounds) -> tuple[str, list[str]]:
    """("passed" | "warned" | "failed", what is beyond which bound), for rounded figures."""
    kl, increase, tokens = figures["kl"], figures["perplexity_increase"], figures["tokens"]
    failures = []
    if tokens < LEAST_TOKENS:
        failures.append(f"the evaluation text gave {tokens} tokens to score, fewer than {LEAST_TOKENS}")
    if _knows_nothing(figures, limits):
        failures.append(
            f"the unquantized model itself has a perplexity of {figures['reference_perplexity']:g}, "
            f"above {limits.fail_reference_perplexity:g}"
        )
    if kl > limits.fail_kl:
        failures.append(f"KL divergence {kl:g} nats per token is above {limits.fail_kl:g}")
    if increase > limits.fail_perplexity_increase:
        failures.append(f"perplexity rises by {increase:.1%}, more than {limits.fail_perplexity_increase:.1%}")
    if failures:
        return "failed", failures
    warnings = []
    if figures["reference_perplexity"] > limits.warn_reference_perplexity:
        warnings.append(
            f"the unquantized model itself has a perplexity of {figures['reference_perplexity']:g}, above "
            f"{limits.warn_reference_perplexity:g}: does it know this kind of text? If it should: {_PLACES}"
        )
    if kl > limits.warn_kl:
        warnings.append(f"KL divergence {kl:g} nats per token is above {limits.warn_kl:g}, where a closer look pays")
    return "warned" if warnings else "passed", warnings


def advice(figures: Mapping[str, float], limits: Bounds, fields: Mapping[str, Any]) -> str:
    """What a user is told of a package that missed a bound; `fields` are verify's."""
    said = (
        f"KL divergence {figures['kl']:g} (at most {limits.fail_kl:g}), "
        f"perplexity {figures['perplexity']:g} against {figures['reference_perplexity']:g} unquantized "
        f"({figures['perplexity_increase']:+.1%}, at most {limits.fail_perplexity_increase:+.1%}), "
        f"same likeliest token {figures['top1_agreement']:.0%}, over {figures['tokens']} tokens.\n"
    )
    if figures["tokens"] < LEAST_TOKENS:
        return f"{said}Name a longer text in the model's YAML file: `verify: {{text: ...}}`"
    if _knows_nothing(figures, limits):
        return (
            f"{said}Knowing only how often each token comes in the text would give a perplexity of "
            f"{figures['unigram_perplexity']:g}. {_PLACES}, the evaluation text (of a kind or language that this "
            "model was not trained for? So short that counting its own tokens tells most of it? Name another: "
            "`verify: {text: ...}`). Where it is right for the model, say so in its YAML file: "
            "`verify: {perplexity: ...}` for the most that the unquantized model may have, `verify: {gate: report}` to "
            "record a miss only"
        )
    key = fields["class"], fields["model_dtype"]
    finer = FINER.get(key) if fields.get("by_layer", True) else FINER_BY_ITSELF.get(key, FINER.get(key))
    return (
        f"{said}Use a finer quantization{f' ({finer})' if finer else ''}, or, where this is right for the model, say "
        "so in its YAML file: `verify: {kl: ...}` for other bounds, `verify: {gate: report}` to record a miss only"
    )


def _knows_nothing(figures: Mapping[str, float], limits: Bounds) -> bool:
    return figures["reference_perplexity"] > limits.fail_reference_perplexity
