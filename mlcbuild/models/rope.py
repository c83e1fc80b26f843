"""Rotary frequencies, for every kind of scaling that an architecture names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.structure import Structure

Frequencies = npt.NDArray[np.float32]


def inverse_frequencies(structure: Structure) -> Frequencies:
    """float32 [head_dim / 2]: position times entry d is the angle that turns dimensions d and d + head_dim / 2.

    Su et al., arXiv 2104.09864; computed in float32 step by step, as transformers does, so that both turn alike.
    """
    exponents = np.arange(0, structure.head_dim, 2, dtype=np.float32) / np.float32(structure.head_dim)
    plain = (np.float32(1.0) / np.float32(structure.rope_theta) ** exponents).astype(np.float32)
    scaling = structure.rope_scaling
    if scaling is None:
        return plain
    return _SCALINGS[scaling["rope_type"]](plain, scaling)


def _llama3(frequencies: Frequencies, scaling: Mapping[str, Any]) -> Frequencies:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended.

    Source: transformers modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    try:
        factor, low, high = (float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(scaling["original_max_position_embeddings"])
    except KeyError as missing:
        raise MlcBuildError(f"config.json: rope scaling `llama3` needs the key {missing}") from None
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelength > context / low, frequencies / factor, blended)
    return np.where(wavelength < context / high, frequencies, scaled).astype(np.float32)


_SCALINGS: dict[str, Callable[[Frequencies, Mapping[str, Any]], Frequencies]] = {"llama3": _llama3}
