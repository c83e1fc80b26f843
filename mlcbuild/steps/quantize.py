"""quantize: every parameter in the recipe's numeric format, as weight shards and their index.

Fields: quantization, structure. Inputs: convert; materials: the checkpoint's files. Artifact: params_shard_N.bin,
tensor-cache.json.
"""

from __future__ import annotations

from typing import Any

from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.quantization.stream import quantize
from mlcbuild.recipes.types import Quantization, Weights
from mlcbuild.steps.job import Job

VERSION = 1
CODE = (
    "mlcbuild.checkpoints.header",
    "mlcbuild.checkpoints.mapped",
    "mlcbuild.models.parameters",
    "mlcbuild.models.structure",
    "mlcbuild.quantization.floats",
    "mlcbuild.quantization.group",
    "mlcbuild.quantization.schemes",
    "mlcbuild.quantization.stream",
    "mlcbuild.quantization.tensor_cache",
    "mlcbuild.recipes.types",
)
TOOLS = ("numpy",)


def run(job: Job) -> None:
    """Raises CheckpointError for a value that is NaN or Inf, in the checkpoint or in the model dtype."""
    quantize(
        job.inputs["convert"].read_json("parameters.json"),
        job.materials,
        parameters(structure.from_json(job.fields["structure"])),
        _quantization(job.fields["quantization"]),
        job.output,
        job.progress,
    )


def _quantization(fields: dict[str, Any]) -> Quantization:
    """The quantization from its JSON form, which lacks the name: a name is in no key."""
    weights = fields.get("weights")
    return Quantization(**{"name": "", **fields, "weights": Weights(**weights) if weights else None})
