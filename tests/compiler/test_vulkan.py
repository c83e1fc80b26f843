"""SPIR-V kernels: what has none is named, what is made is valid, and where a library carries it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T

from mlcbuild.compiler import assemble
from mlcbuild.compiler.gpu import lower
from mlcbuild.compiler.vulkan import build, kernel, packing, validator
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.recipes.types import Linker
from tests.support import device_code, llama, spirv
from tests.support.tools import missing

CONFIG = Path(__file__).parents[2] / "recipes" / "models" / "stories" / "config.json"


def elementwise(value: Any, dtype: str, made: str) -> Any:
    """A scheduled function: made[i] = value(x[i], y[i]) for 64 numbers."""

    @T.prim_func(s_tir=True)
    def function(var_x: T.handle, var_y: T.handle, var_result: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(var_x, (64,), dtype)
        y = T.match_buffer(var_y, (64,), dtype)
        result = T.match_buffer(var_result, (64,), made)
        for i in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("value"):
                at = T.axis.spatial(64, i)
                result[at] = value(x[at], y[at])

    return function


NUMBERS = {
    "int32": np.arange(-32, 32, dtype=np.int32),
    "uint32": np.arange(64, dtype=np.uint32) * np.uint32(0x04000001),
    "float32": np.linspace(-20, 20, 64, dtype=np.float32),
}
OTHERS = {
    "int32": np.resize(np.array([3, -5, 7, -2], np.int32), 64),
    "uint32": np.resize(np.array([3, 5, 31, 2], np.uint32), 64),
    "float32": np.resize(np.array([0.5, -3, 2.25, 7], np.float32), 64),
}
OPERATIONS: dict[str, tuple[str, str, Any, Any]] = {
    "floor of a quotient": ("int32", "int32", tirx.floordiv, np.floor_divide),
    "rest above": ("int32", "int32", tirx.floormod, np.mod),
    "quotient": ("int32", "int32", tirx.truncdiv, lambda a, b: np.trunc(a / b).astype(np.int32)),
    "rest": ("int32", "int32", tirx.truncmod, np.fmod),
    "unsigned quotient": ("uint32", "uint32", tirx.truncdiv, np.floor_divide),
    "shift of a signed number": ("int32", "int32", lambda a, b: a >> (b & 7), lambda a, b: a >> (b & 7)),
    "shift": ("uint32", "uint32", lambda a, b: a >> b, lambda a, b: a >> b),
    "unsigned order": ("uint32", "int32", lambda a, b: tirx.Cast("int32", a < b), lambda a, b: (a < b) * np.int32(1)),
    "wider": ("int32", "int64", lambda a, b: tirx.Cast("int64", a) * 2**32, lambda a, b: a.astype(np.int64) << 32),
    "wider, unsigned": ("uint32", "int64", lambda a, b: tirx.Cast("int64", a), lambda a, b: a.astype(np.int64)),
    "narrower": ("int32", "int8", lambda a, b: tirx.Cast("int8", a * 5), lambda a, b: (a * 5).astype(np.int8)),
    "bits": ("uint32", "float32", lambda a, b: tirx.reinterpret("float32", a & 0x3FFFFFFF),
             lambda a, b: (a & np.uint32(0x3FFFFFFF)).view(np.float32)),
    "whole number": ("float32", "int32", lambda a, b: tirx.Cast("int32", a), lambda a, b: a.astype(np.int32)),
    "half": ("float32", "float16", lambda a, b: tirx.Cast("float16", a), lambda a, b: a.astype(np.float16)),
    "least": ("float32", "float32", tirx.min, np.minimum),
    "tanh": ("float32", "float32", lambda a, b: tirx.tanh(a * 10), lambda a, b: np.tanh(a * 10)),
    "exp2": ("float32", "float32", lambda a, b: tirx.exp2(a), lambda a, b: np.exp2(a)),
    "root": ("float32", "float32", lambda a, b: tirx.rsqrt(a * a + 1), lambda a, b: 1 / np.sqrt(a * a + 1)),
    "truth": ("float32", "bool", lambda a, b: tirx.all(a < b, a > -10), lambda a, b: (a < b) & (a > -10)),
    "choice": ("float32", "float32", lambda a, b: tirx.Select(a < b, a, b), np.minimum),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_operators(name: str) -> None:
    dtype, made, value, expected = OPERATIONS[name]
    x, y = NUMBERS[dtype], OTHERS[dtype]
    (one,) = spirv.kernels(elementwise(value, dtype, made))
    got = one.run((1, 1, 1), {"x": x, "y": y, "result": np.zeros(64, made)}, {})["result"]
    np.testing.assert_allclose(got, expected(x, y), rtol=2e-5 if made == "float32" else 0)


@T.prim_func(s_tir=True)
def seventeen_numbers(
    var_result: T.handle,
    n0: T.int32, n1: T.int32, n2: T.int32, n3: T.int32, n4: T.int32, n5: T.int32, n6: T.int32, n7: T.int32,
    n8: T.int32, n9: T.int32, n10: T.int32, n11: T.int32, n12: T.int32, n13: T.int32, n14: T.int32, n15: T.int32,
    n16: T.int32,
):  # fmt: skip
    T.func_attr({"tirx.noalias": True})
    result = T.match_buffer(var_result, (17,), "int32")
    for i in T.thread_binding(17, thread="threadIdx.x"):
        with T.sblock("value"):
            at = T.axis.spatial(17, i)
            result[at] = (
                (n0 + n1 + n2 + n3 + n4 + n5 + n6 + n7) * at + n8 + n9 + n10 + n11 + n12 + n13 + n14 + n15 - n16
            )


@pytest.mark.slow
def test_more_numbers_than_push_constants_hold() -> None:
    """The runtime is told by a flag, and fills a uniform buffer."""
    (one,) = spirv.kernels(seventeen_numbers)
    assert one.made.flag == 1 and len(one.made.parameters) == 18
    numbers = {f"n{i}": i * i + 1 for i in range(17)}
    got = one.run((1, 1, 1), {"result": np.zeros(17, np.int32)}, numbers)["result"]
    n = list(numbers.values())
    assert (got == sum(n[:8]) * np.arange(17) + sum(n[8:16]) - n[16]).all()


@T.prim_func(s_tir=True)
def turned_round(var_x: T.handle, var_result: T.handle):
    """result[i] = x[63 - i], by way of what another thread has written into the buffer."""
    T.func_attr({"tirx.noalias": True})
    x = T.match_buffer(var_x, (64,), "float32")
    result = T.match_buffer(var_result, (64,), "float32")
    for i in T.thread_binding(64, thread="threadIdx.x"):
        with T.sblock("exchange"):
            T.reads(x[0:64])
            T.writes(result[0:64])
            taken = T.sblock_alloc_buffer((1,), "float32", scope="local")
            result[i] = x[i]
            T.tvm_storage_sync("shared")
            taken[0] = result[63 - i]
            T.tvm_storage_sync("shared")
            result[i] = taken[0]


@pytest.mark.slow
def test_threads_of_a_block_tell_each_other_something_in_a_buffer() -> None:
    """Its caches are passed by for the buffer, and not for the one that is only read."""
    (one,) = spirv.kernels(turned_round)
    x = np.arange(64, dtype=np.float32)
    got = one.run((1, 1, 1), {"x": x, "result": np.zeros(64, np.float32)}, {})
    assert (got["result"] == x[::-1]).all()
    assert decorated(one.made, 23) == [one.names.index("result")]  # coherent
    assert decorated(one.made, 24) == [one.names.index("x")]  # not written


def decorated(made: kernel.Kernel, decoration: int) -> list[int]:
    """The bindings of the buffers with a decoration that has no operand."""
    words, found, bindings, at = made.words, [], {}, 5
    while at < len(made.words):
        size, op = words[at] >> 16, words[at] & 0xFFFF
        if op == 71 and words[at + 2] == 33:
            bindings[words[at + 1]] = words[at + 3]
        if op == 71 and words[at + 2] == decoration:
            found.append(words[at + 1])
        at += size
    return [bindings[each] for each in found]


def test_what_spirv_lacks_is_named() -> None:
    (function,) = device_code.device_functions(
        elementwise(lambda a, b: tirx.erf(a), "float32", "float32"), spirv.TARGET
    )
    with pytest.raises(MlcBuildError, match=r"kernel main_kernel: no SPIR-V can be made of erff? of float32"):
        kernel.translate(function, 0)


@pytest.mark.slow
def test_a_device_that_lacks_what_kernels_need(tmp_path: Path) -> None:
    stories = dataclasses.replace(resolve(llama.architecture(), json.loads(CONFIG.read_text()), {}), vocab_size=1)
    module = lower.lower(stories, llama.QUANTIZATIONS["q0f16"], "q0f16", spirv.TARGET)
    assemble.save(module, tmp_path / "module.json")
    linker = Linker("zig", "x86_64-linux-gnu.2.28", (), ())
    host = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
    device = {key: value for key, value in spirv.TARGET.items() if key != "supports_float16"}
    with pytest.raises(MlcBuildError, match=r"kernel \w+: needs float16, which the target's `supports` does not list"):
        build.build(tmp_path / "module.json", device, host, linker, tmp_path / "model.so", tmp_path)


def blob(*modules: tuple[str, bytes]) -> bytes:
    """What a library carries: the import tree of `modules`, then their kinds and contents."""

    def text(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + content

    tree = struct.pack("<4Q", 3, 0, 1, 1) + struct.pack("<2Q", 1, 1)
    rest = tree + b"".join(text(kind.encode()) + (b"" if kind == "_lib" else text(of)) for kind, of in modules)
    return struct.pack("<Q", len(rest)) + rest


def test_a_module_takes_the_place_that_was_held_for_it() -> None:
    given = blob(("relax.VMExecutable", b"vm"), ("_lib", b""), ("opencl", b"nothing"))
    made = packing.replace(given, "opencl", b"kernels")
    assert made == blob(("relax.VMExecutable", b"vm"), ("_lib", b""), ("vulkan", b"kernels"))
    with pytest.raises(ValueError, match="0 modules of the kind metal, and not one"):
        packing.replace(given, "metal", b"")


def test_a_module_is_what_the_runtime_reads() -> None:
    """The text of its kind, a map to functions (name, dtypes, tags), a map to shaders (flag, words)."""
    made = packing.content([kernel.Kernel("k", [0x07230203, 7], 1, ["handle", "int64"], ["blockIdx.x"])])

    def text(content: str) -> bytes:
        return struct.pack("<Q", len(content)) + content.encode()

    dtypes = struct.pack("<Q", 2) + bytes([3, 64, 1, 0]) + bytes([0, 64, 1, 0])
    tags = struct.pack("<Q", 1) + text("blockIdx.x") + struct.pack("<Q2I", 2, 0, 0)
    shader = struct.pack("<IQ2I", 1, 2, 0x07230203, 7)
    one = struct.pack("<Q", 1)
    functions = one + text("k") + text("k") + dtypes + tags
    assert made == text("vulkan") + functions + one + text("k") + struct.pack("<Q", len(shader)) + shader


def test_what_spirv_val_does_not_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = kernel.Kernel("linear_kernel", [0x07230203, 0x00010000, 0, 1, 0], 0, [], [])
    if shutil.which("spirv-val") is None:
        missing("spirv-val (apt install spirv-tools)")
    problem = r"kernel linear_kernel: spirv-val does not accept it \(1\):\nerror: .*OpMemoryModel"
    with pytest.raises(MlcBuildError, match=problem):
        validator.validate([wrong], tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without one, nothing is asked
    validator.validate([wrong], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1", "q8f16_0"])
def test_every_kernel_of_a_model_is_valid(quantization: str, tmp_path: Path) -> None:
    import tvm_ffi
    from tvm import get_global_func, relax, target, transform
    from tvm.ir import IRModule

    if shutil.which("spirv-val") is None:
        missing("spirv-val (apt install spirv-tools)")
    stories = dataclasses.replace(resolve(llama.architecture(), json.loads(CONFIG.read_text()), {}), vocab_size=1)
    module = lower.lower(stories, llama.QUANTIZATIONS[quantization], quantization, spirv.TARGET)
    made: list[kernel.Kernel] = []

    def take(functions: Any, _: object) -> Any:
        made.extend(kernel.translate(each, 32768) for each in functions.functions.values())
        return get_global_func("target.build.opencl")(IRModule({}), target.Target("opencl"))

    tvm_ffi.register_global_func("target.build.vulkan", take, override=True)
    both = target.Target(dict(spirv.TARGET), host={"kind": "llvm", "mtriple": "x86_64-linux-gnu"})
    with both, transform.PassContext(config={"tirx.disable_cse_tir": True}):
        relax.build(module, target=both, relax_pipeline=None)
    validator.validate(made, tmp_path)
    assert {"attention_prefill_kernel", "attention_decode_kernel", "linear_kernel_2"} <= {each.name for each in made}
