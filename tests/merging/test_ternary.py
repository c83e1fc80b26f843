"""BitNet's matrices of three values: packed as transformers packs them, or made of what they were rounded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlcbuild.checkpoints.computed import Computed
from mlcbuild.checkpoints.table import read_table
from mlcbuild.errors import CheckpointError
from mlcbuild.merging import low_floats
from mlcbuild.merging.prequantized import scheme

NAME = "model.layers.0.mlp.up_proj.weight"
RANDOM = torch.Generator().manual_seed(3)
SIGNS = torch.randint(-1, 2, (24, 10), generator=RANDOM)


def packed_by_transformers() -> torch.Tensor:
    from transformers.integrations.bitnet import pack_weights  # seconds, of every run that collects this file

    packed: torch.Tensor = pack_weights(SIGNS.clone())
    return packed


def config(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", **changes}}


def made(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> np.ndarray[Any, Any]:
    save_file(tensors, folder / "model.safetensors")
    found = scheme(config(**changes))
    assert found is not None
    each: Computed
    (each,) = low_floats.plan(read_table({"model.safetensors": folder / "model.safetensors"}), found)[1]
    assert (each.target.name, each.target.dtype) == (NAME, "F32")
    values = np.concatenate(list(each.pieces()))
    assert values.shape == each.target.shape
    return values


@pytest.mark.parametrize(("layers", "power"), [("autobitlinear", 1), ("bitlinear", -1)])
def test_packed_matrices_are_what_transformers_multiplies_with(layers: str, power: int, tmp_path: Path) -> None:
    scale = torch.tensor([1.21875]).bfloat16()
    stored = {NAME: packed_by_transformers(), f"{NAME}_scale": scale, "model.norm.weight": torch.ones(10)}
    values = made(tmp_path, stored, linear_class=layers)
    np.testing.assert_array_equal(values, (SIGNS.float() * scale.float() ** power).numpy())


def test_what_matrices_are_rounded_from(tmp_path: Path) -> None:
    """The arithmetic of transformers' WeightQuant, which it has compiled."""
    weight = torch.randn((24, 10), generator=RANDOM).bfloat16()
    scale = 1.0 / weight.float().abs().mean()
    expected = (weight.float() * scale).round().clamp(-1, 1) / scale
    values = made(tmp_path, {NAME: weight, "model.norm.weight": torch.ones(10)}, quantization_mode="online")
    assert len(np.unique(values)) == 3
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-6)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    packed = packed_by_transformers()
    where = f"model.safetensors: tensor {NAME}"
    with pytest.raises(CheckpointError) as error:
        made(tmp_path, {NAME: packed})
    assert str(error.value) == f"{where}: there is no {NAME}_scale beside it that is one float"
    with pytest.raises(CheckpointError, match=r"but it has no tensor x_proj\.weight"):
        made(tmp_path, {NAME: torch.ones((4, 4))})
    packed[1, 2] |= 3
    with pytest.raises(CheckpointError) as error:
        made(tmp_path, {NAME: packed, f"{NAME}_scale": torch.ones(1)})
    assert str(error.value) == f"{where}: a number of none of three values; it is damaged"
    with pytest.raises(CheckpointError) as error:
        made(tmp_path, {NAME: packed, f"{NAME}_scale": torch.zeros(1)})
    assert str(error.value) == f"{where}_scale: 0.0; the checkpoint is damaged"
    with pytest.raises(CheckpointError, match="norms inside of matrices are not computed"):
        scheme(config(use_rms_norm=True))
    with pytest.raises(CheckpointError, match="linear_class 'other' with quantization_mode 'offline'"):
        scheme(config(linear_class="other"))
