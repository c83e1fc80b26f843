"""Whole CUDA libraries on the emulated device: every kernel in several thread orders, logits against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulation.worker import Worker

pytestmark = pytest.mark.slow
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}  # of the reference's deviation: eps times a few layers
# One of each choice that a decoder has; each takes 15 seconds.
ARCHITECTURES = (
    *("llama", "llama-yarn", "qwen2", "gemma", "gemma2", "gemma3_text", "gpt2", "gptj", "gpt_neox", "phi", "minicpm"),
    *("mixtral", "qwen2_moe", "cohere-norms", "stablelm-parallel", "starcoder2", "olmo2", "chatglm", "qwen2-window"),
    *("deepseek_v3", "gpt_oss", "mimo_v2_flash", "llama4_text", "laguna", "gemma4_text-experts"),
)
HEADS = [(32, 2), (64, 4), (80, 2), (96, 4), (128, 1), (256, 2)]  # head_dim, num_key_value_heads of 4 heads


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("emulated"))
    yield worker
    worker.close()


def check(answer: dict[str, Any], dtype: str) -> None:
    assert answer["notes"] == {}
    assert {name: error for name, error in answer["errors"].items() if not error < BOUNDS[dtype]} == {}
    assert answer["kernels"] > 10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, worker: Worker) -> None:
    check(worker.ask({"architecture": name, "quantization": "q4f32_1"}), "float32")


@pytest.mark.parametrize(("head_dim", "num_key_value_heads"), HEADS)
def test_head_dims(head_dim: int, num_key_value_heads: int, worker: Worker) -> None:
    changes = {"head_dim": head_dim, "num_key_value_heads": num_key_value_heads}
    check(worker.ask({"architecture": "llama", "changes": changes, "quantization": "q4f16_1"}), "float16")


@pytest.mark.parametrize("quantization", ["q0f16", "q3f16_1", "q4f16_0", "q4f16_2", "q8f16_1", "q0f32", "q4bf16_1"])
def test_formats(quantization: str, worker: Worker) -> None:
    dtype = "bfloat16" if "bf16" in quantization else "float16" if "f16" in quantization else "float32"
    check(worker.ask({"architecture": "llama", "quantization": quantization}), dtype)
