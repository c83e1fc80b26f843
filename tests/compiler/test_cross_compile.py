"""Every kernel compiles for processors that are not here (tests/targets runs those of the usual formats), and links."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.compiler.cpu.formats import format_of, sources
from mlcbuild.compiler.link import linkers
from tests.compiler.kernels import FILES, FOLDER
from tests.support.llama import CPU, QUANTIZATIONS


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["generic+neon", "generic+neon+dotprod"])
def test_every_kernel_compiles_for_aarch64(cpu: str, tmp_path: Path) -> None:
    needed = {s for q in QUANTIZATIONS.values() for s in sources([format_of(q.weights)], q.model_dtype, FILES)}
    for source in needed:
        output, cache = tmp_path / f"{source.name}.o", tmp_path / "zig"
        linkers.zig_compile(FOLDER / source.file, output, "aarch64-linux-gnu.2.28", cpu, cache, source.defines)
        assert output.stat().st_size > 0


def test_links_in_a_folder_with_so_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a.so.b"
    (folder / "needs").mkdir(parents=True)
    source = folder / "one.c"
    source.write_text("int one(void) { return 1; }")
    linkers.zig_compile(source, folder / "one.o", "x86_64-linux-gnu.2.28", "x86_64", folder / "zig", ())
    linkers.zig_link([folder / "one.o"], folder / "one.so", "x86_64-linux-gnu.2.28", CPU.linker, folder)
    assert b"libm.so.6" in (folder / "one.so").read_bytes()
