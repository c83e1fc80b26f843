"""Kernels' source as TVM writes it, in CUDA C, OpenCL C or Metal's language, as C++ for the emulated device.

Types and functions of a language are its header's (device/*_language.h); here is what a header cannot give: memory of a
block, vectors whose alignment is checked, the table of kernels.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

LANGUAGES = ("cuda", "opencl", "metal")
_KERNEL = re.compile(r"\b(?:__global__|__kernel|kernel) void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\) \{")
_SHARED = re.compile(r"(?:__shared__ (?:alignas|__align__)\(\d+\)|__local|threadgroup) ([\w:]+) (\w+)\[(\d+)\];")
_DYNAMIC = re.compile(r"extern __shared__ (?:alignas|__align__)\(\d+\) uchar (\w+)\[\];")
# A vector that is read or written; a pointer's memory is named by OpenCL and Metal.
_VECTOR = re.compile(r"\*\((?:(?:device|threadgroup|thread|volatile) )*(\w+[234])\*\)\(")
_TABLE = """
extern "C" __attribute__((visibility("default"))) const emulation::Kernel emulation_kernels[] = {{
{rows}
  {{nullptr, nullptr, nullptr, 0}}}};
extern "C" __attribute__((visibility("default"))) bool emulation_run(
    emulation::Thunk thunk, void** arguments, const emulation::Launch& launch) {{
  return emulation::run(thunk, arguments, launch);
}}
"""


@dataclass(frozen=True)
class Signature:
    """A kernel's name, and its parameters' names with their types in C, none for an array.

    `packed`: what is no array comes as one argument, in slots of 8 bytes, as Metal has it.
    """

    name: str
    parameters: tuple[tuple[str, str | None], ...]
    packed: bool


def translated(code: str, language: str) -> str:
    """C++ of a source as TVM writes it. What stands before the first kernel is the language's, not the model's."""
    text = _DYNAMIC.sub(
        r"uchar* \1 = static_cast<uchar*>(emulation::dynamic_shared());",
        "".join(map(_with_shared, _pieces(code, language))),
    )
    text = _VECTOR.sub(r"*emulation_aligned<\1>(", text)
    if language == "opencl":
        text = re.sub(r"\((\w+[234])\)\(", r"\1(", text)  # a vector of numbers
    rows = "\n".join(f"  EMULATION_KERNEL({name})," for name, _ in _KERNEL.findall(text))
    return f'#include "{language}_language.h"\n' + text + _TABLE.format(rows=rows)


def signatures(code: str, language: str) -> dict[str, Signature]:
    """The kernels of a source, by name."""
    found = {}
    for piece in _pieces(code, language):
        for name, given in _KERNEL.findall(piece):
            parameters = [_parameter(each) for each in given.split(",")]
            packed = bool(parameters) and parameters[-1][0] == "arg"
            if packed:
                (fields,) = re.findall(rf"struct {name}_args_t \{{(.*?)\}};", piece, re.DOTALL)
                parameters[-1:] = [(field, kind) for kind, field in re.findall(r"(\w+) (\w+)(?:\[2\])?;", fields)]
            found[name] = Signature(name, tuple(parameters), packed)
    return found


def _with_shared(piece: str) -> str:
    """A kernel whose arrays of shared memory, numbered from 0, are the device's."""
    slots = itertools.count()

    def declare(match: re.Match[str]) -> str:
        kind, name, count = match.groups()
        memory = f"emulation::shared({next(slots)}, sizeof({kind}) * {count})"
        return f"{kind} (&{name})[{count}] = *static_cast<{kind} (*)[{count}]>({memory});"

    return _SHARED.sub(declare, piece)


def _parameter(text: str) -> tuple[str, str | None]:
    name = text.split()[-1]
    return name.removesuffix("_ptr"), None if "*" in text else " ".join(text.split()[:-1])


def _pieces(code: str, language: str) -> list[str]:
    """One kernel after the other, without what each repeats of the others."""
    if language == "cuda":
        return re.split(r'(?=extern "C" __global__)', code)[1:]
    pieces = re.split(r"^// Function: \w+\n", code, flags=re.MULTILINE)[1:]
    if language == "opencl":
        return [re.sub(r"^(#.*|__kernel void [^;{]*;)\n", "", piece, flags=re.MULTILINE) for piece in pieces]
    return [_of_metal(piece) for piece in pieces]


def _of_metal(piece: str) -> str:
    """Where a thread is comes from the device; numbers come as a structure, by value."""
    piece = re.sub(r"^(#include.*|using namespace metal;)\n", "", piece, flags=re.MULTILINE)
    piece = re.sub(r"union __TVMArgUnion \{.*?\};\n", "", piece, flags=re.DOTALL)
    places = re.findall(r"(uint[23]?) (\w+) \[\[(thread|threadgroup)_position_in_\w+\]\]", piece)
    piece = re.sub(r",?\s*uint[23]? \w+ \[\[\w+_position_in_\w+\]\]", "", piece)
    piece = re.sub(r"constant (\w+)& ", r"\1 ", re.sub(r" \[\[ buffer\(\d+\) \]\]", "", piece))
    index = {"thread": "thread_index", "threadgroup": "block_index"}
    known = [
        f"  const {kind} {name} = EmulationIndex<{kind}>::of(emulation::{index[of]});\n" for kind, name, of in places
    ]
    return _KERNEL.sub(lambda match: f"{match[0]}\n{''.join(known)}", piece)
