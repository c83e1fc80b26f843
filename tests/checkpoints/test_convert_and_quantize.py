"""The steps convert and quantize on a random transformers model, sharded and not, compared with its own state dict."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.engine.job import Job, Tree, local_job
from mlcbuild.errors import CheckpointError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization import group
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.tensor_cache import read_tensors
from mlcbuild.recipes.types import Quantization, Weights
from mlcbuild.steps import convert, quantize
from tests.support.architectures import architecture

NK = Weights(4, 32, "uint32", "NK", True)
Q0F32 = Quantization("q0f32", "q0", "float32")
Q4F16 = Quantization("q4f16_1", "q4", "float16", NK, "quantized", "quantized")


def save(
    folder: Path, tied: bool = False, shard: str = "1GB", dtype: str = "bfloat16", **config: Any
) -> dict[str, Any]:
    """A two-layer llama in `folder`; its state dict as float32 arrays."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaConfig(
        vocab_size=80,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **config,
    )
    model = LlamaForCausalLM(made).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def structure(folder: Path, **changes: Any) -> Structure:
    config = json.loads((folder / "config.json").read_text()) | changes
    return resolve(architecture("llama"), config, {})


def run_convert(folder: Path, model: Structure, work: Path) -> Job:
    job = local_job({"checkpoint": folder}, {"structure": model.to_json()}, work / "convert")
    convert.run(job)
    return job


def run_quantize(job: Job, model: Structure, quantization: Quantization, work: Path) -> dict[str, npt.NDArray[Any]]:
    fields = dataclasses.asdict(quantization)
    del fields["name"]
    made = local_job({"convert": job.output}, {"structure": model.to_json(), "quantization": fields}, work / "quantize")
    made.materials = job.materials
    quantize.run(made)
    return dict(read_tensors(made.output))


def expected(state: dict[str, Any], model: Structure) -> dict[str, npt.NDArray[np.float32]]:
    return {each.name: np.concatenate([state[source] for source in each.sources]) for each in parameters(model)}


@pytest.mark.parametrize("shard", ["1GB", "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_unquantized(tmp_path: Path, dtype: str, tied: bool, shard: str) -> None:
    state = save(tmp_path / "model", tied, shard, dtype)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shard == "40KB")
    model = structure(tmp_path / "model")
    read = run_quantize(run_convert(tmp_path / "model", model, tmp_path), model, Q0F32, tmp_path)
    wanted = expected(state, model)
    assert list(read) == list(wanted)
    assert ("lm_head.weight" in read) != tied
    for name, value in wanted.items():
        assert np.array_equal(read[name], value), name


def test_q4f16_1(tmp_path: Path) -> None:
    state = save(tmp_path / "model")
    model = structure(tmp_path / "model")
    read = run_quantize(run_convert(tmp_path / "model", model, tmp_path), model, Q4F16, tmp_path)
    for name, value in expected(state, model).items():
        if value.ndim == 1:
            assert np.array_equal(read[name], value.astype(np.float16))
            continue
        prefix = name.removesuffix("weight")
        packed = Packed(read[f"{prefix}q_weight"], read[f"{prefix}q_scale"])
        decoded = group.decode(packed, value.shape[1], NK, "float16")
        assert np.abs(decoded - value).max() <= 0.51 * packed.scales.astype(np.float32).max()


def test_the_index_is_the_same_bytes_each_time_and_copies_nothing(tmp_path: Path) -> None:
    save(tmp_path / "model")
    model = structure(tmp_path / "model")
    one, two = (run_convert(tmp_path / "model", model, tmp_path / name) for name in ("one", "two"))
    assert [path.name for path in one.output.iterdir()] == ["parameters.json"]
    assert (one.output / "parameters.json").read_bytes() == (two.output / "parameters.json").read_bytes()


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (1, "config.json says num_hidden_layers 1, but the checkpoint has tensors of layer 1: model.layers.1."),
        (3, "config.json says num_hidden_layers 3, but the checkpoint has tensors of 2 layers only (0, 1): missing "),
    ],
)
def test_config_and_checkpoint_disagree(tmp_path: Path, layers: int, text: str) -> None:
    save(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        run_convert(tmp_path / "model", structure(tmp_path / "model", num_hidden_layers=layers), tmp_path)
    assert str(error.value).startswith(text)
    assert not list((tmp_path / "convert" / "output").iterdir())


def test_leftover_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    save(tmp_path / "model", dtype="float32")
    path = tmp_path / "model" / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(2)}
    save_file(load_file(path) | extra, path)
    run_convert(tmp_path / "model", structure(tmp_path / "model"), tmp_path)


def test_the_checkpoint_is_an_input_of_files(tmp_path: Path) -> None:
    save(tmp_path / "model")
    job = local_job({"checkpoint": tmp_path / "model"}, {}, tmp_path / "job")
    tree: Tree = job.inputs["checkpoint"].select(["config.json"])
    empty = local_job({"checkpoint": tree}, {"structure": structure(tmp_path / "model").to_json()}, tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"no weights: expected model\.safetensors"):
        convert.run(empty)


def test_the_locked_config_is_that_of_the_file(tmp_path: Path) -> None:
    """FAULTS A4: with another rope_theta in recipes.lock, the model was built with the wrong rotary base."""
    save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    shape = structure(tmp_path / "model").to_json()
    fields = {"structure": shape, "config": config}
    convert.run(local_job({"checkpoint": tmp_path / "model"}, fields, tmp_path / "same"))
    del config["rope_parameters"]
    fields = {"structure": shape, "config": {**config, "hidden_size": 64, "one": 1}}
    with pytest.raises(CheckpointError) as error:
        convert.run(local_job({"checkpoint": tmp_path / "model"}, fields, tmp_path / "other"))
    assert str(error.value) == (
        "recipes.lock: the config of the model is not that of the locked commit: `hidden_size` is 64, and 48 in "
        "config.json; `one` is 1, and absent in config.json; `rope_parameters` is absent, and "
        '{"rope_theta": 10000.0, "rope_type": "default"} in config.json; '
        "restore recipes.lock from version control, or run `mlcbuild lock --update`"
    )
