"""BERT against transformers: hidden states, masks, vectors of texts; and how a checkpoint says that they are made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.engine.job import local_job
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.models.encoder import buckets
from mlcbuild.models.parameters import parameters
from mlcbuild.models.rope import inverse_frequencies
from mlcbuild.models.structure import Structure
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.runtime.embedding import Pooling, encoded, pooled
from mlcbuild.runtime.model import Model
from mlcbuild.steps import convert, quantize
from tests.architectures.agreement import known_architectures, network
from tests.compiler.built import Built as BuiltLlama
from tests.runtime.conftest import byte_level_tokenizer
from tests.support import llama
from tests.support.llama import Array

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 60,
}
IDS = [int(i) for i in np.random.default_rng(1).integers(3, 90, 55)]  # more than one task's rows of attention


def transformers_bert(**changes: Any) -> Any:
    """A seeded random BertModel in float32, biases, norms and types random too."""
    return transformers_encoder("bert", **{**SIZES, **changes})


def transformers_encoder(model_type: str, **changes: Any) -> Any:
    """A seeded random encoder in float32, biases and norms random too."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **changes)).eval().float()
    for name, parameter in model.named_parameters():
        low, high = (0.5, 1.5) if "norm.weight" in name.lower() else (-0.2, 0.2)
        torch.nn.init.uniform_(parameter, low, high)
    return model


def hidden_states(model: Any, ids: list[int]) -> Array:
    import torch

    with torch.no_grad():
        found: Array = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    return found


def error(got: Array, expected: Array) -> float:
    """The largest difference over the standard deviation of the expected numbers."""
    return float(np.abs(got - expected).max() / expected.std())


def transformers_qwen3(head_dim: int = 16) -> Any:
    """A seeded random Qwen3Model in float32, as Qwen3-Embedding is saved: without a head, names without `model.`."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, "head_dim": head_dim, "tie_word_embeddings": True, "initializer_range": 0.1}
    model = Qwen3Model(Qwen3Config(**{**SIZES, **sizes, "vocab_size": 300})).eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


class Built:
    """A checkpoint through the real steps, its library, and transformers on the weights that it stands for."""

    def __init__(
        self,
        folder: Path,
        quantization: str,
        reference: Any,
        architecture: str = "bert",
        build: Callable[[Structure, Any, Path], Path] = llama.build_library,
        **overrides: int,
    ) -> None:
        self.reference = reference
        self.reference.save_pretrained(folder / "checkpoint")
        config = json.loads((folder / "checkpoint" / "config.json").read_text())
        self.structure = resolve(llama.architecture(architecture), config, {"max_batch_size": 1, **overrides})
        form = llama.QUANTIZATIONS[quantization]
        fields = {"structure": self.structure.to_json(), "quantization": dataclasses.asdict(form)}
        job = local_job({"checkpoint": folder / "checkpoint"}, fields, folder / "convert")
        convert.run(job)
        packing = local_job({"convert": job.output, "checkpoint": folder / "checkpoint"}, fields, folder / "quantize")
        quantize.run(packing)
        if quantization != "q0f32":
            self._take(dict(dequantized(packing.output, parameters(self.structure), form)))
        library = build(self.structure, form, folder)
        self.model = Model(network(library, packing.output, self.structure.vocab_size, False), {})

    def _take(self, values: dict[str, Array]) -> None:
        import torch

        state = self.reference.state_dict()
        for parameter in parameters(self.structure):
            start = 0
            for source in parameter.sources:
                name = source.removeprefix("model.")
                end = start + len(state[name])
                state[name] = torch.tensor(np.array(values[parameter.name][start:end]))
                start = end
        self.reference.load_state_dict(state)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("bert"), "q0f32", transformers_bert(), max_batch_size=2)


def test_hidden_states_agree(built: Built) -> None:
    for ids in (IDS, IDS[:1], IDS[:17]):
        assert error(built.model.hidden_states(ids), hidden_states(built.reference, ids)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_they_agree_quantized_with_every_activation(tmp_path: Path, activation: str) -> None:
    built = Built(tmp_path, "q4f32_1", transformers_bert(hidden_act=activation))
    assert error(built.model.hidden_states(IDS), hidden_states(built.reference, IDS)) < 1e-4


DISTIL = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "vocab_size": 96, "max_position_embeddings": 60}
KIN: dict[str, dict[str, Any]] = {
    "roberta": {**SIZES, "type_vocab_size": 1},
    "xlm-roberta": {**SIZES, "pad_token_id": 3, "type_vocab_size": 1},  # rows begin behind the padding's
    "camembert": SIZES,
    "electra": {**SIZES, "embedding_size": 32},
    "distilbert": DISTIL,
    "mpnet": SIZES,
}


NEWER: dict[str, dict[str, Any]] = {
    "modernbert": {
        **SIZES,
        "local_attention": 16,
        "pad_token_id": 0,
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "modernbert-plain": {**SIZES, "local_attention": 16, "num_hidden_layers": 4, "pad_token_id": 0},
    "nomic_bert": SIZES,
    "eurobert": {**SIZES, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "pad_token_id": 0},
    "gte": {**SIZES, "type_vocab_size": 2},
    "gte-plain": {**SIZES, "type_vocab_size": 0},
    "jina_embeddings_v3": SIZES,
}
RENAMED = ("nomic_bert", "gte", "jina_embeddings_v3")  # inside transformers, tensors have other names than saved


@pytest.mark.slow
@pytest.mark.parametrize("name", NEWER)
def test_those_with_rotary_positions_and_windows_agree(name: str, tmp_path: Path) -> None:
    model_type = name.removesuffix("-plain")
    quantization = "q0f32" if model_type in RENAMED else "q4f32_1"
    built = Built(tmp_path, quantization, transformers_encoder(model_type, **NEWER[name]), model_type)
    for ids in (IDS, IDS[:1], IDS[:17]):
        assert error(built.model.hidden_states(ids), hidden_states(built.reference, ids)) < 2e-5


def test_gte_as_the_hubs_own_code_has_it() -> None:
    """A config.json of `new`, and its NTK scaling: theta times the factor, frequencies by factor ** (2 / D)."""
    own = {
        "model_type": "new", "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "rope_theta": 20000,
        "layer_norm_type": "layer_norm", "logn_attention_clip1": False, "logn_attention_scale": False,
        "position_embedding_type": "rope", "rope_scaling": {"factor": 8.0, "type": "ntk"}, "pack_qkv": True,
        "unpad_inputs": True, "use_memory_efficient_attention": True, "max_position_embeddings": 8192,
    }  # fmt: skip
    chosen = choose(known_architectures(), own)
    structure = resolve(chosen, own, {})
    assert chosen.name == "gte" and structure.context_window_size == 8192
    expected = 160000.0 ** -(np.arange(0, 32, 2) / 32) / 8 ** (2 / 32)
    np.testing.assert_allclose(inverse_frequencies(structure), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KIN)
def test_its_kin_agree(model_type: str, tmp_path: Path) -> None:
    chosen = choose(known_architectures(), {"model_type": model_type}).name
    reference = transformers_encoder(model_type, **KIN[model_type])
    built = Built(tmp_path, "q4f32_1", reference, chosen, llama.build_optimised)
    assert error(built.model.hidden_states(IDS), hidden_states(built.reference, IDS)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f16", "q0bf16", "q4f16_1"])
def test_they_agree_in_16_bits(tmp_path: Path, quantization: str) -> None:
    built = Built(tmp_path, quantization, transformers_bert())
    error_ = built.model.hidden_states(IDS) - hidden_states(built.reference, IDS)
    assert np.abs(error_).max() < (0.2 if "bf16" in quantization else 0.02)
    assert np.abs(error_).mean() < (0.01 if "bf16" in quantization else 0.002)


def test_masked_tokens_are_seen_by_nobody(built: Built) -> None:
    """Two texts in a batch, the shorter one padded on the left or on the right, with holes in the mask."""
    short = IDS[:20]
    for pad in (slice(0, 20), slice(5, 25)):
        ids, mask = np.full((2, 30), 7, np.int32), np.zeros((2, 30), np.int32)
        ids[0], mask[0] = IDS[:30], 1
        ids[1, pad], mask[1, pad] = short, 1
        out = encoded(built.model.network, ids, mask)
        assert error(out[0], hidden_states(built.reference, IDS[:30])) < 1e-4
        import torch

        with torch.no_grad():
            told = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask)}
            expected = built.reference(**told).last_hidden_state.numpy()
        assert error(out[1, pad], expected[1, pad]) < 1e-4


def test_the_contract_is_mlcs(built: Built) -> None:
    metadata = json.loads(str(built.model.network.library["_metadata"]()))
    assert metadata["model_type"] == "bert" and metadata["model_task"] == "embedding"
    told = {"model_type": "encoder", "pooling_strategy": "cls", "normalize": True}
    assert metadata["embedding_metadata"] == told
    assert metadata["kv_state_kind"] == "none" and "kv_cache" not in metadata
    assert metadata["context_window_size"] == metadata["prefill_chunk_size"] == 60
    names = [parameter["name"] for parameter in metadata["params"]]
    assert names[:5] == [
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "embeddings.LayerNorm.bias",
    ]
    assert names[5:7] == ["encoder.layer.0.attention.self.qkv.weight", "encoder.layer.0.attention.self.qkv.bias"]
    assert not built.model.network.library.has("decode")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f32_1"])
def test_a_decoder_makes_vectors_too(tmp_path: Path, quantization: str) -> None:
    """Qwen3-Embedding: hidden states in chunks, an end of text behind each text, its last token's vector."""
    built = Built(tmp_path, quantization, transformers_qwen3(), "qwen3-embedding", prefill_chunk_size=24)
    assert error(built.model.hidden_states(IDS), hidden_states(built.reference, IDS)) < 1e-4
    library = built.model.network.library
    metadata = json.loads(str(library["_metadata"]()))
    told = {"model_type": "decoder", "pooling_strategy": "last", "normalize": True}
    assert metadata["embedding_metadata"] == told and metadata["model_task"] == "embedding"
    assert metadata["model_type"] == "qwen3-embedding" and metadata["kv_state_kind"] == "kv_cache"
    assert library.has("batch_prefill_to_last_hidden_states") and not library.has("prefill")
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = Model(built.model.network, {"eos_token_id": 2}, tmp_path)
    ids = model.text_ids("a cup")
    assert ids == [*model.tokenizer.encode("a cup"), 2]
    last = hidden_states(built.reference, ids)[-1]
    np.testing.assert_allclose(model.embed(["a cup"])[0], last / np.linalg.norm(last), atol=1e-5)


@pytest.mark.slow
def test_a_model_that_writes_has_hidden_states_but_no_vectors(tmp_path: Path) -> None:
    built = BuiltLlama(tmp_path, "q0f32", {}, prefill_chunk_size=24)
    model = Model(built.network, {})
    assert error(model.hidden_states(IDS), hidden_states(built.reference.model, IDS)) < 1e-4
    with pytest.raises(MlcBuildError, match="which says how hidden states become the vector of a text"):
        model.embed(["a"])


def test_biases_are_those_of_every_distance() -> None:
    import torch
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    expected = MPNetEncoder.relative_position_bucket(torch.arange(-511, 512), num_buckets=32)
    np.testing.assert_array_equal(buckets(512), expected.numpy())


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("cls", [3.0, 4.0]), ("mean", [2.0, 1.0]), ("last", [1.0, -2.0])],
)
def test_pooling(strategy: str, expected: list[float]) -> None:
    hidden = np.array([[3, 4], [1, -2]], np.float32)
    np.testing.assert_allclose(pooled(hidden, Pooling(strategy, False)), expected)
    unit = np.array(expected) / np.linalg.norm(expected)
    np.testing.assert_allclose(pooled(hidden, Pooling(strategy, True)), unit, rtol=1e-6)
