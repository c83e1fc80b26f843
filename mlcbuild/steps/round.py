"""round: matrices rounded layer by layer, each to what runs through the layers before; for `rounding: gptq`.

Fields: structure, quantization. Inputs: convert, blocks (a float32 library of the decoder's pieces), checkpoint
(tokenizer files), text (one file). Materials: the checkpoint's files. Artifact: `<parameter>.words.npy` and
`<parameter>.scales.npy`, as mlcbuild.quantization.packing.Packed has them.
"""

from __future__ import annotations

import numpy as np

from mlcbuild.engine.job import Job
from mlcbuild.models import structure
from mlcbuild.quantization.budget import fields_of
from mlcbuild.quantization.feedback import Kernels
from mlcbuild.quantization.packing import Packed
from mlcbuild.recipes.types import quantization_from_json
from mlcbuild.verify import calibration
from mlcbuild.verify.rounding import Rounding
from mlcbuild.verify.tensors import Unquantized

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "sentencepiece", "tokenizers", "ziglang")


def run(job: Job) -> None:
    """Raises MlcBuildError for a text with nothing in it, and for a model that computes NaN or Inf."""
    model = structure.from_json(job.fields["structure"])
    blocks, tokenizer = (job.folder(job.inputs[name], job.scratch / name) for name in ("blocks", "checkpoint"))
    (text,) = job.inputs["text"].files.values()
    pieces, windows = calibration.opened(blocks, tokenizer, text.path, model.context_window_size, job.note)
    checkpoint = Unquantized(job.inputs["convert"].read_json("parameters.json"), job.materials)
    quantization = quantization_from_json(fields_of(job.fields, job.inputs))

    def save(name: str, found: Packed) -> None:
        np.save(job.output / f"{name}.words.npy", found.words)
        np.save(job.output / f"{name}.scales.npy", found.scales)

    rounding = Rounding(model, quantization, pieces, checkpoint, Kernels(job.scratch))
    rounding.run(windows, save, lambda done, total: job.progress(done, total, "passes"))
