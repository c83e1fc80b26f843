"""How a model of texts makes a vector of hidden states, from the files of sentence-transformers in a checkpoint.

`modules.json` lists what follows the transformer: a pooling, whose `config.json` is in a folder of its own, and perhaps
a normalisation to length 1. What is read becomes MLC's `embedding_metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError

_STRATEGIES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # of `pooling_mode`, the newer form


def embedding_metadata(files: Mapping[str, Path], default: Mapping[str, Any]) -> dict[str, Any]:
    """`default`, the architecture's own, with what the checkpoint's files (by name) say in its place.

    Raises MlcBuildError for a module or a pooling that no runtime computes.
    """
    if "modules.json" not in files:
        return dict(default)
    modules = _read(files, "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise MlcBuildError(
            f"modules.json: the module {unknown[0]} follows the transformer, which no MLC runtime computes; remove it "
            "from the list if vectors without it are wanted"
        )
    found = {**default, "normalize": "Normalize" in kinds}
    if "Pooling" in kinds:
        name = f"{modules[kinds.index('Pooling')].get('path', '')}/config.json"
        if name not in files:
            raise MlcBuildError(f"modules.json names {name}, which the checkpoint does not have")
        found["pooling_strategy"] = _strategy(_read(files, name), name)
    return found


def _strategy(config: Mapping[str, Any], name: str) -> str:
    mode = config.get("pooling_mode")
    chosen = (
        [str(mode)] if mode else [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    )
    known = _MODES if mode else _STRATEGIES
    if len(chosen) != 1 or chosen[0] not in known:
        raise MlcBuildError(
            f"{name}: pooling {' and '.join(chosen) or 'none'}; MLC's runtimes pool by one of {', '.join(known)}"
        )
    return known[chosen[0]]


def _read(files: Mapping[str, Path], name: str) -> Any:
    try:
        return json.loads(files[name].read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MlcBuildError(f"{name}: cannot be read as JSON: {error}") from None
