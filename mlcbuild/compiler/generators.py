"""The code generators that a target needs of TVM and of the LLVM in it. Those of the wheel are all there, but TVM can
be built without some, and TVM_LIBRARY_PATH lets such a one be used.

To ask TVM means to import it, so a plan does not: the steps ask, and `mlcbuild doctor`, by `python -m` of this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlcbuild.errors import Unavailable

ADVICE = "`pip install --force-reinstall mlcbuild` brings a complete one; TVM_LIBRARY_PATH must not name another"
_DEVICES = ("cuda", "llvm", "metal", "opencl", "rocm", "webgpu")  # TVM's own kinds of code
# LLVM's names of what triples begin with; of other processors nothing is said here.
_PROCESSORS = {"x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64", "wasm32": "wasm32"}


@dataclass(frozen=True)
class Generators:
    """What a TVM was built with: kinds of devices, and the processors of its LLVM."""

    devices: frozenset[str]
    processors: frozenset[str]


def installed() -> Generators:
    """Those of the TVM that is installed, which is imported."""
    import tvm
    from tvm.target import codegen

    devices = {kind for kind in _DEVICES if tvm.get_global_func(f"target.build.{kind}", allow_missing=True)}
    return Generators(frozenset(devices), frozenset(map(str, codegen.llvm_get_targets() if "llvm" in devices else ())))


def lacking(device: Mapping[str, Any], host: Mapping[str, Any], present: Generators) -> str | None:
    """What `present` lacks for these two TVM targets, and what to do about it, in one sentence; None: nothing."""
    kind = device["kind"]
    for each in (kind, "llvm"):
        if each in _DEVICES and each not in present.devices:
            return f"the TVM that is installed has no code generator for {each}: {ADVICE}"
    processors = [_PROCESSORS.get(host.get("mtriple", "").split("-")[0]), "amdgcn" if kind == "rocm" else None]
    for processor in filter(None, processors):
        if processor not in present.processors:
            return f"the LLVM of the TVM that is installed has no code generator for {processor}: {ADVICE}"
    return None


def require(device: Mapping[str, Any], host: Mapping[str, Any]) -> None:
    """Raises Unavailable where the TVM that is installed lacks a generator for the two."""
    reason = lacking(device, host, installed())
    if reason:
        raise Unavailable(reason)


if __name__ == "__main__":
    found = installed()
    print(json.dumps({"devices": sorted(found.devices), "processors": sorted(found.processors)}))
