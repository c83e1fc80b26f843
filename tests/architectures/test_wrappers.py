"""Wrappers: transformers computes the same of a text with one as with the text model alone that we make of it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.mapped import read
from mlcbuild.checkpoints.table import read_table
from mlcbuild.engine.job import local_job
from mlcbuild.models import wrappers
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.steps import convert
from tests.architectures.agreement import IDS, Case, error, known_architectures, reference_logits, save
from tests.architectures.cases import like_llama
from tests.architectures.test_agreement import CASES
from tests.merging.test_rearranged import converted

# A small model of each text type, where CASES has none that will do.
TEXTS = {
    **CASES,
    "qwen3": like_llama("qwen3", head_dim=16),
    "mistral": like_llama("mistral", head_dim=16),
    "hyperclovax": CASES["hyperclovax"],
    "glm4_moe": like_llama(
        "glm4_moe", head_dim=16, moe_intermediate_size=40, num_experts_per_tok=2, n_routed_experts=8,
        attention_bias=True, first_k_dense_replace=1,
    ),
}  # fmt: skip
# Sizes of what sees and hears, small, by the names that configs have for them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "mlp_dim", "encoder_ffn_dim", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 2),
    **{"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_input_size": 32, "adapter_out_dim": 64},
    **{"image_size": 28, "patch_size": 14, "out_hidden_size": 64, "vocab_size": 32, "output_channels": 32},
    **{
        "global_attn_indexes": [0],
        "deepstack_visual_indexes": [0],
        "fullatt_block_indexes": [0],
        "encoder_hidden_size": 32,
    },
}


# What a wrapper's config.json says beside: sizes that are the text model's, too; Apple's own vision needs timm.
BESIDE: dict[str, dict[str, Any]] = {
    "ovis2": {"hidden_size": 64, "vocab_size": 96},
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model", **SMALL}},
}
# What a text_config says because it would mean another thing in the wrapper than alone, if it did not.
SAID: dict[str, dict[str, Any]] = {
    "voxtral": {"head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "glmasr": {"rms_norm_eps": 1e-6},
}
# Those that transformers makes with packages that are not here, or saves under other names: how the hub's names begin.
UNMADE = {"gemma3n": "model.language_model.", "kimi_k25": "language_model.model."}
RENAMED = {"minimax_m3_vl": "language_model.model."}  # saved under names that its text model alone lacks


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*wrappers.known()} - {*UNMADE, *RENAMED}))
def test_a_wrapper_computes_what_its_text_model_does(name: str, tmp_path: Path) -> None:
    case, text = cases_of(name)
    save(case, tmp_path / "wrapper")
    config = json.loads((tmp_path / "wrapper" / "config.json").read_text())
    chosen = choose(known_architectures(), config)
    structure = resolve(chosen, config, {})
    assert structure.wrapped
    table = wrappers.unwrapped(_table(tmp_path / "wrapper"))
    job = local_job({"checkpoint": tmp_path / "wrapper"}, {"structure": structure.to_json()}, tmp_path / "convert")
    convert.run(job)  # no tensor is missing, none too many
    alone = _alone(text, {key: np.array(read(ref)) for key, ref in table.items()}, tmp_path / "alone")
    plain = json.loads((alone / "config.json").read_text())
    assert resolve(choose(known_architectures(), plain), plain, {}).library_json() == structure.library_json()
    expected = reference_logits(case, tmp_path / "wrapper", IDS)
    assert error(reference_logits(text, alone, IDS), expected) < 2e-5 * text.noise


@pytest.mark.slow
@pytest.mark.parametrize("name", RENAMED)
def test_a_wrapper_computes_what_a_text_model_does_that_has_its_weights(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    case, text = cases_of(name)
    save(case, tmp_path / "wrapper")
    save(text, tmp_path / "text")
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path / "wrapper")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path / "alone")
    expected = reference_logits(case, tmp_path / "wrapper", IDS)
    assert error(reference_logits(text, tmp_path / "alone", IDS), expected) < 2e-5 * text.noise
    made = []
    for folder in ("wrapper", "alone"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        structure = resolve(choose(known_architectures(), config), config, {})
        made.append(converted(structure, tmp_path / folder, tmp_path / f"{folder}-made"))
    assert made[0].keys() == made[1].keys() and all((made[0][key] == made[1][key]).all() for key in made[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prefix"), [*UNMADE.items(), *RENAMED.items()])
def test_a_wrapper_of_the_hub_has_the_text_models_tensors(name: str, prefix: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    inner = wrappers.text_type({"model_type": name})
    save(TEXTS[str(inner)], tmp_path / "alone")
    tensors = {key: np.array(read(ref)) for key, ref in _table(tmp_path / "alone").items()}
    plain = json.loads((tmp_path / "alone" / "config.json").read_text())
    head = "language_model." if prefix == "language_model.model." else ""
    named = {
        prefix + key.removeprefix("model.") if "model." in key else head + key: each for key, each in tensors.items()
    }
    named["vision_tower.blocks.0.weight"] = np.zeros((2, 2), np.float32)
    (tmp_path / "wrapper").mkdir()
    save_file(named, tmp_path / "wrapper" / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": name, "text_config": plain, "vision_config": {"model_type": "seen"}}
    config["tie_word_embeddings"] = plain["tie_word_embeddings"]
    (tmp_path / "wrapper" / "config.json").write_text(json.dumps(config))
    made: list[object] = []
    for folder, told in (("alone", plain), ("wrapper", config)):
        structure = resolve(choose(known_architectures(), told), told, {})
        job = local_job(
            {"checkpoint": tmp_path / folder}, {"structure": structure.to_json()}, tmp_path / f"{folder}-made"
        )
        convert.run(job)
        document = json.loads((job.output / "parameters.json").read_text())
        made.append([(each["name"], each["shape"], len(each["parts"])) for each in document["parameters"]])
        made.append(structure.library_json())
    assert made[:2] == made[2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", wrappers.known())
def test_embeddings_are_tied_where_transformers_ties_them(name: str) -> None:
    from transformers import AutoConfig

    kind = wrappers.text_type({"model_type": name})
    for outer, inner in itertools.product((None, False, True), repeat=2):
        text = {"model_type": kind} | ({} if inner is None else {"tie_word_embeddings": inner})
        config = {"text_config": text} | ({} if outer is None else {"tie_word_embeddings": outer})
        try:
            expected = AutoConfig.for_model(name, **copy.deepcopy(config)).tie_word_embeddings
        except AttributeError:  # it has no default of its own
            assert (
                outer is None
                and wrappers.text_config({**config, "model_type": name}).get("tie_word_embeddings") == inner
            )
            continue
        assert wrappers.text_config({**config, "model_type": name})["tie_word_embeddings"] == expected, (outer, inner)


def cases_of(name: str) -> tuple[Case, Case]:
    """A small wrapper, and the small text model in it."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model(name).to_dict()
    inner = whole["text_config"]["model_type"]
    kind = str(wrappers.text_type({"model_type": name, "text_config": {"model_type": inner}}))
    three = {} if inner == kind else {"mrope_section": [2, 1, 1] if kind.startswith("glm") else [4, 2, 2]}
    turned = {"rope_type": "default", "rope_theta": 10000.0}
    turned |= {"partial_rotary_factor": 0.5} if kind.startswith("glm") else {}
    same = {"rope_parameters": turned, "rms_norm_eps": 1e-6} if three else {}
    text = replace(TEXTS[kind], config={**TEXTS[kind].config, **same, **SAID.get(name, {})})
    if kind == "qwen3_moe":  # whose shares are always divided by their sum, inside the wrappers
        text = replace(text, config={**text.config, "norm_topk_prob": True})
    parts = {key: _small(part) for key, part in whole.items() if isinstance(part, dict) and "model_type" in part}
    parts["text_config"] = {key: value for key, value in text.config.items() if key != "norm_topk_prob"}
    parts["text_config"] |= {"model_type": inner}
    if three:
        parts["text_config"]["rope_parameters"] = {**turned, **three}
    tied = text.config.get("tie_word_embeddings", whole["text_config"].get("tie_word_embeddings", False))
    return Case(
        text.architecture, {"model_type": name, **parts, "tie_word_embeddings": tied, **BESIDE.get(name, {})}
    ), text


def _small(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part's config with small sizes, lists as long as they are."""
    found = {}
    for key, value in part.items():
        if key in SMALL and value is not None:
            same = isinstance(value, list) and not isinstance(SMALL[key], list)
            found[key] = [SMALL[key]] * len(value) if same else SMALL[key]
        elif key in ("model_type", "window_size", "video_temporal_patch_size"):
            found[key] = value
    return found


def _table(folder: Path) -> Mapping[str, Any]:
    return read_table({path.name: path for path in folder.iterdir()})


def _alone(text: Case, tensors: Mapping[str, Any], folder: Path) -> Path:
    """A checkpoint of the text model with these tensors."""
    from safetensors.numpy import save_file

    save(text, folder)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
