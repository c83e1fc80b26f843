"""TVM's CUDA source as C++ for the emulated device (device/cuda_language.h): vectors, shared memory, kernels."""

from __future__ import annotations

import re

from mlcbuild.compiler.gpu import sources

_SHARED = re.compile(r"__shared__ (?:alignas|__align__)\(\d+\) ([\w:]+) (\w+)\[(\d+)\];")
_DYNAMIC = re.compile(r"extern __shared__ (?:alignas|__align__)\(\d+\) uchar (\w+)\[\];")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^)]*\) \{')
_VECTOR = re.compile(r"\*\((\w+[234])\*\)\(")  # a vector that is read or written
_PREFACE = '#include "cuda_language.h"\n'
_TABLE = """
extern "C" __attribute__((visibility("default"))) const emulation::Kernel emulation_kernels[] = {{
{rows}
  {{nullptr, nullptr, nullptr, 0}}}};
extern "C" __attribute__((visibility("default"))) bool emulation_run(
    emulation::Thunk thunk, void** arguments, const emulation::Launch& launch) {{
  return emulation::run(thunk, arguments, launch);
}}
"""


def translated(cuda: str) -> str:
    """C++ of a CUDA source as TVM writes it. What stands before kernels and what they call is the language's."""
    own, kernels = sources.split(cuda)
    slot = 0

    def declare(match: re.Match[str]) -> str:
        nonlocal slot
        kind, name, count = match.groups()
        slot += 1
        memory = f"emulation::shared({slot - 1}, sizeof({kind}) * {count})"
        return f"{kind} (&{name})[{count}] = *static_cast<{kind} (*)[{count}]>({memory});"

    pieces = []
    for piece in re.split(r'(?=extern "C" __global__)', kernels):
        slot = 0  # a kernel's shared arrays are numbered from 0
        pieces.append(_SHARED.sub(declare, piece))
    text = _DYNAMIC.sub(r"uchar* \1 = static_cast<uchar*>(emulation::dynamic_shared());", "".join(pieces))
    text = _VECTOR.sub(r"*emulation_aligned<\1>(", text)
    rows = "\n".join(f"  EMULATION_KERNEL({name})," for name in _KERNEL.findall(kernels))
    return _PREFACE + own + text + _TABLE.format(rows=rows)
