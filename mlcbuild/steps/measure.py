"""Measure: a package's own weights, run and compared with the unquantized model; what is found is figures.json.

Neither names nor bounds, gates or templates are in its key. So a package that missed a bound is not measured again when
the bound changes, and packages of the same weights for devices that are not here share one measurement.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlcbuild.chat import rwkv_vocabulary
from mlcbuild.chat.checkpoint import embedding_metadata
from mlcbuild.engine.job import Job
from mlcbuild.errors import MlcBuildError
from mlcbuild.quantization.budget import fields_of
from mlcbuild.verify.evaluate import read_text
from mlcbuild.verify.measure import Case, measure

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "tokenizers", "sentencepiece")

_LIBRARIES = ("reference", "library", "blocks")


def run(job: Job) -> None:
    """Fields: method (whole, layers, embeddings); for layers also structure, quantization and
    context_window_size (the package's; -1: none), for embeddings embedding: the architecture's embedding_metadata.

    Inputs: `quantize` (params_shard_N.bin, tensor-cache.json), `checkpoint` (tokenizer files, for embeddings also those
    of sentence-transformers), `convert` (parameters.json), `text` (one file), `reference`: a float32 library of the
    structure, or of its pieces for method layers. For method layers, `blocks`: the library of pieces of that
    quantization; else `library`: one of the structure and quantization that this machine can run.
    """
    texts = [entry.path for entry in job.inputs["text"].files.values()]
    if len(texts) != 1:
        raise MlcBuildError(f"the evaluation text is {len(texts)} files, expected one")
    embedding, files = job.fields.get("embedding"), {n: e.path for n, e in job.inputs["checkpoint"].files.items()}
    weights = job.folder(job.inputs["quantize"], job.scratch / "weights")
    job.folder(job.inputs["checkpoint"], weights)
    rwkv_vocabulary.write_packed(files, weights)
    case = Case(
        {**job.fields, **({"quantization": fields_of(job.fields, job.inputs)} if "blocks" in job.inputs else {})},
        weights,
        None if embedding is None else embedding_metadata(files, embedding),
        job.inputs["convert"].read_json("parameters.json"),
        job.materials,
        {name: _library(job, name) for name in _LIBRARIES if name in job.inputs},
        read_text(texts[0]),
        job.scratch,
        job.progress,
    )
    job.note("comparing with the unquantized model")
    found = measure(case)
    (job.output / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _library(job: Job, name: str) -> Path:
    folder = job.folder(job.inputs[name], job.scratch / name)
    found = sorted(folder.glob("model.*"))
    if len(found) != 1:
        raise MlcBuildError(f"{folder}: {len(found)} files model.*, expected one")
    return found[0]
