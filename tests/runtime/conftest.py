"""One tiny model for all tests of the runtime: its tokenizer, weights, library, and transformers' view of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.chat.config import chat_config
from mlcbuild.chat.conversation import from_data
from mlcbuild.chat.tokenizer_info import json_tokenizer
from mlcbuild.runtime import Model, load
from tests.runtime import tiny_llama

CHATML = {
    "system_template": "<|im_start|>system\n{system_message}<|im_end|>\n",
    "system_message": "Be brief.",
    "roles": {"user": "<|im_start|>user", "assistant": "<|im_start|>assistant"},
    "seps": ["<|im_end|>\n"],
    "role_content_sep": "\n",
    "role_empty_sep": "\n",
    "stop_str": ["<|im_end|>"],
    "stop_token_ids": [2],
}
TEXT = (
    "Zoë and Åsa sat by the sea. “It is 5 € a cup,” said Åsa, 日本 in her hand 🙂. "
    "The sea was green and the sky was grey."
)


def byte_level_tokenizer() -> Any:
    """A small byte-level BPE tokenizer with ChatML's tokens: any text goes in and comes out again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def reference(tokenizer: Any) -> Any:
    """The model as transformers computes it."""
    return tiny_llama.transformers_model(tokenizer.get_vocab_size())


@pytest.fixture(scope="session")
def tiny_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / "tiny-q0f32-cpu.so"
    if not path.exists():  # other folders' tests have this fixture, too
        tiny_llama.build_library(path)
    return path


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory: pytest.TempPathFactory, tiny_library: Path, reference: Any, tokenizer: Any) -> Path:
    """dist/tiny-cpu, as a build would leave it."""
    folder = tmp_path_factory.mktemp("dist") / "tiny-cpu"
    weights = folder / "tiny-q0f32-MLC"
    tiny_llama.write_weights(weights, tiny_llama.mlc_parameters(reference))
    tokenizer.save(str(weights / "tokenizer.json"))
    shutil.copy(tiny_library, folder)
    config = chat_config(
        "llama",
        "q0f32",
        {"vocab_size": tokenizer.get_vocab_size(), "context_window_size": 96, "prefill_chunk_size": 24},
        from_data("chatml", CHATML),
        json_tokenizer(json.loads(tokenizer.to_str())),
        ["tokenizer.json"],
        [{"eos_token_id": 0, "bos_token_id": 0}],
    )
    (weights / "mlc-chat-config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_package: Path) -> Model:
    return load(tiny_package, threads=2)
