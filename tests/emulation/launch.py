"""`python -m tests.emulation.launch THREADS`: the kernel `test` of the CUDA source on stdin, on 64 floats; a report."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

from mlcbuild.emulation import cuda
from tests.support import zig_cache

VALUES = 64


class Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


def main(threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        zig_cache.share(Path(folder))
        cuda.load(Path(folder))
        cuda.check()
        image = cuda.compile_source(sys.stdin.read(), Path(folder))
        driver = ctypes.CDLL("libcudart.so.13")
        module, function, place = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0
        assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"test") == 0
        assert driver.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(4 * VALUES)) == 0
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(place))
        config = Config(2, 1, 1, threads, 1, 1, 0, None, None, 0)
        status = driver.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
        values = (ctypes.c_float * VALUES).from_address(place.value or 0)
        print(status, cuda.report().notes, [round(value, 3) for value in values[:4]])


if __name__ == "__main__":
    main(int(sys.argv[1]))
