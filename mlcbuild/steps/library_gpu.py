"""library, for GPUs: the same step as steps/library.py with code of its own.

Fields: device (a TVM target), host (its CPU's), architectures (that get machine code), linker, library (the kind of
file), prefix (of a static library's symbols). Inputs: lower, for wasm runtime. Artifact: model.<kind>.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.recipes.types import linker_from_json

VERSION = 1
CODE = (
    "mlcbuild.compiler.generators",
    "mlcbuild.compiler.gpu.build",
    "mlcbuild.compiler.gpu.cuda",
    "mlcbuild.compiler.link",
    "mlcbuild.compiler.web.emscripten",
    "mlcbuild.recipes.types",
    "mlcbuild.zig",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")


def run(job: Job) -> None:
    """Raises MlcBuildError with the compiler's or linker's own message when it fails."""
    from mlcbuild.compiler.gpu.build import build

    fields = job.fields
    build(
        job.inputs["lower"].path("module.json"),
        fields["device"],
        fields["host"],
        linker_from_json(fields["linker"]),
        job.output / f"model.{fields['library']}",
        job.scratch,
        job.debug_dump,
        fields["architectures"],
        fields["prefix"],
        [entry.path for entry in job.inputs["runtime"].files.values()] if "runtime" in job.inputs else (),
    )
