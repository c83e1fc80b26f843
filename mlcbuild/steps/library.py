"""library: machine code for a lowered module, linked for the target's system. (The step that docs call *build*.)

Fields: device (a TVM target), host, linker, library (the kind of file). Input: lower. Artifact: model.<kind>.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.recipes.types import linker_from_json

VERSION = 1
CODE = (
    "mlcbuild.compiler.cpu.build",
    "mlcbuild.compiler.cpu.kernels",
    "mlcbuild.compiler.cpu.sources",
    "mlcbuild.compiler.generators",
    "mlcbuild.compiler.link",
    "mlcbuild.compiler.targets",
    "mlcbuild.recipes.types",
    "mlcbuild.zig",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")


def run(job: Job) -> None:
    """Raises MlcBuildError with the compiler's or linker's own message when it fails."""
    from mlcbuild.compiler.cpu.build import build

    build(
        job.inputs["lower"].path("module.json"),
        job.fields["device"],
        job.fields["host"],
        linker_from_json(job.fields["linker"]),
        job.output / f"model.{job.fields['library']}",
        job.scratch,
        job.debug_dump,
    )
