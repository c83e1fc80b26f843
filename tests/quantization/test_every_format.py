"""Every quantization that ships, from a checkpoint to a weights folder, against formulas.py: the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.quantization.stream import quantize
from mlcbuild.quantization.tensor_cache import read_tensors
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Quantization
from tests.checkpoints.files import write
from tests.quantization.formulas import Symmetric, asymmetric, outer

STOCK = load(Path(__file__).parents[2]).quantizations

# name -> (formula, layout of linear layers, whether embedding and lm_head are packed), from QUANTIZATION's tables.
FORMULAS: dict[str, tuple[Any, str, bool, bool]] = {
    "q3f16_0": (Symmetric(3, 40, 32, "float16"), "KN", True, True),
    "q3f16_1": (Symmetric(3, 40, 32, "float16"), "NK", True, True),
    "q4f16_0": (Symmetric(4, 32, 32, "float16"), "KN", True, True),
    "q4f16_1": (Symmetric(4, 32, 32, "float16"), "NK", True, True),
    "q4f16_2": (Symmetric(4, 32, 32, "float16"), "NK", False, False),
    "q4bf16_0": (Symmetric(4, 32, 32, "bfloat16"), "KN", True, True),
    "q4bf16_1": (Symmetric(4, 32, 32, "bfloat16"), "NK", True, True),
    "q4f32_1": (Symmetric(4, 32, 32, "float32"), "NK", True, True),
    "q8f16_1": (Symmetric(8, 32, 32, "float16"), "NK", True, True),
    "q8f32_1": (Symmetric(8, 32, 32, "float32"), "NK", True, True),
    "q3f16_0_2023": (Symmetric(3, 40, 16, "float16", 1e-4), "KN", True, True),
    "q4f16_0_2023": (Symmetric(4, 32, 32, "float16", 1e-4), "KN", True, True),
    "q4f32_0": (asymmetric, "KN", True, True),
    "q8f16_0": (outer, "KN", False, True),
}
UNQUANTIZED = {"q0f16", "q0bf16", "q0f32"}
# Not what needs an AWQ checkpoint (tests/checkpoints/test_prequantized.py) or importances (test_quantize_stream.py).
MADE_HERE = [
    name for name, each in STOCK.items() if name != "q4f16_autoawq" and each.rounding not in ("calibrated", "gptq")
]

# 96 and 160 columns are whole groups of 32; 96 is not of 40.
SHAPES = {
    "embed.weight": (10, 96),
    "q.weight": (8, 96),
    "k.weight": (4, 96),
    "down_proj.weight": (12, 160),
    "tall_proj.weight": (200, 96),
    "norm.weight": (96,),
    "lm_head.weight": (10, 96),
}
PARAMETERS = (
    Parameter("embed.weight", (10, 96), "embedding", ("embed.weight",)),
    Parameter("qkv_proj.weight", (12, 96), "qkv_proj", ("q.weight", "k.weight")),
    Parameter("down_proj.weight", (12, 160), "down_proj", ("down_proj.weight",)),
    Parameter("tall_proj.weight", (200, 96), "o_proj", ("tall_proj.weight",)),
    Parameter("norm.weight", (96,), "final_norm", ("norm.weight",)),
    Parameter("lm_head.weight", (10, 96), "lm_head", ("lm_head.weight",)),
)


def tensors(source: str) -> dict[str, npt.NDArray[Any]]:
    """Weights of several sizes, with groups of zeros, of one value, and of float16 denormals."""
    rng = np.random.default_rng(5)
    made = {}
    for name, shape in SHAPES.items():
        values = (rng.standard_normal(shape) * 0.02).astype(np.float32)
        if values.ndim == 2:
            values[0] = 0
            values[1] = 0.0123
            values[2] *= 1e-5
            values[3] *= 100
            values[:, 7] = 0
        made[name] = floats.cast(values, "float32", source)
    return made


def made_by(quantization: Quantization, source: str, folder: Path) -> dict[str, npt.NDArray[Any]]:
    path = write(folder / "model.safetensors", tensors(source))
    document = index(PARAMETERS, read_table({path.name: path}, {path.name: "digest"}))
    (folder / "out").mkdir()
    quantize(document, {"digest": path}, PARAMETERS, quantization, folder / "out")
    return dict(read_tensors(folder / "out"))


def parameter_values(source: str) -> dict[str, npt.NDArray[np.float32]]:
    values = {name: floats.widen(value, source) for name, value in tensors(source).items()}
    return {each.name: np.concatenate([values[name] for name in each.sources]) for each in PARAMETERS}


def expected(name: str, values: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[Any]]:
    formula, layout, embedding, lm_head = FORMULAS[name]
    made: dict[str, npt.NDArray[Any]] = {}
    for each in PARAMETERS:
        w = values[each.name]
        prefix = each.name.removesuffix("weight")
        if w.ndim == 1 or (each.role == "embedding" and not embedding) or (each.role == "lm_head" and not lm_head):
            made[each.name] = floats.cast(w, "float32", STOCK[name].model_dtype)
            continue
        turned = layout == "KN" and each.role != "embedding"
        if formula is outer:
            codes, *vectors = outer(w)
            names = ("q_scale_in", "q_scale_out", "q_min_in", "q_min_out")
            made |= {f"{prefix}q_weight": codes.T}
            made |= {prefix + last: vector for last, vector in zip(names, vectors, strict=True)}
            continue
        words, scales = asymmetric(w) if formula is asymmetric else formula.rows(w)
        made[f"{prefix}q_weight"] = words.T if turned else words
        made[f"{prefix}{'q_scale_min' if formula is asymmetric else 'q_scale'}"] = scales.T if turned else scales
    return made


def test_every_stock_quantization_is_tested_here() -> None:
    plain = {name for name, each in STOCK.items() if each.format == name and not each.overrides and not each.formats}
    assert plain == {*FORMULAS, *UNQUANTIZED, "q4f16_autoawq"}


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMULAS)
def test_bytes(name: str, source: str, tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    made = made_by(STOCK[name], source, tmp_path)
    wanted = expected(name, parameter_values(source))
    assert list(made) == list(wanted)
    for tensor, values in wanted.items():
        assert made[tensor].dtype == values.dtype and made[tensor].shape == values.shape, tensor
        same = made[tensor] == values  # -0 is 0, and a test of 0.0 == -0.0 would hide nothing here
        assert same.all(), (tensor, np.argwhere(~same)[:5])


@pytest.mark.parametrize("name", sorted(UNQUANTIZED))
def test_unquantized(name: str, tmp_path: Path) -> None:
    quantization = STOCK[name]
    made = made_by(quantization, "float32", tmp_path)
    for tensor, values in parameter_values("float32").items():
        assert np.array_equal(made[tensor], floats.cast(values, "float32", quantization.model_dtype))


@pytest.mark.parametrize("name", MADE_HERE)
def test_the_folder_holds_what_a_library_will_declare(name: str, tmp_path: Path) -> None:
    quantization = STOCK[name]
    made = made_by(quantization, "bfloat16", tmp_path)
    stored = {"bfloat16": "uint16"}
    declared = [(each.name, each.shape, stored.get(each.dtype, each.dtype))
                for each in quantized_parameters(PARAMETERS, quantization)]  # fmt: skip
    assert declared == [(tensor, values.shape, values.dtype.name) for tensor, values in made.items()]


# Mean error over mean magnitude, on normally distributed weights: what a format loses.
LOSS = {"q0": 0.002, "q8": 0.008, "q4": 0.12, "q3": 0.28}


@pytest.mark.parametrize("name", MADE_HERE)
def test_what_a_format_loses(name: str, tmp_path: Path) -> None:
    quantization = STOCK[name]
    made_by(quantization, "float32", tmp_path)
    wanted = parameter_values("float32")
    read = dict(dequantized(tmp_path / "out", PARAMETERS, quantization))
    assert list(read) == list(wanted)
    # Without groups, the one row of large values costs all others.
    limit = 0.15 if name == "q8f16_0" else LOSS[quantization.kind]
    for tensor, values in wanted.items():
        rows = slice(4, None) if values.ndim == 2 else slice(None)  # the first four are made to be odd
        loss = np.abs(read[tensor] - values)[rows].mean() / np.abs(values)[rows].mean()
        assert loss <= limit, tensor
