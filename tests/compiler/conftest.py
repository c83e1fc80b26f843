"""What kernels for GPUs run on here."""

from __future__ import annotations

import pytest

from tests.support.gpus import DEVICES, Gpu


@pytest.fixture(scope="module", params=DEVICES, ids=lambda gpu: gpu.name)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """Each device in turn."""
    device: Gpu = request.param
    return device
