"""What the step execute compares: two libraries of a structure, over random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.engine.job import local_job
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.few_layers import two_layers
from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.recipes.types import format_json
from mlcbuild.runtime.library import Library
from mlcbuild.steps import execute
from mlcbuild.verify import engine_calls, execution, random_weights
from tests.architectures import sink_cases
from tests.architectures.agreement import config_of
from tests.support import llama

DEEP = replace(llama.structure_of(llama.transformers_llama()), num_hidden_layers=5)
MODEL = two_layers(DEEP)
WIDE = replace(MODEL, hidden_size=128, intermediate_size=256, head_dim=32)  # whole groups of 128


def test_two_layers_have_the_widths_of_all() -> None:
    assert MODEL.num_hidden_layers == 2
    assert (MODEL.hidden_size, MODEL.head_dim) == (DEEP.hidden_size, DEEP.head_dim)
    assert two_layers(MODEL) == two_layers(replace(DEEP, num_hidden_layers=2))


@pytest.mark.parametrize("name", ["q4f16_1", "q0f32", "q4f16_autoawq"])
def test_random_weights_are_the_same_each_time(name: str, tmp_path: Path) -> None:
    def made(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        form = llama.QUANTIZATIONS[name]
        random_weights.make(WIDE, execution.VOCABULARY, form, folder / "weights", folder)
        return {path.name: path.read_bytes() for path in (folder / "weights").iterdir()}

    assert made(tmp_path / "one") == made(tmp_path / "two")


def test_random_norms_of_heads_make_scores_of_one_size(tmp_path: Path) -> None:
    """Gemma 4 has no scale of scores: of 512 products, one key would have all of the softmax."""
    given = {**config_of(sink_cases.CASES["gemma4_text"]), "per_layer_config": {}, "global_head_dim": 512}
    model = two_layers(resolve(llama.architecture("gemma4_text"), given, {}))
    form = llama.QUANTIZATIONS["q0f32"]
    random_weights.make(model, execution.VOCABULARY, form, tmp_path / "weights", tmp_path)
    wanted = parameters(replace(model, vocab_size=execution.VOCABULARY))
    made = {name: value for name, value in dequantized(tmp_path / "weights", wanted, form) if "k_norm" in name}
    centres = {value.size: float(value.mean()) for value in made.values()}
    assert set(centres) == {16, 512}
    assert all(abs(centre * size**0.25 - 1) < 0.1 for size, centre in centres.items())


def test_experts_that_are_alike_may_be_taken_for_one_another() -> None:
    errors = {"prefill": 0.3, "decode": 0.001, "batch decode": 0.002}
    assert execution.problems(errors, MODEL, "float16") == [
        "prefill: logits are off by 0.3 of their deviation; float16 explains 0.01"
    ]
    experts = replace(MODEL, num_experts=4)
    assert not execution.problems(errors, experts, "float16")
    assert execution.problems({**errors, "head, 20 rows": 0.3}, experts, "float16") == [
        "head, 20 rows: logits are off by 0.3 of their deviation; float16 explains 0.01"
    ]
    assert execution.problems({"decode": float("nan")}, MODEL, "float16")


@pytest.mark.slow
def test_a_library_that_computes_something_else_stops_the_package(tmp_path: Path) -> None:
    """The step, as on a GPU of this machine, with CPU libraries in the place of both."""

    def run(name: str, theta: float) -> dict[str, Any]:
        llama.build_library(replace(MODEL, rope_theta=theta), "q4f16_1", tmp_path / name)
        fields = {"structure": MODEL.library_json(), "quantization": format_json(llama.QUANTIZATIONS["q4f16_1"])}
        folders = {"library": tmp_path / name, "cpu_library": tmp_path / "cpu"}
        job = local_job(folders, {**fields, "device": "NVIDIA H100"}, tmp_path / f"job-{name}")
        execute.run(job)
        found: dict[str, Any] = json.loads((job.output / "execution.json").read_text())
        return found

    llama.build_library(MODEL, "q4f16_1", tmp_path / "cpu")
    found = run("right", MODEL.rope_theta)
    assert (found["executed"], found["device"], found["layers"]) == ("device", "NVIDIA H100", 2)
    assert set(found["errors"].values()) == {0.0} and found["bound"] == 0.01
    assert {"apply_penalty_inplace", "gather_hidden_states", "softmax_with_temperature"} <= set(found["functions"])
    with pytest.raises(MlcBuildError) as error:
        run("wrong", MODEL.rope_theta / 100)
    assert str(error.value).startswith("the library does not compute what the CPU's does:\nprefill: logits are off by ")

    library = Library(next((tmp_path / "cpu").glob("model.*")))
    calls = {call.name: call for call in engine_calls.calls()}
    wrong = replace(calls["apply_bitmask_inplace"], expected=(np.ones((3, 70), np.float32),))
    said = engine_calls.problem(library, wrong, "float16")
    assert said is not None and said.startswith("apply_bitmask_inplace: result 0 is off by 3.4e+38")
    right = calls["apply_bitmask_inplace"]
    louder = right.expected[0] * np.where(right.expected[0] < -1e30, 1, np.float32(1.01))
    said = engine_calls.problem(library, replace(right, expected=(louder,)), "float16")
    assert said is not None and said.startswith("apply_bitmask_inplace: result 0 is off by 0.0")
