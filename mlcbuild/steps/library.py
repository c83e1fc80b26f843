"""library: machine code for a lowered module, linked for the target's system. (The step that docs call *build*.)

Fields: device (a TVM target), host (its CPU's), linker, library (the kind of file); for some backends architectures
(that get machine code) and prefix (of a static library's symbols). Inputs: lower, for wasm runtime. Entry: the `build`
of the device's backend. Artifact: model.<kind>.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.recipes.types import linker_from_json

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")

_OPTIONS = ("architectures", "prefix")


def run(job: Job) -> None:
    """Raises MlcBuildError with the compiler's or linker's own message when it fails."""
    fields = job.fields
    options = {name: fields[name] for name in _OPTIONS if name in fields}
    if "runtime" in job.inputs:
        options["runtime"] = [entry.path for entry in job.inputs["runtime"].files.values()]
    job.entry(
        job.inputs["lower"].path("module.json"),
        fields["device"],
        fields["host"],
        linker_from_json(fields["linker"]),
        job.output / f"model.{fields['library']}",
        job.scratch,
        job.debug_dump,
        **options,
    )
