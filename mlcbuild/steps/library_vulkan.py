"""library, for Vulkan: the same step as steps/library_gpu.py with code of its own.

Fields: device (a TVM target), host (its CPU's), linker, library (the kind of file). Input: lower. Artifact:
model.<kind>.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.recipes.types import linker_from_json

VERSION = 1
CODE = (
    "mlcbuild.compiler.generators",
    "mlcbuild.compiler.link",
    "mlcbuild.compiler.vulkan",
    "mlcbuild.recipes.types",
    "mlcbuild.zig",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")


def run(job: Job) -> None:
    """Raises MlcBuildError with the linker's own message when it fails, or with what is wrong with a kernel."""
    from mlcbuild.compiler.vulkan.build import build

    build(
        job.inputs["lower"].path("module.json"),
        job.fields["device"],
        job.fields["host"],
        linker_from_json(job.fields["linker"]),
        job.output / f"model.{job.fields['library']}",
        job.scratch,
        job.debug_dump,
    )
