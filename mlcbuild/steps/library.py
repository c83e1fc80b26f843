"""library: machine code for a lowered module, linked for the target's system. (The step that docs call *build*.)

Fields: device (a TVM target), host, linker, library (the kind of file). Input: lower. Artifact: model.<kind>.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.recipes.types import linker_from_json

VERSION = 1
CODE = (
    "mlcbuild.compiler.binaries",
    "mlcbuild.compiler.cpu.kernels",
    "mlcbuild.compiler.cpu.sources",
    "mlcbuild.compiler.generators",
    "mlcbuild.compiler.library",
    "mlcbuild.compiler.linkers",
    "mlcbuild.compiler.symbols",
    "mlcbuild.compiler.targets",
    "mlcbuild.recipes.types",
    "mlcbuild.zig",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")


def run(job: Job) -> None:
    """Raises MlcBuildError with the compiler's or linker's own message when it fails."""
    from tvm import ir

    from mlcbuild.compiler import library

    library.build(
        ir.load_json(job.inputs["lower"].path("module.json").read_text(encoding="utf-8")),
        job.fields["device"],
        linker_from_json(job.fields["linker"]),
        job.output / f"model.{job.fields['library']}",
        job.scratch,
        job.debug_dump,
    )
