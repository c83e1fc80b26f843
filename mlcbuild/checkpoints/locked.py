"""Two copies of config.json: what recipes.lock says, which planning reads, and the file at the locked commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlcbuild.errors import CheckpointError

_NAMED = 3  # keys that a message names
_GGUF = {"quant_method": "gguf"}  # of a config.json that follows from a header, by rules that versions add to


def check_config(locked: Mapping[str, Any], pinned: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError where the lock file's `config` of `source` is not what its config.json says."""
    different = [key for key in sorted({*locked, *pinned}) if _said(locked, key) != _said(pinned, key)]
    if different:
        named = "; ".join(
            f"`{key}` is {_said(locked, key):.60}, and {_said(pinned, key):.60} in config.json"
            for key in different[:_NAMED]
        )
        more = f" (and {len(different) - _NAMED} more)" if len(different) > _NAMED else ""
        if pinned.get("quantization_config") == _GGUF:
            raise CheckpointError(
                f"recipes.lock: another version of mlcbuild made the config of {source}, a GGUF file's: {named}{more}; "
                "run `mlcbuild lock --update`"
            )
        raise CheckpointError(
            f"recipes.lock: the config of {source} is not that of the locked commit: {named}{more}; restore "
            "recipes.lock from version control, or run `mlcbuild lock --update`"
        )


def _said(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"
