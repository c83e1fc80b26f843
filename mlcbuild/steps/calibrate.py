"""calibrate: how much each input column of each matrix counts, measured on a text; for `rounding: calibrated`.

Fields: structure. Inputs: convert, blocks (a float32 library of the decoder's pieces), checkpoint (tokenizer files),
text (one file). Materials: the checkpoint's files. Artifact: importance.safetensors, float32 `[K in]` by parameter.
"""

from __future__ import annotations

from safetensors.numpy import save_file

from mlcbuild.engine.job import Job
from mlcbuild.models import structure
from mlcbuild.runtime.tokenizer import load_tokenizer
from mlcbuild.verify import evaluate
from mlcbuild.verify.importance import importance
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.tensors import Unquantized

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "safetensors", "sentencepiece", "tokenizers")

_TOKENS = 16384  # of a text; more would hardly move a mean square


def run(job: Job) -> None:
    """Raises MlcBuildError for a text with nothing in it, and for a model that computes NaN or Inf."""
    model = structure.from_json(job.fields["structure"])
    (library,) = job.folder(job.inputs["blocks"], job.scratch / "blocks").glob("model.*")
    pieces = Pieces(library)
    (text,) = job.inputs["text"].files.values()
    tokenizer = load_tokenizer(job.folder(job.inputs["checkpoint"], job.scratch / "checkpoint"))
    documents = evaluate.documents(evaluate.read_text(text.path), tokenizer)
    windows, tokens = [], 0
    for window in evaluate.windows(documents, min(pieces.window, model.context_window_size)):
        if tokens + len(window) > _TOKENS:
            job.note(f"the calibration text is long: its first {tokens} tokens are enough")
            break
        windows.append(window)
        tokens += len(window)
    found = importance(
        model,
        pieces,
        Unquantized(job.inputs["convert"].read_json("parameters.json"), job.materials),
        windows,
        lambda done, total: job.progress(done, total, "layers"),
    )
    save_file(found, job.output / "importance.safetensors")
