"""What kernels for GPUs run on here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import spirv, wgsl


@pytest.fixture(scope="module", params=[wgsl, spirv], ids=["wgsl", "spirv"])
def gpu(request: pytest.FixtureRequest) -> Any:
    """The software device by way of WGSL, as TVM and naga make it, and by way of our own SPIR-V."""
    return request.param
