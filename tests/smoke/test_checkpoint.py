"""The random checkpoint of a test run: the recipe's own shape, the same bytes everywhere, made once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.engine.job import local_job
from mlcbuild.models import wrappers
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.models.parameters import ignored, parameters
from mlcbuild.smoke import checkpoint
from mlcbuild.steps import convert
from tests.architectures import family_cases, hybrid_cases, indexer_cases, sink_cases
from tests.architectures.agreement import config_of, known_architectures
from tests.architectures.cases import CASES
from tests.architectures.deepseek import CONFIG as CONFIG_OF_EXPERTS
from tests.support import llama

DEPENDENT = {**family_cases.CASES, **hybrid_cases.CASES, **sink_cases.CASES, **indexer_cases.CASES}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "eos_token_id": [128001, 128009],
    "quantization_config": {"quant_method": "gptq"},
}


def small() -> dict[str, object]:
    return checkpoint.small_config(CONFIG, llama.architecture())


def test_the_config_is_the_models_own_but_small() -> None:
    found = small()
    changed = {name for name in {*CONFIG, *found} if CONFIG.get(name) != found.get(name)}
    assert changed == {
        "num_hidden_layers", "vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config",
    }  # fmt: skip
    assert (found["num_hidden_layers"], found["vocab_size"]) == (2, 512)


def test_a_hybrid_keeps_layers_of_both_types() -> None:
    """Its first layers are often of one type, with which none is built."""
    config = {"model_type": "lfm2", "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
    found = checkpoint.small_config(config, llama.architecture("lfm2"))
    assert found["layer_types"] == ["conv", "full_attention"] and found["num_hidden_layers"] == 2


def test_bitnet_keeps_its_three_values(tmp_path: Path) -> None:
    """What its matrices are multiplied with is rounded, as in the recipe's own structure."""
    packed = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    config = {**CONFIG, "model_type": "bitnet", "hidden_act": "relu2", "quantization_config": packed}
    chosen = llama.architecture("bitnet")
    small = checkpoint.small_config(config, chosen)
    model = resolve(chosen, small, {})
    assert model.input_bits == resolve(chosen, config, {}).input_bits == 8
    folder = checkpoint.make(tmp_path, small, chosen, ())
    job = local_job({"checkpoint": folder}, {"structure": model.to_json()}, tmp_path / "job")
    convert.run(job)
    notes = json.loads((job.output / "parameters.json").read_text())["notes"]
    assert notes == ["14 matrices are rounded to the three values that BitNet computes with"]


@pytest.mark.parametrize(
    "name",
    [
        *("nemotron_h", "gemma4_text-shared", "falcon_h1", "qwen2_5_vl", "diffllama", "longcat_flash", "zamba2"),
        *("hrm_text", "dory", "dots3_note_text", "hy_v4"),
    ],
)
def test_models_whose_layers_depend_on_one_another_convert_one(name: str, tmp_path: Path) -> None:
    config = wrappers.alone(config_of(DEPENDENT[name]))
    chosen = choose(known_architectures(), config)
    small = checkpoint.small_config(config, chosen)
    folder = checkpoint.make(tmp_path, small, chosen, ())
    model = resolve(chosen, small, {})
    # A state, an MLP, attention, experts; one before the loop, in it, after it.
    assert model.num_hidden_layers == {"nemotron_h": 4, "dory": 3}.get(name, 2)
    assert {*model.roles()} == {*resolve(chosen, config, {}).roles()}
    convert.run(local_job({"checkpoint": folder}, {"structure": model.to_json()}, tmp_path / "job"))


def test_it_has_exactly_the_tensors_that_convert_wants(tmp_path: Path) -> None:
    folder = checkpoint.make(tmp_path, small(), llama.architecture(), ())
    model = resolve(llama.architecture(), small(), {})
    files = {path.name: path for path in folder.iterdir()}
    table = read_table(files, {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()})
    document = index(parameters(model), table, ignored(model))
    assert [e["name"] for e in document["parameters"]] == [p.name for p in parameters(model)]
    assert {e["dtype"] for e in document["parameters"]} == {"bfloat16"}


@pytest.mark.parametrize("awq_group", [None, 32])
def test_experts_are_there_one_by_one(tmp_path: Path, awq_group: int | None) -> None:
    deepseek = llama.architecture("deepseek")
    small = checkpoint.small_config({**CONFIG_OF_EXPERTS, "hidden_size": 96}, deepseek, awq_group)
    folder = checkpoint.make(tmp_path, small, deepseek, ())
    job = local_job({"checkpoint": folder}, {"structure": resolve(deepseek, small, {}).to_json()}, tmp_path / "job")
    convert.run(job)
    document = json.loads((job.output / "parameters.json").read_text())
    shapes = {entry["name"]: entry["shape"] for entry in document["parameters"]}
    assert shapes["model.layers.1.mlp.moe_gate_up_proj.weight"] == [8, 64, 96]
    packed = {entry["name"] for entry in document["parameters"] if "packed" in entry}
    assert ("model.layers.1.mlp.moe_down_proj.weight" in packed) == (awq_group is not None)
    assert "model.layers.1.mlp.gate.weight" not in packed


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_converts_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    chosen = llama.architecture(case.architecture)
    small = checkpoint.small_config(config_of(case), chosen)
    folder = checkpoint.make(tmp_path, small, chosen, ())
    model = resolve(chosen, small, {})
    assert model.num_hidden_layers == 2
    convert.run(local_job({"checkpoint": folder}, {"structure": model.to_json()}, tmp_path / "job"))


def test_numbers_keep_their_size_from_layer_to_layer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = checkpoint.make(tmp_path, small(), llama.architecture(), ())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(100)[None]).logits
    assert 0.5 < logits.std() < 2


def test_the_same_bytes_and_made_once(tmp_path: Path) -> None:
    one, other = (checkpoint.make(tmp_path / n, small(), llama.architecture(), ("<|im_end|>",)) for n in ("a", "b"))
    assert one.name == other.name
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    before = (one / "model.safetensors").stat().st_mtime_ns
    assert checkpoint.make(tmp_path / "a", small(), llama.architecture(), ("<|im_end|>",)) == one
    assert (one / "model.safetensors").stat().st_mtime_ns == before
    assert checkpoint.make(tmp_path / "a", small(), llama.architecture(), ()) != one
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_no_two_rows_of_a_matrix_are_alike(tmp_path: Path) -> None:
    held = checkpoint.make(tmp_path, small(), llama.architecture(), ()) / "model.safetensors"
    tensors = load_file(held)
    rows = tensors["model.layers.1.mlp.up_proj.weight"]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_the_tokenizer_takes_any_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = checkpoint.make(tmp_path, small(), llama.architecture(), ("<|im_end|>",))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Zoë: 5 € <|im_end|> 日本\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|im_end|>") in ids
    assert tokenizer.get_vocab_size() <= json.loads((folder / "config.json").read_text())["vocab_size"]


def test_an_awq_checkpoint_for_a_format_that_is_only_read(tmp_path: Path) -> None:
    config = checkpoint.small_config({**CONFIG, "hidden_size": 96, "intermediate_size": 160}, llama.architecture(), 32)
    folder = checkpoint.make(tmp_path, config, llama.architecture(), ())
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.mlp.gate_proj"
    assert [tensors[f"{prefix}.{part}"].shape for part in ("qweight", "qzeros", "scales")] == [
        (96, 20),
        (3, 20),
        (3, 160),
    ]
    assert f"{prefix}.weight" not in tensors and "lm_head.weight" in tensors
    words = {part: tensors[f"{prefix}.{part}"].numpy().view(np.uint32) for part in ("qweight", "qzeros")}
    codes, zeros = ((word[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15 for word in words.values())
    steps = codes.astype(int) - zeros.repeat(32, axis=0).astype(int)
    assert (steps * float(tensors[f"{prefix}.scales"][0, 0])).std() == pytest.approx(96**-0.5, rel=0.1)
