"""TVM gives each C kernel arguments of the widths that it takes: on the stack, garbage is above what is narrower."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from mlcbuild.compiler import targets
from mlcbuild.compiler.cpu import build
from mlcbuild.compiler.cpu.lower import lower
from mlcbuild.compiler.link import export
from mlcbuild.models.architecture import resolve
from tests.architectures.agreement import config_of, known_architectures
from tests.architectures.test_agreement import CASES
from tests.support import llama

KERNELS = Path(build.__file__).parent / "kernels"
_EXPORT = re.compile(r"EXPORT void (?:NAME\((\w+)\)|(\w+))\(([^)]*)\)")
_CALL = re.compile(r"call void @mlcbuild_(\w+)\((.*)\)")
_C = {"i64": "i64", "i32": "i32", "f32": "float"}


@cache
def taken() -> dict[str, list[str]]:
    """The types of each kernel's arguments, by the end of its name: those of linear.c are named after a format."""
    texts = [path.read_text() for path in KERNELS.glob("*.c")]
    found = [match.groups() for text in texts for match in _EXPORT.finditer(text)]
    return {
        (short or whole).removeprefix("mlcbuild_"): [
            "ptr" if "*" in each else _C[each.split()[0]] for each in c.split(",")
        ]
        for short, whole, c in found
    }


def given(arguments: str) -> list[str]:
    """The types in a call of LLVM's; a null pointer is 64 bits that are 0."""
    parts = [part.strip() for part in re.sub(r"\([^()]*\)", "", arguments).split(",")]
    return ["null" if part == "i64 0" else part.split()[0] for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "llama", "rwkv6", "mamba2", "qwen3_next", "recurrent_gemma"])
def test_of_every_call(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    structure = resolve(known_architectures()[case.architecture], config_of(case), {})
    form, device = llama.QUANTIZATIONS["q4f32_1"], targets.resolve(llama.UNOPTIMISED)
    module = lower(replace(structure, vocab_size=1), form, form.name, device)
    export.dump_sources(export.generate(module, device, {}).mod, tmp_path)
    calls = _CALL.findall((tmp_path / "library.ll").read_text())
    assert len({kernel for kernel, _ in calls}) > 5
    for kernel, arguments in calls:
        wanted = next((types for end, types in taken().items() if kernel == end or kernel.endswith(f"_{end}")), None)
        if wanted is not None:  # activations, which a macro writes, are of pointers and numbers of 64 bits
            pairs = list(zip(given(arguments), wanted, strict=True))
            assert all(a == b or (a == "null" and b in ("ptr", "i64")) for a, b in pairs), (kernel, pairs)
