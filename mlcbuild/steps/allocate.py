"""allocate: the format of each kind of matrix, by what the model loses in it; for a quantization that is a budget.

Fields: structure, quantization (the format of `quantize`), formats [[name, weights]], bits_per_weight. Inputs: convert,
quantize (weights in the first of the formats), blocks (a float32 library of the decoder's pieces), checkpoint
(tokenizer files), text (one file). Materials: the checkpoint's files. Artifact: choice.json (overrides, as steps take
them: mlcbuild.quantization.budget) and shares.json, which says why.
"""

from __future__ import annotations

import json
from dataclasses import replace

from mlcbuild.engine.job import Job
from mlcbuild.models import structure
from mlcbuild.models.parameters import count, parameters
from mlcbuild.quantization import budget
from mlcbuild.recipes.types import CHOICE, Weights, quantization_from_json
from mlcbuild.runtime.tokenizer import load_tokenizer
from mlcbuild.verify import evaluate, shares
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.tensors import Unquantized

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "sentencepiece", "tokenizers")


def run(job: Job) -> None:
    """Raises MlcBuildError for a budget that no choice keeps, for an empty text, and for NaN and Inf."""
    model, fields = structure.from_json(job.fields["structure"]), job.fields
    known = parameters(model)
    formats = tuple((name, Weights(**weights) if weights else None) for name, weights in fields["formats"])
    given = quantization_from_json(fields["quantization"])
    wanted = replace(given, formats=formats)
    taken, numbers = budget.bits(known, wanted), count(model)
    sizes = {kind: of for kind, of in taken.items() if kind}
    budget.choose(fields["bits_per_weight"], taken, sizes, numbers)  # raises where nothing is so small: before a run
    names = ("blocks", "checkpoint", "quantize")
    blocks, tokenizer, weights = (job.folder(job.inputs[name], job.scratch / name) for name in names)
    ((library,), (text,)) = blocks.glob("model.*"), job.inputs["text"].files.values()
    pieces = Pieces(library)
    documents = evaluate.documents(evaluate.read_text(text.path), load_tokenizer(tokenizer))
    windows = shares.some(documents, min(pieces.window, model.context_window_size))
    checkpoint = Unquantized(job.inputs["convert"].read_json("parameters.json"), job.materials)
    measurement = shares.Measurement(model, wanted, pieces, checkpoint, Packed(weights, known, given))
    found = measurement.run(windows, lambda done, total: job.progress(done, total, "passes"))
    choice, bits, _ = budget.choose(fields["bits_per_weight"], taken, found, numbers)
    report = {
        "bits_per_weight": round(bits, 3),
        "formats": choice,
        "kl": found,
        "bits": {kind: {name: round(of[name] / numbers, 3) for name in of} for kind, of in sizes.items()},
    }
    job.note(f"{', '.join(f'{kind} {name}' for kind, name in choice.items())}: {bits:.2f} bits a weight")
    for name, content in ((CHOICE, budget.choice_json(wanted, choice)), ("shares.json", report)):
        (job.output / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
