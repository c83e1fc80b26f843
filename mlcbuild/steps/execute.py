"""execute: a library's kernels run before it is shipped, against the CPU's library, over random weights and few tokens;
what engines call around the model, against NumPy.

Fields: structure (in library form, of a model of two layers: its kernels are those of every depth), quantization,
device; for a device that is emulated here a TVM target, with host and linker; for one that this machine has its name.
Inputs: cpu_library; lower (the module) for an emulated device, library for a real one. Artifact: execution.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlcbuild.emulation import try_out
from mlcbuild.engine.job import Job
from mlcbuild.errors import MlcBuildError
from mlcbuild.models import structure
from mlcbuild.quantization.budget import fields_of
from mlcbuild.recipes.types import linker_from_json, quantization_from_json
from mlcbuild.verify import execution, random_weights

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "ziglang")


def run(job: Job) -> None:
    """Raises MlcBuildError, with what was off by how much, where the two libraries do not agree."""
    emulated = "lower" in job.inputs
    library = _emulated(job) if emulated else _library(job, "library")
    model = structure.from_library_json(job.fields["structure"])
    format_ = quantization_from_json(fields_of(job.fields, job.inputs))
    weights = random_weights.make(model, execution.VOCABULARY, format_, job.scratch / "weights", job.scratch)
    texts = execution.texts(model) if emulated else execution.LONG
    if emulated:
        try_out.check(texts != execution.FEW)
    cpu_library = _library(job, "cpu_library")
    errors, functions = execution.compare(library, cpu_library, weights, model, format_.model_dtype, texts)
    found = try_out.found() if emulated else {"device": job.fields["device"]}
    problems = execution.problems(errors, model, format_.model_dtype)
    if problems:
        raise MlcBuildError("\n".join(["the library does not compute what the CPU's does:", *problems]))
    report = {
        "executed": "emulated" if emulated else "device",
        **found,
        **execution.described(model, texts),
        "errors": {name: float(f"{error:.1e}") for name, error in errors.items()},
        "bound": execution.bound(model, format_.model_dtype),
        "functions": functions,
    }
    (job.output / "execution.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _emulated(job: Job) -> Path:
    fields, module = job.fields, job.inputs["lower"].path("module.json")
    linker = linker_from_json(fields["linker"])
    return try_out.library(module, fields["device"], fields["host"], linker, job.scratch)


def _library(job: Job, name: str) -> Path:
    (found,) = job.folder(job.inputs[name], job.scratch / name).glob("model.*")
    return found
