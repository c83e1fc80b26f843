"""CUDA functions of our own (kernels/*.cuh), which TVM's kernels call by their names: put into the source it writes."""

from __future__ import annotations

import re
from pathlib import Path

_KERNELS = Path(__file__).parent / "kernels"
_NAMESPACE = "mlcbuild::"  # what calls them is told by it
_FILES = {  # the file that has a function
    "kernel_before": "device.cuh",
    "few_rows": "few_rows.cuh",
    "fused_rows": "fused_rows.cuh",
    "prefetch_next": "prefetch.cuh",
    "prefetch_second": "prefetch.cuh",
    "many_rows": "many_rows.cuh",
    "rows_of_expert": "many_rows.cuh",
    "hand_over": "many_rows.cuh",
    "decode_attention": "decode_attention.cuh",
    "keep_new": "decode_attention.cuh",
    "prefill_attention": "prefill_attention.cuh",
    "new_tokens_attention": "prefill_attention.cuh",
}
_FIRST = 'extern "C" __global__'  # what a kernel begins with; what stands before is the same for all models
EARLY = "#define BEGINS_EARLY\n"  # what only the source of such a library has
_BEGIN = "// Functions of mlcbuild\n"
_KERNEL = re.compile(r"^extern \"C\" __global__ [^{;]*\{\n", re.MULTILINE)
_WAITING = re.compile(rf"\b{_NAMESPACE}(few|fused)_rows<")  # these wait themselves, behind their first loads
_WAIT = f"  {_NAMESPACE}kernel_before();\n"
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_CALL = re.compile(rf"\b{_NAMESPACE}(\w+)[<(]")


def complete(code: str, early: bool = False) -> str:
    """CUDA source as TVM writes it, with those of our functions that it calls, before the first kernel.

    `early`: of a library whose kernels begin before the ones before them have ended, and wait for these. (Their memory
    is not `__restrict__`: what nobody else writes to could be loaded before the wait.)
    """
    if early and _BEGIN not in code:
        pieces = re.split(f"(?=^{_FIRST})", code.replace("__restrict__ ", ""), flags=re.MULTILINE)
        code = "".join(
            piece if _WAITING.search(piece) else _KERNEL.sub(lambda match: match.group() + _WAIT, piece)
            for piece in pieces
        )
    names = sorted({_FILES[name] for name in _CALL.findall(code) if name in _FILES})
    if not names or _BEGIN in code:
        return code
    seen: set[str] = set()
    own = "".join(_text(name, seen) for name in names)
    place = code.index(_FIRST)
    mark = EARLY if early else ""
    return f"{code[:place]}{_BEGIN}{mark}{own}{code[place:]}"


def split(code: str) -> tuple[str, str]:
    """Our functions in a completed source, and its kernels."""
    place = code.index(_FIRST)
    return code[code.index(_BEGIN) : place] if _BEGIN in code else "", code[place:]


def _text(name: str, seen: set[str]) -> str:
    """A file with what it includes, each once."""
    if name in seen:
        return ""
    seen.add(name)
    text = (_KERNELS / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda match: _text(match.group(1), seen), text)
