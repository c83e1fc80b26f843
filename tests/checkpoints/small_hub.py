"""A small repository, and what its lock entry is."""

from __future__ import annotations

import hashlib
import json

import pytest

from mlcbuild.checkpoints import hub
from mlcbuild.errors import CheckpointError
from mlcbuild.recipes.types import LockedFile

SECRET = "hf_PlantedTokenThatNobodyMaySee"
CONFIG = {"model_type": "llama", "hidden_size": 8}
FILES = {
    "README.md": b"a card",
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": bytes(range(256)) * 1000,
    "pytorch_model.bin": b"the same in another form",
    "original/model.safetensors": b"in a folder of its own",
}
NEEDED = ["config.json", "tokenizer.json", "model.safetensors"]
WEIGHTS = "model.safetensors"


def info(name: str) -> LockedFile:
    return LockedFile(hashlib.sha256(FILES[name]).hexdigest(), len(FILES[name]))


LOCKED = {name: info(name) for name in NEEDED}


def problem(repo: str = "owner/name", revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        hub.resolve(repo, revision)
    return str(error.value)
