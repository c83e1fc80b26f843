"""Verify: a package's own weights, run and compared with the unquantized model; the verdict is quality.json."""

from __future__ import annotations

import json
from pathlib import Path

from mlcbuild.engine.job import Job
from mlcbuild.errors import MlcBuildError
from mlcbuild.verify.judge import Case, judge

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "jinja2", "numpy", "tokenizers", "sentencepiece")

_LIBRARIES = ("reference", "cpu_library", "blocks")


def run(job: Job) -> None:
    """Fields: method (whole, layers, embeddings), class (q0, q3, q4, q8), model_dtype, kl and perplexity_increase
    (null: the class's), gate; for layers also structure and quantization, for embeddings cosine (null: the class's).

    Inputs: `package`, `convert` (parameters.json), `text` (one file), `reference`: a float32 library of the structure,
    or of its pieces for method layers. For method whole, `cpu_library` of the same structure and quantization that this
    machine can run, where the package's own is for another machine; for method layers, `blocks`: the library of pieces
    of that quantization. Method embeddings takes what `whole` does. `execution`: what the step execute found of a
    GPU's library; field not_executed: why there is none. Raises MlcBuildError for logits or hidden states that are not
    finite, and with `gate: fail` for a miss.
    """
    texts = [entry.path for entry in job.inputs["text"].files.values()]
    if len(texts) != 1:
        raise MlcBuildError(f"the evaluation text is {len(texts)} files, expected one")
    case = Case(
        job.fields,
        job.folder(job.inputs["package"], job.scratch / "package"),
        job.inputs["convert"].read_json("parameters.json"),
        job.materials,
        {name: _library(job, name) for name in _LIBRARIES if name in job.inputs},
        texts[0].read_text(encoding="utf-8"),
        job.scratch,
        job.progress,
        job.inputs["execution"].read_json("execution.json") if "execution" in job.inputs else None,
    )
    job.note(f"{case.weights.name.removesuffix('-MLC')}: comparing with the unquantized model")
    report = judge(case, job.note)
    (job.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _library(job: Job, name: str) -> Path:
    folder = job.folder(job.inputs[name], job.scratch / name)
    found = sorted(folder.glob("model.*"))
    if len(found) != 1:
        raise MlcBuildError(f"{folder}: {len(found)} files model.*, expected one")
    return found[0]
