"""lower: a structure in a quantization as an optimised, scheduled TVM module for a CPU (lower_gpu is for GPUs).

Fields: structure (its library form), quantization, name (the format's, told to runtimes), device (a TVM target);
blocks (true) for a library of a decoder's pieces instead of a model's; activation_bits where the target says so.
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
    "mlcbuild.compiler.cpu.attention",
    "mlcbuild.compiler.cpu.calls",
    "mlcbuild.compiler.cpu.encoder",
    "mlcbuild.compiler.cpu.experts",
    "mlcbuild.compiler.cpu.formats",
    "mlcbuild.compiler.cpu.linear",
    "mlcbuild.compiler.cpu.lower",
    "mlcbuild.compiler.cpu.operations",
    "mlcbuild.compiler.cpu.recurrent",
    "mlcbuild.compiler.cpu.rows",
    "mlcbuild.compiler.cpu.sources",
    "mlcbuild.compiler.operations",
    "mlcbuild.compiler.pipeline",
    "mlcbuild.compiler.script",
    "mlcbuild.models",
    "mlcbuild.quantization.schemes",
    "mlcbuild.recipes.types",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi")


def run(job: Job) -> None:
    """Raises MlcBuildError for a structure that the device's kernels cannot run."""
    from mlcbuild.compiler import assemble
    from mlcbuild.compiler.cpu.lower import lower

    module = lower(
        structure.from_library_json(job.fields["structure"]),
        quantization_from_json(job.fields["quantization"]),
        job.fields["name"],
        job.fields["device"],
        job.debug_dump,
        job.fields.get("activation_bits"),
        job.fields.get("blocks", False),
    )
    assemble.save(module, job.output / "module.json")
