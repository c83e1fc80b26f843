"""benchmarks/gpu_model.py: its figures follow the data sheet that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks import gpu_model
from benchmarks.gpu_shapes import SHAPES

DEVICES = yaml.safe_load((Path(gpu_model.__file__).parent / "gpu_devices.yaml").read_text())


@pytest.mark.slow
def test_figures_lie_below_what_the_memory_and_the_tensor_cores_allow() -> None:
    device, shape = DEVICES["a100-80gb"], SHAPES["qwen3-0.6b"]
    found = gpu_model.figures(device, "qwen3-0.6b", 512, 512)
    assert 0.2 < found["decode"] * gpu_model.floor(shape, 1, 512, device) < 1
    assert 0.05 < found["prefill"] * gpu_model.tensor_floor(shape, 512, device) / 512 < 1
