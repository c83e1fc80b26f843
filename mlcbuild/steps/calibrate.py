"""calibrate: how much each input column of each matrix counts, measured on a text; for `rounding: calibrated`.

Fields: structure. Inputs: convert, blocks (a float32 library of the decoder's pieces), checkpoint (tokenizer files),
text (one file). Materials: the checkpoint's files. Artifact: importance.safetensors, float32 `[K in]` by parameter.
"""

from __future__ import annotations

from safetensors.numpy import save_file

from mlcbuild.engine.job import Job
from mlcbuild.models import structure
from mlcbuild.verify import calibration
from mlcbuild.verify.importance import importance
from mlcbuild.verify.tensors import Unquantized

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "safetensors", "sentencepiece", "tokenizers")


def run(job: Job) -> None:
    """Raises MlcBuildError for a text with nothing in it, and for a model that computes NaN or Inf."""
    model = structure.from_json(job.fields["structure"])
    blocks, tokenizer = (job.folder(job.inputs[name], job.scratch / name) for name in ("blocks", "checkpoint"))
    (text,) = job.inputs["text"].files.values()
    pieces, windows = calibration.opened(blocks, tokenizer, text.path, model.context_window_size, job.note)
    found = importance(
        model,
        pieces,
        Unquantized(job.inputs["convert"].read_json("parameters.json"), job.materials),
        windows,
        lambda done, total: job.progress(done, total, "layers"),
    )
    save_file(found, job.output / "importance.safetensors")
