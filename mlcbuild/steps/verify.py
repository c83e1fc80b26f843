"""Verify: what is thought of a package's figures, its template and its files; the verdict is quality.json."""

from __future__ import annotations

import json

from mlcbuild.engine.job import Job
from mlcbuild.verify.judge import judge

VERSION = 2
TOOLS = ("apache-tvm", "apache-tvm-ffi", "jinja2", "tokenizers", "sentencepiece")


def run(job: Job) -> None:
    """Fields: method (whole, layers, embeddings), class (q0, q3, q4, q8), model_dtype, executed (whether the figures
    are of the package's own library), notes (what a user has to know, in sentences), gate; the model's own bounds, null
    for the usual ones: kl, perplexity_increase, perplexity, cosine.

    Inputs: `package`, `measure` (figures.json); `execute` (execution.json), what was found of a GPU's library, or the
    field not_executed: why there is none; `allocate` (shares.json), how a budget was spent. Raises MlcBuildError for
    figures that are not finite, and with `gate: fail` for a miss.
    """
    folder = job.folder(job.inputs["package"], job.scratch / "package")
    execution = job.inputs["execute"].read_json("execution.json") if "execute" in job.inputs else None
    measured = job.inputs["measure"].read_json("figures.json")
    if "allocate" in job.inputs and "details" in measured:
        measured["details"]["budget"] = job.inputs["allocate"].read_json("shares.json")
    report = judge(job.fields, folder, measured, execution, job.note)
    (job.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
