"""What an architecture file can say, and what is said where a config does not fit any."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import architecture, indexer
from mlcbuild.models.fields import evaluate
from mlcbuild.models.parameters import Parameter, ignored, parameters
from mlcbuild.models.structure import Structure, from_json, from_library_json
from mlcbuild.recipes.types import Architecture
from tests.models.test_architecture import CONFIG
from tests.support import llama

GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 90,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def resolve(name: str, config: dict[str, Any], **overrides: int) -> Structure:
    return architecture.resolve(llama.architecture(name), config, overrides)


def changed(name: str, **parts: Any) -> Architecture:
    """A stock architecture with other parts."""
    found = llama.architecture(name)
    return replace(found, data={**copy.deepcopy(dict(found.data)), **parts})


def roles(structure: Structure) -> dict[str, Parameter]:
    return {each.role: each for each in parameters(structure) if each.layer in (0, None)}


def test_values_of_a_config_are_mapped() -> None:
    assert resolve("gpt2", GPT2).activation == "gelu_tanh"
    assert resolve("gpt2", {**GPT2, "activation_function": "relu"}).activation == "relu"
    with pytest.raises(
        MlcBuildError, match=r"activation_function is 'tanh', but this architecture computes only 'gelu_"
    ):
        resolve("gpt2", {**GPT2, "activation_function": "tanh"})


def test_choices_follow_from_a_config() -> None:
    config = {
        "model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 90,
        "num_attention_heads": 4, "layer_norm_eps": 1e-5, "max_position_embeddings": 128, "rotary_pct": 0.25,
    }  # fmt: skip
    assert resolve("gpt_neox", config).residual == "parallel" and resolve("gpt_neox", config).rotary_dim == 4
    assert resolve("gpt_neox", {**config, "use_parallel_residual": False}).residual == "sequential"
    assert resolve("gpt_neox", {**config, "rotary_emb_base": 5000}).rope_theta == 5000


def test_a_bias_has_its_weights_names_and_order() -> None:
    found = [each.name for each in parameters(resolve("gpt2", GPT2)) if each.layer == 0]
    assert found[2:5] == [f"transformer.h.0.attn.{name}" for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")]
    by_role = roles(resolve("gpt2", GPT2))
    assert by_role["qkv_bias"].shape == (192,) and by_role["qkv_bias"].convert == ()
    assert by_role["qkv_proj"].convert == ("transpose",) and by_role["mlp_norm_bias"].shape == (64,)


def test_a_norm_of_each_head_is_a_tensor_of_each_head() -> None:
    config = {
        "model_type": "stablelm", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 90,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    assert not {"q_norm", "k_norm"} & roles(resolve("stablelm", {**config, "qk_layernorm": False})).keys()
    found = roles(resolve("stablelm", {**config, "qk_layernorm": True}))
    at = "model.layers.0.self_attn.k_layernorm"
    assert found["q_norm"].shape == (4, 16) and len(found["q_norm"].sources) == 4
    assert found["k_norm"].name == f"{at}.weight" and not found["k_norm"].is_matrix
    assert found["k_norm"].sources == (f"{at}.norms.0.weight", f"{at}.norms.1.weight")


def test_a_head_of_its_own_or_the_embedding_again() -> None:
    assert roles(resolve("gpt2", GPT2))["lm_head"].sources == ("transformer.wte.weight",)
    untied = resolve("gpt2", {**GPT2, "tie_word_embeddings": False})
    assert roles(untied)["lm_head"].sources == ("lm_head.weight",)


def test_a_parameter_of_some_layers() -> None:
    bias = {"role": "o_bias", "name": "model.layers.{i}.self_attn.o_proj.bias", "when": "layer % 2 == 1"}
    rules = [*llama.architecture().data["parameters"], bias]
    structure = architecture.resolve(changed("llama", parameters=rules), {**CONFIG, "num_hidden_layers": 4}, {})
    assert [each.layer for each in parameters(structure) if each.role == "o_bias"] == [1, 3]
    assert from_json(structure.to_json()) == structure
    assert from_library_json(structure.library_json()).digest == structure.digest


def test_expressions_compute_and_compare() -> None:
    names = {"num_hidden_layers": 4, "size": 64, "kind": "a"}
    assert evaluate("'x' if kind in ('a', 'b') else 'y'", names) == "x"
    assert evaluate("size ** -0.5", names) == 0.125
    assert evaluate("max(int(size * 0.3), 20) and not size < 3", names) is True
    assert evaluate("each_layer('full' if layer % 2 else 'sliding')", names) == ("sliding", "full", "sliding", "full")


def test_a_key_that_nothing_reads_is_an_error() -> None:
    with pytest.raises(MlcBuildError) as raised:
        resolve("llama", {**CONFIG, "query_scale": 3, "use_cache": True, "_note": 1, "partial_layers": None})
    assert str(raised.value) == (
        "config.json: architecture `llama` does not know the key `query_scale` (3), which may change what the model "
        "computes; if it does not, list it as `harmless` in recipes/architectures/llama.yaml"
    )


def test_an_unknown_architecture_names_the_nearest_and_what_they_do_not_know() -> None:
    known = {name: llama.architecture(name) for name in ("llama", "gpt2", "orion", "qwen3")}
    with pytest.raises(MlcBuildError) as raised:
        architecture.choose(known, {**CONFIG, "model_type": "lama2", "residual_multiplier": 0.5})
    assert "(docs/architectures.md). By the keys of config.json the nearest are:\n" in str(raised.value)
    lines = str(raised.value).splitlines()[1:]
    assert lines[0] == "  llama: does not know `residual_multiplier`" and len(lines) == 3
    with pytest.raises(MlcBuildError, match=r"\n  gpt2: knows every key, which does not say that it"):
        architecture.choose(known, {**GPT2, "model_type": "gpt2000"})
    with pytest.raises(MlcBuildError, match=r"gpt2: misses `n_embd`, `n_layer`"):
        architecture.choose({"gpt2": known["gpt2"]}, {"model_type": "x"})


def test_two_files_for_one_model_type() -> None:
    known = {"llama": llama.architecture(), "other": replace(llama.architecture(), name="other")}
    with pytest.raises(
        MlcBuildError, match=r"model_type `llama` is matched by several architectures: llama, other; name"
    ):
        architecture.choose(known, CONFIG)
    assert architecture.choose(known, CONFIG, "other").name == "other"


def test_a_file_that_leaves_a_choice_open() -> None:
    decoder = {"mlp": "gated", "rope": "full", "activation": "silu"}
    with pytest.raises(
        MlcBuildError, match=r"recipes/architectures/llama\.yaml: neither `config` nor `decoder` says norm"
    ):
        architecture.resolve(changed("llama", decoder=decoder), CONFIG, {})


def test_a_context_beyond_the_learned_positions() -> None:
    with pytest.raises(MlcBuildError, match="context_window_size 256 is larger than the 128 positions"):
        resolve("gpt2", GPT2, context_window_size=256)


def test_a_context_in_which_an_indexer_would_choose() -> None:
    """DeepSeek V3.2 is built for texts of which its indexer chooses every key, or with it for longer ones."""
    config = {**CONFIG, "model_type": "deepseek_v32", "n_routed_experts": 16, "index_topk": 64, "q_lora_rank": 32}
    short = resolve("deepseek_v32", config, context_window_size=64)
    assert not short.indexer and "index_query" not in short.roles()
    long = resolve("deepseek_v32", config)
    assert long.indexer == (64, 64, 128, 0, 0, 0, 1e-6) and "index_query" in long.roles()
    assert long.context_window_size == config["max_position_embeddings"]
    with pytest.raises(
        MlcBuildError, match="index_head_dim is 32, expected one of at least the 64 numbers that are tu"
    ):
        resolve("deepseek_v32", {**config, "index_head_dim": 32})
    with pytest.raises(MlcBuildError, match=r"indexer is .0, 64, 128, .*, expected six whole numbers, three above 0"):
        resolve("deepseek_v32", {**config, "index_topk": 0})
    config["q_lora_rank"] = 0  # what it chooses by
    assert resolve("deepseek_v32", config).context_window_size == 64
    longest = config["max_position_embeddings"]
    assert resolve("deepseek_v32", {**config, "index_topk": 1 << 20}).context_window_size == longest
    with pytest.raises(MlcBuildError) as error:
        resolve("deepseek_v32", config, context_window_size=65)
    assert str(error.value) == (
        "overrides: context_window_size is 65, but the model chooses 64 keys for each token (index_topk): up "
        "to there it chooses all, and attention is computed without it; which it chooses of more is not computed. "
        "Build with a context_window_size of 64 at most"
    )
    with pytest.raises(MlcBuildError, match="index_topk is 0, expected a whole number of at least 1"):
        resolve("deepseek_v32", {**config, "index_topk": 0})


def test_an_indexer_that_kernels_do_not_take() -> None:
    config = {**CONFIG, "model_type": "deepseek_v32", "n_routed_experts": 16, "index_topk": 64, "q_lora_rank": 32}
    structure = resolve("deepseek_v32", config)
    most = replace(structure, indexer=(4096, 64, 512, 0, 0, 0, 1e-6))
    indexer.check(most)
    for keys, width in ((4097, 128), (64, 514)):
        with pytest.raises(MlcBuildError) as error:
            indexer.check(replace(most, indexer=(keys, 64, width, 0, 0, 0, 1e-6)))
        assert str(error.value) == (
            f"its indexer chooses {keys} keys by heads of {width}: kernels choose up to 4096, by heads of up to 512; "
            f"with a context_window_size of at most {keys} it is not needed"
        )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("glm_moe_dsa", {}),
        ("glm_moe_dsa", {"index_topk_freq": 4}),
        ("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 4}),
        ("glm_moe_dsa", {"index_topk_pattern": "FSSFFSFSS"}),
        ("hy_v4", {"rope_interleave": False}),
    ],
)
def test_which_layers_have_an_indexer(name: str, given: dict[str, Any]) -> None:
    """As transformers reads it; the others have the choice of the last one."""
    from transformers import AutoConfig

    config = {**CONFIG, "n_routed_experts": 16, "q_lora_rank": 32, "num_hidden_layers": 9, **given}
    types = AutoConfig.for_model(name, num_hidden_layers=9, **given).indexer_types
    found = resolve(name, {**config, "model_type": name}, context_window_size=4096)
    (rule,) = (rule for rule in found.rules if rule.role == "index_query")
    full = tuple(layer for layer, kind in enumerate(types) if kind == "full")
    assert (rule.layers or tuple(range(9))) == full and found.indexer[5] == (len(full) < 9)
    with pytest.raises(MlcBuildError, match="layer 0 is to attend to what the indexer of an earlier layer chose"):
        resolve(name, {**config, "model_type": name, "indexer_types": ["shared"] * 9}, context_window_size=4096)


def test_the_llama_inside_llama_3_2_vision_shares_the_library_of_one_alone() -> None:
    """Layers 1 and 4 look at images: what is left of five are the checkpoint's 0, 2 and 3."""
    plain = {**CONFIG, "num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": False}
    text = {**plain, "model_type": "mllama_text_model", "num_hidden_layers": 5, "cross_attention_layers": [1, 4]}
    inside = resolve("mllama", {"model_type": "mllama", "text_config": text})
    alone = resolve("llama", {**plain, "num_hidden_layers": 3})
    assert inside.source_layers == (0, 2, 3) and inside.library_json() == alone.library_json()
    assert {name for name in ignored(inside) if ".layers." in name} == {
        f"language_model.model.layers.{layer}.*" for layer in (1, 4)
    }


def test_the_chat_configs_model_config_has_numbers_of_the_config_and_of_ours() -> None:
    config = {"model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 90,
              "rotary_dim": 8, "activation_function": "gelu_new"}  # fmt: skip
    found = architecture.model_config(llama.architecture("gptj"), resolve("gptj", config), config)
    assert found["activation_function"] == "gelu_new" and found["n_inner"] == 256 and found["rotary_dim"] == 8


def test_a14_no_hint_names_an_architecture_that_would_refuse() -> None:
    known = {name: llama.architecture(name) for name in ("llama", "mistral")}
    with pytest.raises(MlcBuildError) as raised:
        architecture.choose(known, {**CONFIG, "model_type": "helium2", "attention_bias": True})
    (line,) = str(raised.value).splitlines()[1:]
    assert line == "  llama: knows every key, which does not say that it computes the same"


def test_a_wrapper_has_the_defaults_of_the_text_model_in_it() -> None:
    """Ministral 3 in mistral3: what its class would fill in is not mistral's."""
    text = {
        **CONFIG,
        "num_key_value_heads": 2,
        "model_type": "ministral3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    scaled = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 64}
    found = resolve("mistral3", {"model_type": "mistral3", "text_config": {**text, "rope_parameters": scaled}})
    assert (found.position_scale, found.position_scale_length) == (0.1, 64)
    with pytest.raises(
        MlcBuildError, match=r"scores grow with the position \(llama_4_scaling_beta\), but rope_parameters"
    ):
        resolve("mistral3", {"model_type": "mistral3", "text_config": text})
    plain = resolve("mistral3", {"model_type": "mistral3", "text_config": {**text, "model_type": "mistral"}})
    assert plain.position_scale is None
    with pytest.raises(MlcBuildError, match="model_type"):
        resolve("mistral3", {"model_type": "mistral3", "text_config": {**text, "model_type": "qwen3"}})
