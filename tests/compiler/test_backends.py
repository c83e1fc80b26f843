"""The doors of all backends are alike, and what backends change of TVM's is looked at before."""

from __future__ import annotations

import inspect

import pytest
from tvm.script import tirx as T

from mlcbuild.compiler.cpu import build as cpu_build
from mlcbuild.compiler.cpu import lower as cpu_lower
from mlcbuild.compiler.gpu import attention
from mlcbuild.compiler.gpu import build as gpu_build
from mlcbuild.compiler.gpu import lower as gpu_lower
from mlcbuild.compiler.script import quick
from mlcbuild.compiler.vulkan import build as vulkan_build
from mlcbuild.errors import MlcBuildError


def test_backends_have_the_same_doors() -> None:
    """A step calls what the target's backend has there, whichever that is; only options may be a backend's own."""
    first = [*inspect.signature(cpu_lower.lower).parameters.values()]
    assert [*inspect.signature(gpu_lower.lower).parameters.values()] == first
    first = [*inspect.signature(cpu_build.build).parameters.values()]
    for module in (gpu_build, vulkan_build):
        given = [*inspect.signature(module.build).parameters.values()]
        assert given[: len(first)] == first
        assert all(option.default is not option.empty for option in given[len(first) :])


def test_kernels_of_another_tvm_are_not_changed() -> None:
    """Windows and soft caps are put into TVM's kernels where these store a score; one that stores none is unknown."""

    @T.prim_func(s_tir=True, private=True)
    def other(var_x: T.handle):
        x = T.match_buffer(var_x, (4,), "float32")
        for i in T.thread_binding(4, thread="threadIdx.x"):
            with T.sblock("store"):
                x[T.axis.spatial(4, i)] = T.float32(0)

    with pytest.raises(MlcBuildError, match=r"kernels of TVM .* a score is stored .* in 0 places and not in 1"):
        attention._capped(other, 50.0)


def test_scripts_are_parsed_quickly_and_nobody_else_notices() -> None:
    before = inspect.stack
    with quick():
        from tvm.tirx.script.parser import entry

        assert inspect.stack is before
        assert entry.inspect is not inspect and entry.inspect.stack()[0].function == inspect.stack()[0].function
    assert entry.inspect is inspect
