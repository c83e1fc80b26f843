"""Whole CUDA libraries on the emulated device: every kernel in several thread orders, logits against transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.architectures.test_agreement import CASES
from tests.emulation.worker import LARGE, Worker

pytestmark = pytest.mark.slow
BOUNDS = {"float32": 1e-4, "float16": LARGE, "bfloat16": 8e-2}  # of the reference's deviation: eps times a few layers
ROUNDINGS = 1.5  # times the error of transformers in float16, which rounds at other places
CHOOSES = 0.05  # an error that no rounding of sums explains: another expert, or another token of a head, was chosen
# One of each choice that a decoder has; each takes 15 seconds. ATTENTION and RECURRENT have others.
ARCHITECTURES = (
    *("llama", "llama-yarn", "gemma3_text", "gpt2", "gptj", "phi", "cohere-norms", "chatglm"),
    *("deepseek_v3", "laguna", "glm_moe_dsa-choosing"),
)
# Which are compared in another format than q4f16_1, and why.
UNLIKE = {
    "baichuan2": ("q0f32", "its head's rows are normed: those that 4 bits stand for are not what the reference norms"),
    **dict.fromkeys(
        ("zamba", "zamba-biases", "zamba2", "zamba2-plain"),
        ("q4f32_1", "transformers in 16 bits is off by 0.2: what attention returns is normed, with nothing beside it"),
    ),
    **dict.fromkeys(
        (
            *("laguna", "gemma4_text-experts", "qwen3_moe", "dots1", "deepseek_v2", "afmoe", "qwen3_5_moe_text"),
            *("glm4_moe_lite", "longcat_flash", "deepseek_v32", "kimi_linear", "bailing_hybrid"),
            *("hy_v4", "hy_v4_vl", *(name for name in CASES if name.endswith("-choosing"))),
        ),
        ("q4f32_1", "in 16 bits, its router takes another expert at one token, or its indexer another key"),
    ),
}
TERNARY, TWELVE = "bitnet-ternary", "bloom-12-heads"  # which have tests of their own
# Of each choice that attention has, whose kernels are others in 16 bits.
ATTENTION = ("gemma2", "qwen2-window", "mimo_v2_flash", "llama4_text", "bloom", "minicpm3")
# Experts, whose prompts are multiplied in tiles.
EXPERTS = {"mixtral": "q4f16_1", "qwen3_moe": "q4f32_1", "gpt_oss": "q4f16_1"}
# The kinds that are no decoders, each with a format.
RECURRENT = {
    **{"rwkv": "q4f16_1", "rwkv5": "q4f32_1", "rwkv6": "q4f16_1"},
    **{"mamba": "q4f32_1", "falcon_mamba": "q4f32_1", "mamba2": "q4f32_1", "xlstm": "q4f16_1"},
}
# Attention in some layers, and one of each mixer in others; Falcon-H1 has both side by side.
HYBRIDS = {
    **{"lfm2": "q4f16_1", "jamba": "q4f16_1", "falcon_h1": "q4f32_1", "qwen3_5_text": "q4f32_1"},
    **{"kimi_linear": "q4f32_1", "recurrent_gemma": "q4f16_1", "minimax": "q4f32_1", "zamba": "q4f32_1"},
}
ENCODERS = {
    **{"bert": "q4f16_1", "mpnet": "q4f32_1", "electra": "q4f32_1", "eurobert": "q4f32_1"},
    "qwen3-embedding": "q4f32_1",
}
HEADS = [(32, 2), (64, 4), (80, 2), (128, 1), (256, 2), (512, 1)]  # head_dim, num_key_value_heads of 4 heads


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("emulated"))
    yield worker
    worker.close()


def check(answer: dict[str, Any], dtype: str) -> None:
    """A model whose layers enlarge what rounding does is compared with the error of transformers in float16."""
    bound = max(answer["noise"] * BOUNDS[dtype], ROUNDINGS * answer["rounding"])
    assert answer["rounding"] < CHOOSES
    assert answer["notes"] == {}
    assert {name: error for name, error in answer["errors"].items() if not error < bound} == {}
    assert answer["kernels"] > 10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, worker: Worker) -> None:
    check(worker.ask({"architecture": name, "quantization": "q4f32_1"}), "float32")


@pytest.mark.parametrize(("name", "quantization"), EXPERTS.items())
def test_experts(name: str, quantization: str, worker: Worker) -> None:
    answer = worker.ask({"architecture": name, "quantization": quantization})
    check(answer, "float16" if "f16" in quantization else "float32")


def test_kernels_that_begin_early(worker: Worker) -> None:
    """They wait for those before, and what kernels write is closed to them until then. There are six to a layer."""
    asked = {"architecture": "llama", "quantization": "q4f16_1", "target": "cuda-sm_90", "functions": True}
    answer = worker.ask(asked)
    check(answer, "float16")
    assert sum(count // 3 for count in answer["step"].values()) == 6  # of each of three layers


def test_rounded_activations(worker: Worker) -> None:
    """A number that is rounded the other way is a step of 1 / 127."""
    check(worker.ask({"architecture": TERNARY, "quantization": "q4f32_1"}), "float16")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_in_16_bits(name: str, worker: Worker) -> None:
    check(worker.ask({"architecture": name, "quantization": "q4f16_1"}), "float16")


if os.environ.get("MLCBUILD_TEST_EMULATED") == "all":  # of each a quarter of a minute, which CI does not have

    @pytest.mark.parametrize("name", [name for name in CASES if name not in (TERNARY, TWELVE)])
    def test_every_architecture(name: str, worker: Worker) -> None:
        quantization, _ = UNLIKE.get(name, ("q4f16_1", ""))
        dtype = "float16" if "f16" in quantization else "float32"
        check(worker.ask({"architecture": name, "quantization": quantization}), dtype)


@pytest.mark.parametrize(("name", "quantization"), {**RECURRENT, **HYBRIDS}.items())
def test_models_with_a_state(name: str, quantization: str, worker: Worker) -> None:
    dtype = "float16" if "f16" in quantization else "float32"
    check(worker.ask({"architecture": name, "quantization": quantization}), dtype)


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states(name: str, worker: Worker) -> None:
    dtype = "float16" if "f16" in ENCODERS[name] else "float32"
    check(worker.ask({"encoder": name, "quantization": ENCODERS[name]}), dtype)


def test_linear_biases_of_heads_that_are_no_power_of_two(worker: Worker) -> None:
    asked = {"architecture": TWELVE, "changes": {"hidden_size": 192}, "quantization": "q4f16_1"}
    check(worker.ask(asked), "float16")


@pytest.mark.parametrize(("head_dim", "num_key_value_heads"), HEADS)
def test_head_dims(head_dim: int, num_key_value_heads: int, worker: Worker) -> None:
    changes = {"head_dim": head_dim, "num_key_value_heads": num_key_value_heads}
    check(worker.ask({"architecture": "llama", "changes": changes, "quantization": "q4f16_1"}), "float16")


def test_heads_of_32_and_of_512_numbers_in_one_model(worker: Worker) -> None:
    """Gemma 4's. Its scores have no scale but these norms: around 1, one key would have the whole softmax."""
    changes, centres = {"global_head_dim": 256}, {"q_norm.weight": 0.0, "k_norm.weight": 0.0}  # one of them is doubled
    asked = {"architecture": "gemma4_text", "changes": changes, "centres": centres, "quantization": "q4f16_1"}
    check(worker.ask(asked), "float16")


@pytest.mark.parametrize("quantization", ["q0f16", "q3f16_1", "q4f16_0", "q4f16_2", "q8f16_1", "q0f32", "q4bf16_1"])
def test_formats(quantization: str, worker: Worker) -> None:
    dtype = "bfloat16" if "bf16" in quantization else "float16" if "f16" in quantization else "float32"
    check(worker.ask({"architecture": "llama", "quantization": quantization, "functions": True}), dtype)
