"""convert: a checkpoint's tensors under the model's parameter names, as an index into the checkpoint's files.

Fields: structure. Inputs: checkpoint (config.json, *.safetensors, *.index.json). Artifact: parameters.json.
"""

from __future__ import annotations

import json

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.models import structure
from mlcbuild.models.parameters import ignored, parameters
from mlcbuild.steps.job import Job

VERSION = 1
CODE = (
    "mlcbuild.checkpoints.header",
    "mlcbuild.checkpoints.index",
    "mlcbuild.checkpoints.mapped",
    "mlcbuild.checkpoints.table",
    "mlcbuild.models.parameters",
    "mlcbuild.models.structure",
)
TOOLS = ("numpy",)


def run(job: Job) -> None:
    """Raises CheckpointError when the checkpoint does not hold the parameters that its structure has."""
    model = structure.from_json(job.fields["structure"])
    files = job.inputs["checkpoint"].files
    table = read_table(
        {name: entry.path for name, entry in files.items()},
        {name: entry.digest for name, entry in files.items()},
    )
    document = index(parameters(model), table, ignored(model), job.note)
    text = json.dumps(document, indent=1, sort_keys=True)
    (job.output / "parameters.json").write_text(text + "\n", encoding="utf-8")
