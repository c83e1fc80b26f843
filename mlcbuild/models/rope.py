"""Rotary frequencies, for every kind of scaling that an architecture names.

A library holds one table of frequencies. Two kinds of scaling make the table depend on the length of the text; there
it is the one for the longest text that the library takes, `context_window_size`:

dynamic   texts up to the checkpoint's `max_position_embeddings` are turned by the plain table, and so is every text
          of a library whose window is no longer; a longer window has the table of a text that fills it
longrope  `short_factor` where the window is at most `original_max_position_embeddings`, else `long_factor`

(transformers chooses anew for each call, which leaves keys in its cache that were turned by another table.)

What config.json says is checked before (mlcbuild.models.config).

Sources: Su et al., arXiv 2104.09864; Peng et al., arXiv 2309.00071 (yarn); Ding et al., arXiv 2402.13753 (longrope);
the arithmetic of each is that of transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.models.structure import Structure

Frequencies = npt.NDArray[np.floating[Any]]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Rotary:
    """What is turned: a head's first `dim` dimensions, and then multiplied with `factor`.

    Pairs are (d, d + dim / 2) or, where `neighbours`, (2 d, 2 d + 1).
    """

    dim: int
    neighbours: bool = False
    factor: float = 1.0


NOTHING = Rotary(0)


def rotary(structure: Structure, layer_type: str = "full") -> Rotary:
    factor = 1.0 if _is_local(structure, layer_type) else attention_factor(structure)
    return Rotary(_dim(structure), structure.rope_pairing == "neighbours", factor)


def _is_local(structure: Structure, layer_type: str) -> bool:
    return layer_type == "sliding" and structure.rope_local_theta is not None


def _dim(structure: Structure) -> int:
    if structure.rope == "none":
        return 0
    return structure.head_dim if structure.rotary_dim is None else structure.rotary_dim


def in_cache(structure: Structure) -> bool:
    """Whether the KV cache turns queries and keys: it has one table for all layers, and turns them last."""
    differ = any(name in ("rope_theta", "rotary_dim") for name, _ in structure.by_layer)
    one_table = structure.rope_local_theta is None and structure.rope_layers is None and not differ
    last = not structure.qk_norm_last and "query_scale" not in structure.roles()
    return structure.rope != "none" and one_table and last and not (structure.absorbed or structure.indexer)


def inverse_frequencies(structure: Structure, layer_type: str = "full") -> Frequencies:
    """float32 [rotary_dim / 2]: position times entry d is the angle that turns the d-th pair of dimensions.

    Layers of type `sliding` have their own theta, unscaled, where the structure has `rope_local_theta`. Computed in
    float32 step by step, as transformers does, so that both turn alike. Below 0 where pairs turn backwards.
    """
    frequencies = _forwards(structure, layer_type)
    return -frequencies if structure.rope_backwards else frequencies


def _forwards(structure: Structure, layer_type: str) -> Frequencies:
    if _is_local(structure, layer_type):
        return 1 / _wavelengths(structure, structure.rope_local_theta or 0)
    wavelengths, scaling = _wavelengths(structure, structure.rope_theta), structure.rope_scaling
    if scaling is None or not len(wavelengths):
        return 1 / wavelengths
    return _SCALINGS[scaling["rope_type"]](structure, wavelengths, scaling).astype(np.float32)


def attention_factor(structure: Structure) -> float:
    """What turned dimensions of queries and keys are multiplied with."""
    scaling = structure.rope_scaling or {}
    factor = _FACTORS.get(scaling.get("rope_type", ""))
    return 1.0 if factor is None else factor(scaling)


def latent_factor(structure: Structure) -> float:
    """What scores of latent attention are multiplied with besides: the square of the scale by `mscale_all_dim`."""
    scaling = structure.rope_scaling or {}
    if not structure.kv_lora_rank or not scaling.get("mscale_all_dim"):
        return 1.0
    return _yarn_scale(scaling, float(scaling["mscale_all_dim"])) ** 2


def _wavelengths(structure: Structure, theta: float) -> Frequencies:
    """float32 [rotary_dim / 2]: theta ** (2 d / rotary_dim), the wavelength over 2 pi."""
    dim = _dim(structure)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(max(dim, 1))
    powers: Frequencies = np.float32(theta) ** exponents
    return powers


def _number(scaling: Settings, key: str) -> float:
    return float(scaling[key])


def _length(structure: Structure) -> int:
    """The longest text; a library of single layers says that of its model (mlcbuild.models.few_layers)."""
    length: int = (structure.rope_scaling or {}).get("length", structure.context_window_size)
    return length


def _linear(_: Structure, wavelengths: Frequencies, scaling: Settings) -> Frequencies:
    return (1 / wavelengths) / np.float32(_number(scaling, "factor"))


def _dynamic(structure: Structure, _: Frequencies, scaling: Settings) -> Frequencies:
    """NTK-aware: a longer text has a larger theta."""
    factor, trained = _number(scaling, "factor"), _number(scaling, "max_position_embeddings")
    length, dim = max(_length(structure), trained), _dim(structure)
    theta = structure.rope_theta * (factor * length / trained - (factor - 1)) ** (dim / (dim - 2))
    return 1 / _wavelengths(structure, theta)


def _ntk(structure: Structure, _: Frequencies, scaling: Settings) -> Frequencies:
    """A theta `factor` times as large, and all wavelengths longer by the same (su's kexue.fm/archives/9706): GTE's."""
    factor = _number(scaling, "factor")
    longer = np.float32(factor ** (2 / max(_dim(structure), 1)))
    return (1 / _wavelengths(structure, structure.rope_theta * factor)) / longer


def _proportional(structure: Structure, wavelengths: Frequencies, scaling: Settings) -> Frequencies:
    """The first pairs turn, a part of all; the others stay: Gemma 4's."""
    turning = int(_number(scaling, "partial_rotary_factor") * _dim(structure) // 2)
    frequencies = 1 / wavelengths
    frequencies[turning:] = 0
    return frequencies / np.float32(scaling.get("factor") or 1)


def _alpha(structure: Structure, _: Frequencies, scaling: Settings) -> Frequencies:
    """NTK-aware with a theta that no text's length changes: Hunyuan's."""
    dim = _dim(structure)
    return 1 / _wavelengths(structure, structure.rope_theta * _number(scaling, "alpha") ** (dim / (dim - 2)))


def _llama3(_: Structure, wavelengths: Frequencies, scaling: Settings) -> Frequencies:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    factor, low, high = (_number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = _number(scaling, "original_max_position_embeddings")
    frequencies = 1 / wavelengths
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelength > context / low, frequencies / factor, blended)
    return np.where(wavelength < context / high, frequencies, scaled)


def _yarn(structure: Structure, wavelengths: Frequencies, scaling: Settings) -> Frequencies:
    """Dimensions that turn often are kept, those that turn seldom slowed by `factor`, with a ramp between."""
    factor, context = np.float32(_yarn_factor(scaling)), _number(scaling, "original_max_position_embeddings")
    dim, theta = _dim(structure), structure.rope_theta

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    frequencies: Frequencies = 1 / (factor * wavelengths) * ramp + 1 / wavelengths * (1 - ramp)
    return frequencies


def _longrope(structure: Structure, wavelengths: Frequencies, scaling: Settings) -> Frequencies:
    """Every dimension has its own factor."""
    long = _length(structure) > _number(scaling, "original_max_position_embeddings")
    name = "long_factor" if long else "short_factor"
    factors = np.asarray(scaling[name], np.float32)
    frequencies: Frequencies = 1 / (factors * wavelengths)
    return frequencies


def _yarn_factor(scaling: Settings) -> float:
    if scaling.get("factor") is not None:
        return float(scaling["factor"])
    return _number(scaling, "max_position_embeddings") / _number(scaling, "original_max_position_embeddings")


def _yarn_attention(scaling: Settings) -> float:
    """`attention_factor`, or 0.1 ln(factor) + 1; with `mscale` and `mscale_all_dim`, the quotient of both scales."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        above, below = (_yarn_scale(scaling, float(scaling[key])) for key in ("mscale", "mscale_all_dim"))
        return above / below
    return _yarn_scale(scaling, 1.0)


def _yarn_scale(scaling: Settings, by: float) -> float:
    factor = _yarn_factor(scaling)
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _longrope_attention(scaling: Settings) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = _yarn_factor(scaling)
    context = _number(scaling, "original_max_position_embeddings")
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))


_SCALINGS: dict[str, Callable[[Structure, Frequencies, Settings], Frequencies]] = {
    "linear": _linear,
    "proportional": _proportional,
    "dynamic": _dynamic,
    "alpha": _alpha,
    "ntk": _ntk,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
_FACTORS: dict[str, Callable[[Settings], float]] = {"yarn": _yarn_attention, "longrope": _longrope_attention}
