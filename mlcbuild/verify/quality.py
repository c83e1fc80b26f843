"""Whether a package is good enough: bounds by quantization class, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_BELOW_ROUNDING = 0.0001  # the smallest divergence that `evaluate.rounded` tells from none


@dataclass(frozen=True)
class Bounds:
    """Divergences in nats per token; the increase of perplexity as a fraction. At a bound is still good."""

    warn_kl: float
    fail_kl: float
    fail_perplexity_increase: float


# docs/quantization.md says where the numbers come from. float32 arithmetic has no error that these figures could show.
BOUNDS = {
    "q0f32": Bounds(_BELOW_ROUNDING, 2 * _BELOW_ROUNDING, 0.001),
    "q0": Bounds(0.001, 0.005, 0.005),
    "q8": Bounds(0.003, 0.01, 0.01),
    "q4": Bounds(0.05, 0.12, 0.1),
    "q3": Bounds(0.2, 0.4, 0.35),
}


def bounds(kind: str, model_dtype: str, kl: float | None = None, perplexity_increase: float | None = None) -> Bounds:
    """The bounds of a quantization class, with the model's own in their place where it has some.

    A model's own bound on the divergence warns of nothing below it: whoever set it knows the model.
    """
    common = BOUNDS["q0f32" if (kind, model_dtype) == ("q0", "float32") else kind]
    return Bounds(
        common.warn_kl if kl is None else kl,
        common.fail_kl if kl is None else kl,
        common.fail_perplexity_increase if perplexity_increase is None else perplexity_increase,
    )


def judge(figures: Mapping[str, float], limits: Bounds) -> tuple[str, list[str]]:
    """("passed" | "warned" | "failed", what is beyond which bound), for rounded figures."""
    kl, increase = figures["kl"], figures["perplexity_increase"]
    failures = []
    if kl > limits.fail_kl:
        failures.append(f"KL divergence {kl:g} nats per token is above {limits.fail_kl:g}")
    if increase > limits.fail_perplexity_increase:
        failures.append(f"perplexity rises by {increase:.1%}, more than {limits.fail_perplexity_increase:.1%}")
    if failures:
        return "failed", failures
    if kl > limits.warn_kl:
        return "warned", [f"KL divergence {kl:g} nats per token is above {limits.warn_kl:g}, where a closer look pays"]
    return "passed", []
