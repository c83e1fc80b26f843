"""Experts [experts, N, K]: each is packed as a matrix of its own would be, one after the other, in every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import sources
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.quantization.stream import quantize
from mlcbuild.quantization.tensor_cache import read_tensors
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Quantization
from mlcbuild.verify.tensors import Unquantized
from tests.checkpoints.files import write

Arrays = dict[str, npt.NDArray[Any]]
STOCK = load(Path(__file__).parents[2]).quantizations
MADE_HERE = [
    name for name, each in STOCK.items() if name != "q4f16_autoawq" and each.rounding not in ("calibrated", "gptq")
]

E, N, K = 3, 24, 96
SEPARATE = tuple(f"experts.{e}.{name}.weight" for e in range(E) for name in ("gate", "up"))
EXPERTS = Parameter("moe.weight", (E, N, K), "experts_gate_up_proj", SEPARATE)
FUSED = replace(EXPERTS, sources=("experts.gate_up",))
ONE_BY_ONE = tuple(Parameter(f"{e}.weight", (N, K), "gate_up_proj", SEPARATE[2 * e : 2 * e + 2]) for e in range(E))
ROUTER = Parameter("gate.weight", (E, K), "router", ("gate.weight",))


def tensors() -> Arrays:
    rng = np.random.default_rng(2)
    made = {name: (rng.standard_normal((N // 2, K)) * 0.02).astype(np.float16) for name in SEPARATE}
    made["gate.weight"] = rng.standard_normal((E, K)).astype(np.float16)
    return made


def fused(values: Arrays) -> Arrays:
    return {
        "experts.gate_up": np.concatenate([values[name] for name in SEPARATE]).reshape(E, N, K),
        "gate.weight": values["gate.weight"],
    }


def run(
    folder: Path, parameters: tuple[Parameter, ...], quantization: Quantization, values: Arrays, **options: Any
) -> Arrays:
    (folder / "out").mkdir(parents=True)
    path = write(folder / "model.safetensors", values)
    unused = {name for name in values if not any(name in each.sources for each in parameters)}
    document = index(parameters, read_table({path.name: path}, {path.name: "digest"}), unused)
    quantize(document, {"digest": path}, parameters, quantization, folder / "out", **options)
    return dict(read_tensors(folder / "out"))


@pytest.mark.parametrize("name", MADE_HERE)
def test_experts_are_packed_one_by_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization = STOCK[name]
    monkeypatch.setattr(sources, "PIECE", 10 * K)  # pieces end within experts, and must end with them
    packed = run(tmp_path / "a", (EXPERTS,), quantization, tensors())
    # A matrix of a role that is always NK where it is in groups, which is how experts are packed.
    grouped = quantization.weights is not None and quantization.weights.scheme == "group"
    other = replace(quantization, embedding="quantized")
    role = "embedding" if grouped else "gate_up_proj"
    matrices = run(tmp_path / "b", tuple(replace(each, role=role) for each in ONE_BY_ONE), other, tensors())
    for tensor, values in packed.items():
        part = tensor.rsplit(".", 1)[1]
        assert (values == np.stack([matrices[f"{e}.{part}"] for e in range(E)])).all(), tensor
    again = run(tmp_path / "c", (FUSED,), quantization, fused(tensors()))
    assert all((again[tensor] == values).all() for tensor, values in packed.items()) and again.keys() == packed.keys()
    declared = quantized_parameters((EXPERTS,), quantization)
    assert [(each.name, each.shape) for each in declared] == [(each, values.shape) for each, values in packed.items()]


@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q4f32_0", "q8f16_0", "q0f16"])
def test_they_are_unpacked_again(name: str, tmp_path: Path) -> None:
    run(tmp_path / "a", (EXPERTS,), STOCK[name], tensors())
    ((_, values),) = dequantized(tmp_path / "a" / "out", (EXPERTS,), STOCK[name])
    expected = fused(tensors())["experts.gate_up"].astype(np.float32)
    assert values.shape == (E, N, K)
    assert np.abs(values - expected).max() <= {"q0f16": 0, "q8f16_0": 0.001}.get(name, 0.02)


def test_each_expert_is_rounded_by_its_own_importance(tmp_path: Path) -> None:
    calibrated = STOCK["q4f16_1-calibrated"]
    importance = np.random.default_rng(3).random((E, K)).astype(np.float32) ** 8
    packed = run(tmp_path / "a", (EXPERTS,), calibrated, tensors(), importance={"moe.weight": importance})
    matrices = run(
        *(tmp_path / "b", ONE_BY_ONE, calibrated, tensors()),
        importance={f"{e}.weight": values for e, values in enumerate(importance)},
    )
    assert (packed["moe.q_weight"] == np.stack([matrices[f"{e}.q_weight"] for e in range(E)])).all()
    with pytest.raises(
        MlcBuildError, match=r"importance of moe.weight: shape \[96\], but the parameter is \[3, 24, 96"
    ):
        run(tmp_path / "c", (EXPERTS,), calibrated, tensors(), importance={"moe.weight": importance[0]})


def test_an_override_gives_experts_a_format_of_their_own_and_routers_stay_as_they_are(tmp_path: Path) -> None:
    quantization = replace(STOCK["q4f16_1"], overrides=(("experts_*", STOCK["q8f16_1"].weights), ("gate", None)))
    packed = run(tmp_path / "a", (EXPERTS, ROUTER), quantization, tensors())
    expected = run(tmp_path / "b", (EXPERTS,), STOCK["q8f16_1"], tensors())
    assert (packed["moe.q_weight"] == expected["moe.q_weight"]).all()
    assert (packed["gate.weight"] == tensors()["gate.weight"]).all()


def test_a_bad_value_is_named_by_its_place_in_the_checkpoint(tmp_path: Path) -> None:
    values = fused(tensors())
    values["experts.gate_up"][1, 2, 3] = np.nan
    for number, name in enumerate(("q4f16_1", "q0f16", "q8f16_0")):
        with pytest.raises(
            CheckpointError, match=r"tensor experts.gate_up \(parameter moe.weight\): NaN at \[1, 2, 3\]"
        ):
            run(tmp_path / str(number), (FUSED,), STOCK[name], values)


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    values = tensors()
    both = np.concatenate([values[SEPARATE[2]], values[SEPARATE[4]]])
    values[SEPARATE[2]], values[SEPARATE[4]] = both[:5], both[5:]  # as many rows in all, but not of each expert
    path = write(tmp_path / "model.safetensors", values)
    with pytest.raises(CheckpointError, match=r"joined by rows they are not the \[3, 24, 96\]"):
        index((EXPERTS, ROUTER), read_table({path.name: path}, {path.name: "digest"}))


def test_unquantized_rows_of_experts_count_on(tmp_path: Path) -> None:
    for number, (parameter, values) in enumerate([(EXPERTS, tensors()), (FUSED, fused(tensors()))]):
        path = write(tmp_path / f"{number}.safetensors", values)
        table = read_table({"model.safetensors": path}, {"model.safetensors": "digest"})
        checkpoint = Unquantized(index((parameter, ROUTER), table), {"digest": path})
        expected = fused(tensors())["experts.gate_up"].astype(np.float32)
        assert (checkpoint.rows("moe.weight").reshape(E, N, K) == expected).all()
        assert (checkpoint.rows("moe.weight", 30, 50) == expected.reshape(-1, K)[30:50]).all()
