"""lower: a structure in a quantization as an optimised, scheduled TVM module.

Fields: structure (its library form), quantization, name (the format's, told to runtimes), device (a TVM target);
blocks (true) for a library of a decoder's pieces instead of a model's; activation_bits where the target says so.
Entry: the `lower` of the device's backend. Artifact: module.json.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.models import structure
from mlcbuild.quantization.budget import fields_of
from mlcbuild.recipes.types import quantization_from_json

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy")  # NumPy computes the table of frequencies


def run(job: Job) -> None:
    """Raises MlcBuildError for a structure that the device's kernels cannot run."""
    from mlcbuild.compiler import assemble

    module = job.entry(
        structure.from_library_json(job.fields["structure"]),
        quantization_from_json(fields_of(job.fields, job.inputs)),
        job.fields["name"],
        job.fields["device"],
        job.debug_dump,
        job.fields.get("activation_bits"),
        job.fields.get("blocks", False),
    )
    assemble.save(module, job.output / "module.json")
