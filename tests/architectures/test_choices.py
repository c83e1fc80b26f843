"""What each choice of an architecture does is seen by doing without it: the logits are then not those of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.models.parameters import parameters
from mlcbuild.runtime.session import Session
from tests.architectures.agreement import IDS, Agreement, error, network, save, structure_of
from tests.architectures.cases import CASES as OWN
from tests.architectures.family_cases import CASES as FAMILIES
from tests.architectures.indexer_cases import CASES as INDEXERS
from tests.architectures.sink_cases import CASES as SINKS
from tests.support import llama

CASES = {**OWN, **FAMILIES, **INDEXERS, **SINKS}
pytestmark = pytest.mark.slow

# The case, and the fields of its structure that are changed; roles are parameters that are left out.
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "a parallel residual": ("gpt_neox", {"residual": "sequential"}),
    "layer norms": ("orion", {"norm": "rms"}),
    "norms after the blocks, too": (
        "gemma2",
        {"norm_position": "pre", "roles": ("attention_post_norm", "mlp_post_norm")},
    ),
    "an offset of norms": ("nemotron", {"norm_offset": 0.0}),
    "the scale of embeddings": ("gemma", {"embedding_scale": 1.0}),
    "the scale of residuals": ("minicpm", {"residual_scale": 1.0}),
    "the scale of logits": ("cohere", {"logits_scale": 1.0}),
    "the final soft cap": ("gemma2", {"final_logit_softcapping": None}),
    "the gate in the second half": ("qwen", {"gate": "first"}),
    "the activation": ("gemma", {"activation": "silu"}),
    "the row where positions begin": ("opt", {"position_offset": 0}),
    "sines of positions": ("xglm", {"sinusoidal": False}),
    "norms after queries and keys are turned": ("hunyuan_v1_dense", {"qk_norm_last": False}),
    "the scale of positions": ("ministral3", {"position_scale": None}),
    "norms before the last matrices": ("bitnet", {"roles": ("o_norm",)}),
    "sinks": ("gpt_oss", {"roles": ("sinks",)}),
    "the limit of experts": ("gpt_oss", {"swiglu_limit": 100.0}),
    "chunks": ("llama4_text-plain", {"chunked": False}),
    "norms of heads without a weight": ("llama4_text", {"qk_norm": "none"}),
    "shares of what experts are given": ("llama4_text", {"expert_input_scaled": False}),
    "the scale of values": ("mimo_v2_flash", {"value_scale": 1.0}),
    "norms of values": ("gemma4_text", {"value_norm": False}),
    "averages of experts": ("cohere2_moe", {"experts_averaged": False}),
    "gates of norms": ("axk2", {"roles": ("attention_norm_in_proj", "attention_norm_out_proj")}),
    "the length of latents": ("dots3_note_text", {"long_latents": False}),
    "norms of turned keys": ("dots3_note_text", {"roles": ("k_turned_norm",)}),
    "the choice of keys": (
        "deepseek_v32-choosing",
        {"indexer": (), "roles": ("index_query", "index_key", "index_norm", "index_norm_bias", "index_weights")},
    ),
    "the choice of another layer": ("glm_moe_dsa-choosing", {"indexer": (5, 12, 24, 1, 0, 0, 1e-6)}),
    "what is turned of index keys": ("hy_v4-choosing", {"indexer": (5, 12, 24, 0, 0, 1, 1e-5)}),
    "neighbours in index keys": ("dots3_note_text-choosing", {"indexer": (5, 12, 24, 0, 0, 0, 1e-6)}),
    "the largest weight of what is added": ("hy_v4", {"hyper_magnitude": 2.0}),
    "limits of all MLPs": ("minimax_m3_vl_text", {"swiglu_dense": False}),
    "learned positions": ("gpt2", {"roles": ("position_embedding",)}),
    "biases of attention": ("qwen2", {"roles": ("qkv_bias",)}),
    "the bias of the head": ("phi", {"roles": ("lm_head_bias",)}),
}


@pytest.mark.parametrize("choice", WITHOUT)
def test_without_it_logits_differ(choice: str, tmp_path: Path) -> None:
    name, changes = WITHOUT[choice]
    agreement = Agreement(CASES[name], "q0f32", tmp_path, build=None)
    fields = {field: value for field, value in changes.items() if field != "roles"}
    rules = tuple(rule for rule in agreement.structure.rules if rule.role not in changes.get("roles", ()))
    changed = replace(agreement.structure, rules=rules, **fields)
    opened = network(llama.build_library(changed, "q0f32", tmp_path), agreement.weights, changed.vocab_size, False)
    session = Session(opened, 1)
    got = np.concatenate(list(session.all_logits(session.add(), IDS)))
    assert error(got, agreement.expected(IDS)) > 0.01


def test_starcoder2_has_a_head_of_its_own_where_it_is_untied(tmp_path: Path) -> None:
    """MLC's parameter list has an lm_head in both cases: of the checkpoint's own, or the embedding again."""
    heads = {}
    for name in ("starcoder2", "starcoder2-tied"):
        agreement = Agreement(CASES[name], "q0f32", tmp_path / name, build=None)
        found = parameters(agreement.structure)
        heads[name] = next(each.sources for each in found if each.role == "lm_head")
    assert heads == {"starcoder2": ("lm_head.weight",), "starcoder2-tied": ("model.embed_tokens.weight",)}


def test_one_function_for_all_layers_of_a_kind(tmp_path: Path) -> None:
    """What a compiler pass costs does not grow with layers, whatever they alternate in."""
    save(CASES["gemma3_text"], tmp_path)
    assert set(structure_of(CASES["gemma3_text"], tmp_path).layer_kinds) == {0, 1}
