"""lower, for GPUs: steps/lower.py with code of its own, so that a change of one rebuilds none of the other's libraries.

Fields: structure (its library form), quantization, name (the format's, told to runtimes), device (a TVM target).
Artifact: module.json.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job
from mlcbuild.models import structure
from mlcbuild.recipes.types import quantization_from_json

VERSION = 1
CODE = (
    "mlcbuild.compiler.assemble",
    "mlcbuild.compiler.canonical",
    "mlcbuild.compiler.abi",
    "mlcbuild.compiler.gpu",
    "mlcbuild.compiler.operations",
    "mlcbuild.compiler.pipeline",
    "mlcbuild.compiler.script",
    "mlcbuild.models",
    "mlcbuild.quantization.schemes",
    "mlcbuild.recipes.types",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi")


def run(job: Job) -> None:
    """Raises MlcBuildError for a structure that GPU kernels cannot run."""
    from mlcbuild.compiler import assemble
    from mlcbuild.compiler.gpu.lower import lower

    module = lower(
        structure.from_library_json(job.fields["structure"]),
        quantization_from_json(job.fields["quantization"]),
        job.fields["name"],
        job.fields["device"],
        job.debug_dump,
    )
    assemble.save(module, job.output / "module.json")
