"""How vectors are made, as sentence-transformers' files say it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlcbuild.chat.checkpoint import embedding_metadata
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.embedding import text_limit

DEFAULT = {"model_type": "encoder", "pooling_strategy": "cls", "normalize": True}
TRANSFORMER = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def read(folder: Path, modules: list[dict[str, Any]], pooling: dict[str, Any] | None) -> dict[str, Any]:
    files = {"modules.json": folder / "modules.json"}
    files["modules.json"].write_text(json.dumps(modules))
    if pooling is not None:
        files["1_Pooling/config.json"] = folder / "pooling.json"
        files["1_Pooling/config.json"].write_text(json.dumps({"word_embedding_dimension": 384, **pooling}))
    return embedding_metadata(files, DEFAULT)


def test_without_the_files_it_is_the_architectures(tmp_path: Path) -> None:
    assert embedding_metadata({"config.json": tmp_path}, DEFAULT) == DEFAULT


@pytest.mark.parametrize(
    ("pooling", "strategy"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_pooling_that_is_chosen(tmp_path: Path, pooling: dict[str, Any], strategy: str) -> None:
    found = read(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], pooling)
    assert found == {"model_type": "encoder", "pooling_strategy": strategy, "normalize": True}
    assert read(tmp_path, [TRANSFORMER, POOLING], pooling)["normalize"] is False


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (
            {"pooling_mode_max_tokens": True},
            "1_Pooling/config.json: pooling pooling_mode_max_tokens; MLC's runtimes pool",
        ),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pooling_mode_cls_token and pooling_mode_mean",
        ),
        ({}, "1_Pooling/config.json: pooling none"),
        (None, "modules.json names 1_Pooling/config.json, which the checkpoint does not have"),
    ],
)
def test_what_no_runtime_computes_is_refused(tmp_path: Path, pooling: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(MlcBuildError, match=message):
        read(tmp_path, [TRANSFORMER, POOLING], pooling)


def test_the_most_tokens_of_a_text(tmp_path: Path) -> None:
    """FAULTS A16: sentence-transformers cuts MiniLM's texts at 256 tokens, though it takes 512."""
    files = {name: tmp_path / name for name in ("modules.json", "sentence_bert_config.json")}
    files["modules.json"].write_text(json.dumps([TRANSFORMER]))
    files["sentence_bert_config.json"].write_text('{"max_seq_length": 256, "do_lower_case": false}')
    found = embedding_metadata(files, DEFAULT)
    assert found == {"model_type": "encoder", "pooling_strategy": "cls", "normalize": False, "max_seq_length": 256}
    metadata = SimpleNamespace(prefill_chunk_size=512, context_window_size=512)
    library: Any = SimpleNamespace(metadata=metadata, has=lambda name: name == "prefill")
    assert text_limit({"embedding_metadata": found}, library) == 256
    assert text_limit({"embedding_metadata": {**found, "max_seq_length": 1024}}, library) == 512
    assert text_limit({}, library) == 512
    files["sentence_bert_config.json"].write_text('{"max_seq_length": "long"}')
    with pytest.raises(MlcBuildError, match=r"sentence_bert_config.json: max_seq_length is 'long', expected a number"):
        embedding_metadata(files, DEFAULT)


def test_a_further_layer_is_refused(tmp_path: Path) -> None:
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    with pytest.raises(MlcBuildError, match="the module Dense follows the transformer, which no MLC runtime computes"):
        read(tmp_path, [TRANSFORMER, POOLING, dense], {"pooling_mode_cls_token": True})
