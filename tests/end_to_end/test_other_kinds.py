"""Models that are no decoders, from a checkpoint folder to dist/: RWKV writes text, BERT makes vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from mlcbuild.runtime import load
from mlcbuild.runtime.sampling import Sampling
from mlcbuild.serve.engine import Engine
from mlcbuild.talk.dialogue import Dialogue
from tests.architectures.test_encoder import hidden_states, transformers_bert
from tests.end_to_end.workspace import Workspace, make_workspace
from tests.runtime.conftest import byte_level_tokenizer
from tests.serve.conftest import KEY, serving

pytestmark = pytest.mark.slow
TEXTS = ["The sea was green.", "Zoë and Åsa sat by the sea.", "grey"]


def write_rwkv(folder: Path) -> Any:
    import torch
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=2, context_length=64)).eval()
    for name, parameter in model.named_parameters():
        if "ln" not in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.to(torch.float16).save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return model.float()


def write_bert(folder: Path) -> Any:
    """As sentence-transformers saves it: mean pooling, which the architecture's default is not; no normalisation."""
    model = transformers_bert(vocab_size=300, max_position_embeddings=32)
    model.save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> tuple[Workspace, Any, Any]:
    folder = tmp_path_factory.mktemp("kinds")
    models = [write_rwkv(folder / "rwkv"), write_bert(folder / "bert")]
    workspace = make_workspace(folder / "workspace", shared_cache, folder / "rwkv")
    (workspace.root / "recipes/tiny-cpu.yaml").unlink()
    workspace.model("tiny", folder / "rwkv", "verify: {gate: report, perplexity: 9000}\n")
    workspace.model("bert", folder / "bert", "verify: {gate: report}\n")
    workspace.write(
        "recipes/matrix/kinds.yaml",
        "matrix: {model: [tiny, bert], quantization: [q0f32, q8f16_0, q4f16_1], target: [cpu]}\n"
        "exclude: [{model: bert, quantization: q8f16_0}]\n",
    )
    workspace.doit("build")
    return workspace, *models


@pytest.mark.parametrize(("quantization", "bound"), [("q0f32", 1e-4), ("q8f16_0", 0.2)])
def test_rwkv_computes_what_transformers_does(
    built: tuple[Workspace, Any, Any], quantization: str, bound: float
) -> None:
    import torch

    workspace, reference, _ = built
    model = load(workspace.root / "dist" / f"tiny-{quantization}-cpu")
    ids = model.tokenizer.encode(TEXTS[1])
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.logits(ids) - expected).max() / expected.std() < bound


def test_rwkv_writes_on(built: tuple[Workspace, Any, Any]) -> None:
    import torch

    workspace, reference, _ = built
    model = load(workspace.root / "dist" / "tiny-q0f32-cpu")
    ids = model.tokenizer.encode(TEXTS[0])
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    prompt = model.tokenizer.encode(TEXTS[0])
    session = model.session()
    sequence = session.add()
    written, logits = [], session.prefill(sequence, prompt)
    for _ in range(12):
        written.append(int(logits.argmax()))
        logits = session.decode(sequence, written[-1])
    assert written == ids[len(prompt) :]
    assert isinstance(model.generate(TEXTS[0], max_tokens=12), str)
    quality = json.loads((workspace.root / "dist" / "tiny-q4f16_1-cpu" / "quality.json").read_text())
    assert quality["method"] == "whole" and quality["kl"] > 0 and quality["library_executed"]
    plain = json.loads((workspace.root / "dist" / "tiny-q0f32-cpu" / "quality.json").read_text())
    assert plain["kl"] < 1e-4 and plain["status"] == "passed"


def test_bert_makes_vectors_as_its_modules_say(built: tuple[Workspace, Any, Any]) -> None:
    workspace, _, reference = built
    package = workspace.root / "dist" / "bert-q0f32-cpu"
    model = load(package)
    vectors = model.embed(TEXTS)
    assert vectors.shape == (3, 64)
    for text, vector in zip(TEXTS, vectors, strict=True):
        hidden = hidden_states(reference, model.tokenizer.encode(text))
        assert np.abs(vector - hidden.mean(axis=0)).max() < 1e-4
    config = json.loads((package / "bert-q0f32-MLC" / "mlc-chat-config.json").read_text())
    told = {"model_type": "encoder", "pooling_strategy": "mean", "normalize": False}
    assert config["model_task"] == "embedding" and config["embedding_metadata"] == told
    assert model.embed([TEXTS[1] * 20]).shape == (1, 64)  # cut to the context


def test_vectors_are_verified_by_their_cosines(built: tuple[Workspace, Any, Any]) -> None:
    workspace = built[0]
    plain, packed = (
        json.loads((workspace.root / "dist" / f"bert-{name}-cpu" / "quality.json").read_text())
        for name in ("q0f32", "q4f16_1")
    )
    assert plain["method"] == packed["method"] == "embeddings"
    assert plain["cosine"] == plain["lowest_cosine"] == 1 and plain["hidden_error"] == 0
    assert 0.8 < packed["lowest_cosine"] <= packed["cosine"] < 1 and 0.001 < packed["hidden_error"] < 0.5
    assert packed["pooling"] == {"strategy": "mean", "normalize": False} and packed["thresholds"]["fail_cosine"] == 0.94


def test_a_miss_with_gate_fail_installs_nothing(built: tuple[Workspace, Any, Any]) -> None:
    workspace = built[0]
    workspace.write(
        "recipes/strict-cpu.yaml", "model: bert\nquantization: q4f16_1\ntarget: cpu\nverify: {cosine: 1, gate: fail}\n"
    )
    done = workspace.doit("build", "recipe=strict-cpu", check=False)
    (workspace.root / "recipes/strict-cpu.yaml").unlink()
    assert done.returncode == 1
    assert "does not pass verification: cosine" in done.stdout + done.stderr
    assert not (workspace.root / "dist" / "strict-cpu").exists()


def test_calibration_refuses_what_has_no_layers_to_go_through(built: tuple[Workspace, Any, Any]) -> None:
    workspace = built[0]
    workspace.recipe("calibrated-cpu", "q4f16_1-calibrated")
    done = workspace.doit("build", "recipe=calibrated-cpu", check=False)
    (workspace.root / "recipes/calibrated-cpu.yaml").unlink()
    assert done.returncode == 3
    said = "rounding `calibrated` runs a model layer by layer, and rwkv cannot be run so: choose the same quantization"
    assert said in done.stdout + done.stderr


def test_both_are_served(built: tuple[Workspace, Any, Any]) -> None:
    """Vectors by OpenAI's client; and a recurrent model writes several texts at once, and talks."""
    dist = built[0].root / "dist"
    vectors, writing = load(dist / "bert-q0f32-cpu"), load(dist / "tiny-q0f32-cpu")
    with serving(Engine(load(dist / "bert-q0f32-cpu")), "bert") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        for encoding in ({}, {"encoding_format": "float"}):  # the first is base64, which the client asks for
            answer = client.embeddings.create(model="bert", input=TEXTS, **encoding)  # type: ignore[arg-type]
            assert np.array([each.embedding for each in answer.data]) == pytest.approx(vectors.embed(TEXTS), abs=1e-6)
        with pytest.raises(openai.BadRequestError, match="bert gives vectors of texts"):
            client.completions.create(model="bert", prompt="x")
    with serving(Engine(load(dist / "tiny-q0f32-cpu")), "rwkv") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        texts = client.completions.create(model="rwkv", prompt=TEXTS, max_tokens=12, temperature=0).choices
    assert [choice.text for choice in texts] == [writing.generate(text, max_tokens=12) for text in TEXTS]
    talk = Dialogue(writing, Sampling(), max_tokens=6, window=4096)
    for question in TEXTS:
        assert "".join(talk.ask(question)) == writing.chat(talk.messages[:-1], max_tokens=6)
