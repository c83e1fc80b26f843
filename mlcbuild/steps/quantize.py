"""quantize: every parameter in the recipe's numeric format, as weight shards and their index.

Fields: quantization, structure. Inputs: convert; for `rounding: calibrated` also calibration: importance.safetensors,
by parameter name `[K in]` float32; for `rounding: gptq` also rounded: what the step `round` makes. Materials: the
checkpoint's files. Artifact: params_shard_N.bin, tensor-cache.json.
"""

from __future__ import annotations

import numpy as np

from mlcbuild.checkpoints.header import read_header
from mlcbuild.checkpoints.mapped import read
from mlcbuild.engine.job import Job
from mlcbuild.errors import CheckpointError
from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.budget import fields_of
from mlcbuild.quantization.floats import Array
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.stream import quantize
from mlcbuild.recipes.types import quantization_from_json

VERSION = 3
TOOLS = ("numpy", "ziglang")

IMPORTANCE = "importance.safetensors"


def run(job: Job) -> None:
    """Raises CheckpointError for a value that is NaN or Inf, in the checkpoint or in the model dtype."""
    quantize(
        job.inputs["convert"].read_json("parameters.json"),
        job.materials,
        parameters(structure.from_json(job.fields["structure"])),
        quantization_from_json(fields_of(job.fields, job.inputs)),
        job.output,
        job.progress,
        importance=_importance(job),
        note=job.note,
        scratch=job.scratch,
        ready=_ready(job),
    )


def _importance(job: Job) -> dict[str, Array] | None:
    if "calibration" not in job.inputs:
        return None
    tree = job.inputs["calibration"]
    if IMPORTANCE not in tree:
        raise CheckpointError(f"the calibration has no file {IMPORTANCE}; measure it again")
    return {ref.name: read(ref) for ref in read_header(tree.path(IMPORTANCE), IMPORTANCE)}


def _ready(job: Job) -> dict[str, Packed] | None:
    if "rounded" not in job.inputs:
        return None
    files = {name: np.load(entry.path, mmap_mode="r") for name, entry in job.inputs["rounded"].files.items()}
    names = [name.removesuffix(".words.npy") for name in files if name.endswith(".words.npy")]
    return {name: Packed(files[f"{name}.words.npy"], files[f"{name}.scales.npy"]) for name in names}
