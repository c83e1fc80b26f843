"""Mixtures of experts: what each choice of an architecture does is seen by doing without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import count, parameters
from mlcbuild.models.structure import Structure, from_json, from_library_json
from mlcbuild.runtime import tvm_runtime
from mlcbuild.runtime.library import Library, Network
from mlcbuild.runtime.session import Session
from tests.architectures import deepseek
from tests.compiler.built import error
from tests.compiler.packing import pack_model
from tests.support.llama import QUANTIZATIONS, Array, architecture, build_library

IDS = np.random.default_rng(1).integers(0, 320, 61).tolist()
PREFILLED = 50  # the rest is decoded; more than a chunk
LIMITS = {"max_batch_size": 4, "prefill_chunk_size": 24}
QWEN2 = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
}


class Model:
    """A checkpoint's config and tensors, and its logits by who is to be believed."""

    def __init__(
        self, config: dict[str, Any], state: dict[str, Array], logits: Callable[[dict[str, Array], list[int]], Array]
    ) -> None:
        self.config, self.state, self.logits = config, state, logits

    @property
    def structure(self) -> Structure:
        return resolve(architecture(self.config["model_type"]), self.config, LIMITS)

    def parameters(self, structure: Structure) -> dict[str, Array]:
        """By MLC's names, joined as the architecture's file says."""
        found = {}
        for each in parameters(structure):
            sources = each.sources if each.sources[0] in self.state else each.alternative
            rows = [self.state[name].reshape(-1, *self.state[name].shape[-1:]) for name in sources]
            joined = np.concatenate(rows) if len(each.shape) > 1 else np.concatenate([self.state[n] for n in sources])
            found[each.name] = joined.reshape(each.shape)
        return found


@cache
def deepseek_model() -> Model:
    config = deepseek.CONFIG
    return Model(config, deepseek.random_state(config), lambda state, ids: deepseek.logits(config, state, ids))


@cache
def qwen2_moe() -> Model:
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**QWEN2)).eval().float()
    for name, parameter in model.named_parameters():
        low, high = (0.5, 1.5) if "norm" in name else (-0.3, 0.3)
        torch.nn.init.uniform_(parameter, low, high)

    def logits(state: dict[str, Array], ids: list[int]) -> Array:
        model.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
        with torch.no_grad():
            return np.asarray(model(torch.tensor([ids])).logits[0])

    config = json.loads(json.dumps(model.config.to_dict()))
    return Model(config, {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}, logits)


def computed(structure: Structure, values: dict[str, Array], folder: Path) -> Array:
    """The logits of a float32 library at every position, after prefill in chunks and token by token."""
    library = Library(build_library(structure, "q0f32", folder))
    given, _ = pack_model(structure, QUANTIZATIONS["q0f32"], values)
    session = Session(Network(library, [tvm_runtime.tensor(array) for array, _ in given], structure.vocab_size, 2))
    sequence = session.add()
    prefilled = list(session.all_logits(sequence, IDS[:PREFILLED]))
    return np.concatenate([*prefilled, *(session.decode(sequence, token)[None] for token in IDS[PREFILLED:])])


def without(structure: Structure, roles: Sequence[str]) -> Structure:
    return replace(structure, rules=tuple(rule for rule in structure.rules if rule.role not in roles))


SHARED = ("shared_gate_up_proj", "shared_down_proj", "shared_gate")
CHANGES: dict[str, tuple[Callable[[], Model], Callable[[Structure], Structure]]] = {
    "shared experts": (deepseek_model, lambda s: without(s, SHARED)),
    "a gate of the shared expert": (qwen2_moe, lambda s: without(s, ["shared_gate"])),
    "probabilities as they are": (qwen2_moe, lambda s: replace(s, norm_topk_prob=True)),
    "how many experts a token goes to": (deepseek_model, lambda s: replace(s, num_experts_per_tok=2)),
    "the scale of what experts say": (deepseek_model, lambda s: replace(s, routed_scaling_factor=2.0)),
}


def test_logits_are_those_of_the_reference(tmp_path: Path) -> None:
    """The quick one of all agreements with experts: test_agreement.py has those of every architecture."""
    m = deepseek_model()
    got = computed(m.structure, m.parameters(m.structure), tmp_path)
    assert error(got, m.logits(m.state, IDS)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_without_it_they_are_not(change: str, tmp_path: Path) -> None:
    model, changed = CHANGES[change]
    m = model()
    structure = changed(m.structure)
    assert error(computed(structure, m.parameters(structure), tmp_path), m.logits(m.state, IDS)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"norm_topk_prob": True}, {"routed_scaling_factor": 2.0}, {"moe_layer_freq": 2}])
def test_settings_of_a_config_are_followed(settings: dict[str, Any], tmp_path: Path) -> None:
    config = {**deepseek.CONFIG, **settings}
    state = deepseek.random_state(config)
    m = Model(config, state, lambda _, ids: deepseek.logits(config, state, ids))
    assert error(computed(m.structure, m.parameters(m.structure), tmp_path), m.logits(state, IDS)) <= 1e-4


def test_layers_have_experts_or_an_mlp() -> None:
    def kinds(name: str, config: dict[str, Any]) -> list[str]:
        structure = resolve(architecture(name), config, {})
        by_layer: dict[int, set[str]] = {}
        for each in parameters(structure):
            if each.layer is not None:
                by_layer.setdefault(each.layer, set()).add(each.role)
        assert all(("router" in roles) != ("down_proj" in roles) for roles in by_layer.values())
        assert count(structure) == sum(int(np.prod(each.shape)) for each in parameters(structure))
        assert from_json(json.loads(json.dumps(structure.to_json()))) == structure
        again = from_library_json(json.loads(json.dumps(structure.library_json())))
        assert again.digest == structure.digest
        return ["experts" if "router" in roles else "mlp" for _, roles in sorted(by_layer.items())]

    qwen = {**QWEN2, "model_type": "qwen2_moe", "num_hidden_layers": 4}
    assert kinds("qwen2_moe", qwen) == ["experts", "mlp", "experts", "experts"]
    assert kinds("qwen2_moe", {**qwen, "decoder_sparse_step": 2, "mlp_only_layers": [3]}) == [
        "mlp",
        "experts",
        "mlp",
        "mlp",
    ]
    assert kinds("qwen2_moe", {**qwen, "mlp_only_layers": []}) == ["experts"] * 4
    seven = {**deepseek.CONFIG, "num_hidden_layers": 5, "first_k_dense_replace": 2, "moe_layer_freq": 2}
    assert kinds("deepseek", seven) == ["mlp", "mlp", "experts", "mlp", "experts"]


PUBLISHED = {
    # hidden, intermediate, inner, layers, heads, kv heads, head_dim, vocabulary, experts, millions of parameters
    "mixtral": (4096, 14336, 0, 32, 32, 8, 128, 32000, 8, 46702),  # Mixtral-8x7B
    "qwen2_moe": (2048, 5632, 1408, 24, 16, 16, 128, 151936, 60, 14315),  # Qwen1.5-MoE-A2.7B
    "qwen3_moe": (2048, 6144, 768, 48, 32, 4, 128, 151936, 128, 30532),  # Qwen3-30B-A3B
    "deepseek": (2048, 10944, 1408, 28, 16, 16, 128, 102400, 64, 16375),  # deepseek-moe-16b
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_they_say(name: str) -> None:
    *sizes, experts, millions = PUBLISHED[name]
    keys = (
        *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size"),
    )
    config = {**CONFIGS[name], **{key: size for key, size in zip(keys, sizes, strict=True) if size}}
    config |= {"n_routed_experts": experts} if name == "deepseek" else {}
    config |= {key: experts for key in ("num_experts", "num_local_experts") if key in config}
    config |= {"shared_expert_intermediate_size": 5632} if name == "qwen2_moe" else {}
    config |= {"mlp_only_layers": []} if "mlp_only_layers" in config else {}
    assert count(resolve(architecture(name), config, {})) // 10**6 == millions


def test_a_router_needs_numbers_of_experts() -> None:
    for changes, text in (
        ({"num_experts": 0}, "num_experts is 0, expected a whole number of at least 1"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, but there are only 5 experts"),
    ):
        with pytest.raises(MlcBuildError, match=text):
            resolve(architecture("qwen2_moe"), {**QWEN2, "model_type": "qwen2_moe", **changes}, {})


# In the order in which MLC's modules define them: python/mlc_llm/model/{mixtral,qwen2_moe,deepseek}/*_model.py.
MLC = {
    "mixtral": ["self_attn.qkv_proj", "self_attn.o_proj", "moe.gate", "moe.e1_e3", "moe.e2"],
    "qwen2_moe": [
        *("self_attn.c_attn", "self_attn.c_attn.bias", "self_attn.o_proj", "mlp.shared_expert.gate_up_proj"),
        *("mlp.shared_expert.down_proj", "mlp.shared_expert_gate", "mlp.gate", "mlp.moe_gate_up_proj"),
        "mlp.moe_down_proj",
    ],
    "qwen3_moe": [
        *("self_attn.c_attn", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate"),
        *("mlp.moe_gate_up_proj", "mlp.moe_down_proj"),
    ],
    "deepseek": [
        *("self_attn.wqkv_pack", "self_attn.o_proj", "mlp.gate", "mlp.moe_gate_up_proj", "mlp.moe_down_proj"),
        *("mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj"),
    ],
}
_QWEN2_ONLY = ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_only_layers")
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **{key: value for key, value in QWEN2.items() if key not in _QWEN2_ONLY},
        **{"model_type": "mixtral", "num_local_experts": 5},
    },
    "qwen2_moe": {**QWEN2, "model_type": "qwen2_moe"},
    "qwen3_moe": {
        **{key: value for key, value in QWEN2.items() if key != "shared_expert_intermediate_size"},
        **{"model_type": "qwen3_moe", "head_dim": 32},
    },
    "deepseek": deepseek.CONFIG,
}


@pytest.mark.parametrize("name", MLC)
def test_parameters_are_mlcs_in_its_order(name: str) -> None:
    names = [each.name for each in parameters(resolve(architecture(name), CONFIGS[name], {})) if each.layer == 2]
    expected = [*MLC[name], "input_layernorm", "post_attention_layernorm"]
    assert names == [f"model.layers.2.{each}" + ("" if each.endswith("bias") else ".weight") for each in expected]


def test_experts_of_mixtral_are_stacked_as_mlc_stacks_them() -> None:
    structure = resolve(architecture("mixtral"), CONFIGS["mixtral"], {})
    (found,) = (each for each in parameters(structure) if each.name.endswith("0.moe.e1_e3.weight"))
    assert found.shape == (5, 2 * 96, 64)
    at = "model.layers.0.block_sparse_moe.experts"
    assert found.sources[:4] == (f"{at}.0.w1.weight", f"{at}.0.w3.weight", f"{at}.1.w1.weight", f"{at}.1.w3.weight")
    assert len(found.sources) == 10 and found.alternative == ("model.layers.0.mlp.experts.gate_up_proj",)
