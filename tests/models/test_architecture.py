"""config.json and an architecture file become a structure, or an error that says what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import architecture
from mlcbuild.models.parameters import ignored, parameters
from mlcbuild.models.structure import from_json, from_library_json
from tests.support import llama

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def resolve(changes: dict[str, Any] | None = None, **overrides: int) -> Any:
    config = {key: value for key, value in {**CONFIG, **(changes or {})}.items() if value != "absent"}
    return architecture.resolve(llama.architecture(), config, overrides)


def test_what_the_config_leaves_out_follows_from_the_rest() -> None:
    structure = resolve()
    assert structure.num_key_value_heads == 4 and structure.head_dim == 16
    assert structure.rope_theta == 10000.0 and structure.rope_scaling is None
    assert not structure.tie_word_embeddings
    assert structure.prefill_chunk_size == 2048 and structure.max_batch_size == 128


def test_both_forms_of_rope_settings_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    four = resolve({"rope_theta": 500000.0, "rope_scaling": scaling})
    older = resolve({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **scaling}})
    five = resolve({"rope_parameters": {"rope_theta": 500000.0, **scaling}})
    assert four == five == older
    assert resolve({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}).rope_scaling is None


def test_overrides_are_the_librarys_limits() -> None:
    structure = resolve(context_window_size=768)
    assert structure.context_window_size == 768 and structure.prefill_chunk_size == 768


@pytest.mark.parametrize(
    ("changes", "overrides", "text"),
    [
        ({"hidden_size": "absent"}, {}, "config.json: `hidden_size` is missing"),
        ({"max_position_embeddings": "absent"}, {}, "`max_position_embeddings` or `max_sequence_length` is missing"),
        ({"vocab_size": "320"}, {}, "vocab_size is '320', expected a whole number of at least 1"),
        ({"num_hidden_layers": 0}, {}, "num_hidden_layers is 0, expected a whole number of at least 1"),
        ({"num_key_value_heads": 3}, {}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "tanh"}, {}, "hidden_act is 'tanh', but this architecture computes only 'silu'"),
        ({"rope_interleaved": True}, {}, "rope_interleaved is True, but this architecture computes only False"),
        ({"attention_bias": 1}, {}, "attention_bias is 1, expected true or false"),
        (
            {"rope_scaling": {"type": "spiral", "factor": 4}},
            {},
            "rope scaling `spiral` is not one that this architecture",
        ),
        ({}, {"prefill_chunk_size": 8192}, "prefill_chunk_size 8192 is larger than context_window_size 4096"),
        ({}, {"tensor_parallel_shards": 2}, "tensor_parallel_shards is 2, but only 1 is implemented"),
    ],
)
def test_what_is_wrong_with_a_config(changes: dict[str, Any], overrides: dict[str, int], text: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        resolve(changes, **overrides)
    assert text in str(error.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(MlcBuildError) as error:
        resolve({"hidden_act": "tanh", "intermediate_size": -1, "vocab_size": "absent"})
    assert len(str(error.value).splitlines()) == 3


def test_the_architecture_is_chosen_by_model_type() -> None:
    known = {"llama": llama.architecture()}
    assert architecture.choose(known, CONFIG).name == "llama"
    with pytest.raises(MlcBuildError, match=r"model_type `lama` is an unknown architecture \(did you mean `llama`\?\)"):
        architecture.choose(known, {"model_type": "lama"})
    with pytest.raises(MlcBuildError, match=r"config.json has no `model_type`"):
        architecture.choose(known, {})


def test_a_structure_survives_json() -> None:
    structure = resolve()
    assert from_json(json.loads(json.dumps(structure.to_json()))) == structure


def test_a_librarys_structure_has_no_vocabulary_and_no_checkpoint_names() -> None:
    structure = resolve()
    assert resolve({"vocab_size": 5000}).digest == structure.digest
    assert resolve({"hidden_size": 128}).digest != structure.digest
    library = from_library_json(json.loads(json.dumps(structure.library_json())))
    assert library.digest == structure.digest
    assert [p.name for p in parameters(library)] == [p.name for p in parameters(structure)]


def test_parameters_come_in_mlcs_order_with_their_sources() -> None:
    found = parameters(resolve())
    assert found[0].name == "model.embed_tokens.weight" and found[0].shape == (320, 64)
    qkv = found[1]
    assert qkv.name == "model.layers.0.self_attn.qkv_proj.weight" and qkv.shape == (192, 64) and qkv.layer == 0
    assert qkv.sources == tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    assert [p.name for p in found[-2:]] == ["model.norm.weight", "lm_head.weight"]
    assert found[7].name == "model.layers.1.self_attn.qkv_proj.weight"
    assert len(found) == 1 + 2 * 6 + 2
    assert len(parameters(replace(resolve(), rules=resolve({"tie_word_embeddings": True}).rules))) == len(found) - 1
    assert ignored(resolve())[1] == "model.layers.1.self_attn.rotary_emb.inv_freq"


def test_the_chat_configs_model_config_has_mlcs_keys() -> None:
    config = architecture.model_config(llama.architecture(), resolve(), CONFIG)
    assert list(config)[:4] == ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"]
    assert config["rms_norm_eps"] == 1e-5 and config["position_embedding_base"] == 10000
    assert isinstance(config["position_embedding_base"], int)


def test_a_required_value_may_be_that_of_another_key() -> None:
    """OPT 350m has embeddings of another width."""
    absent = ("intermediate_size", "rms_norm_eps")
    config = {**{k: v for k, v in CONFIG.items() if k not in absent}, "ffn_dim": 96, "word_embed_proj_dim": 64}
    assert architecture.resolve(llama.architecture("opt"), config, {}).position_offset == 2
    with pytest.raises(MlcBuildError, match=r"word_embed_proj_dim is 32, but .* computes only the `hidden_size` of 64"):
        architecture.resolve(llama.architecture("opt"), {**config, "word_embed_proj_dim": 32}, {})
