"""Verify: a package's own weights, run and compared with the unquantized model; the verdict is quality.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.chat.compare import check
from mlcbuild.errors import MlcBuildError
from mlcbuild.measure import layers
from mlcbuild.measure.blocks import Blocks
from mlcbuild.measure.packed import Packed
from mlcbuild.measure.unquantized import Unquantized
from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.recipes.types import quantization_from_json
from mlcbuild.runtime import evaluate, library_file, package, quality, weights
from mlcbuild.runtime.model import Model, conversation, load_network
from mlcbuild.runtime.reference import load_reference
from mlcbuild.runtime.tokenizer import Tokenizer, load_tokenizer
from mlcbuild.steps.job import Job

VERSION = 1
CODE = (
    "mlcbuild.chat.checkpoint",
    "mlcbuild.chat.compare",
    "mlcbuild.chat.conversation",
    "mlcbuild.chat.derive",
    "mlcbuild.chat.difference",
    "mlcbuild.chat.jinja",
    "mlcbuild.chat.tokenizer_info",
    "mlcbuild.checkpoints.header",
    "mlcbuild.checkpoints.mapped",
    "mlcbuild.measure.blocks",
    "mlcbuild.measure.layers",
    "mlcbuild.measure.model",
    "mlcbuild.measure.packed",
    "mlcbuild.measure.unquantized",
    "mlcbuild.models.parameters",
    "mlcbuild.models.structure",
    "mlcbuild.quantization",
    "mlcbuild.recipes.types",
    "mlcbuild.runtime.evaluate",
    "mlcbuild.runtime.library",
    "mlcbuild.runtime.library_file",
    "mlcbuild.runtime.model",
    "mlcbuild.runtime.package",
    "mlcbuild.runtime.quality",
    "mlcbuild.runtime.reference",
    "mlcbuild.runtime.sampling",
    "mlcbuild.runtime.session",
    "mlcbuild.runtime.text",
    "mlcbuild.runtime.threads",
    "mlcbuild.runtime.tokenizer",
    "mlcbuild.runtime.tvm_runtime",
    "mlcbuild.runtime.weights",
)
TOOLS = ("apache-tvm", "apache-tvm-ffi", "jinja2", "numpy", "tokenizers", "sentencepiece")


Config = Mapping[str, Any]  # mlc-chat-config.json
Measured = tuple[evaluate.Comparison, dict[str, Any]]  # and what else quality.json is to say


def run(job: Job) -> None:
    """Fields: method (whole, layers), class (q0, q3, q4, q8), model_dtype, kl and perplexity_increase (null: the
    class's), gate; for method layers also structure and quantization.

    Inputs: `package`, `convert` (parameters.json), `text` (one file), `reference`: a float32 library of the structure,
    or of its pieces for method layers. For method whole, `cpu_library` of the same structure and quantization that this
    machine can run, where the package's own is for another machine; for method layers, `blocks`: the library of pieces
    of that quantization. Raises MlcBuildError for logits that are not finite, and with `gate: fail` for a miss.
    """
    limits = quality.bounds(
        job.fields["class"], job.fields["model_dtype"], job.fields["kl"], job.fields["perplexity_increase"]
    )
    method = {"whole": _whole, "layers": _layers}[job.fields["method"]]
    folder = job.folder(job.inputs["package"], job.scratch / "package")
    weights_folder = package.find_weights(folder)
    name = weights_folder.name.removesuffix("-MLC")
    config, tokenizer = package.read_config(weights_folder), load_tokenizer(weights_folder)
    job.note(f"{name}: comparing with the unquantized model")
    executed = method is _whole and "cpu_library" not in job.inputs
    static_checks = [] if executed else _static_checks(folder, weights_folder)
    comparison, details = method(job, folder, config, tokenizer)
    figures = evaluate.rounded(comparison)
    status, problems = quality.judge(figures, limits)
    template, stops = check(conversation(config), weights_folder)
    status, problems = ("failed", [*stops, *problems]) if stops else (status, problems)
    gate = job.fields["gate"]
    if status == "failed" and gate == "fail":
        raise MlcBuildError(_failure(name, problems, figures, limits))
    for problem in problems:
        job.note(f"{name}: {problem}")
    for warning in template.warnings:
        job.note(f"{name}: warning: {warning}")
    notes = job.inputs["convert"].read_json("parameters.json").get("notes", [])
    report = {
        "status": status,
        "gate": gate,
        "method": job.fields["method"],
        **figures,
        **details,
        "thresholds": dataclasses.asdict(limits),
        "problems": problems,
        **({"notes": notes} if notes else {}),  # what is true of the weights before this build touched them
        "library_executed": executed,
        "static_checks": static_checks,
        "template": template.report,
    }
    (job.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _whole(job: Job, folder: Path, config: Config, tokenizer: Tokenizer) -> Measured:
    """Both models in memory, one window of the text after the other."""
    library = None
    if "cpu_library" in job.inputs:
        library = _only(job.folder(job.inputs["cpu_library"], job.scratch / "cpu"), "model.*")
    weights_folder = package.find_weights(folder)
    model = Model(load_network(package.find(weights_folder if library else folder, library)), config, weights_folder)
    reference = load_reference(
        _only(job.folder(job.inputs["reference"], job.scratch / "reference"), "model.*"),
        job.inputs["convert"].read_json("parameters.json"),
        lambda digest, _: job.materials[digest],
        job.scratch,
    )
    comparison = evaluate.compare(
        model.logits_in_pieces,
        reference.logits_in_pieces,
        _windows(job, tokenizer, model.context_window_size, reference.context_window_size),
        lambda done, total: job.progress(done, total, "tokens"),
    )
    return comparison, {}


def _layers(job: Job, folder: Path, config: Config, tokenizer: Tokenizer) -> Measured:
    """The text through one layer of both models after the other."""
    model = structure.from_json(job.fields["structure"])
    ours, theirs = (
        Blocks(_only(job.folder(job.inputs[name], job.scratch / name), "model.*")) for name in ("blocks", "reference")
    )
    format_ = quantization_from_json(job.fields["quantization"])
    found = layers.compare(
        model,
        (theirs, Unquantized(job.inputs["convert"].read_json("parameters.json"), job.materials)),
        (ours, Packed(package.find_weights(folder), parameters(model), format_)),
        _windows(job, tokenizer, config.get("context_window_size", -1), theirs.window),
        lambda done, total: job.progress(done, total, "layers"),
    )
    errors = {"tensors": found.tensors, "blocks": found.blocks}
    return found.comparison, {
        "relative_error": {kind: {name: float(f"{e:.1e}") for name, e in each.items()} for kind, each in errors.items()}
    }


def _windows(job: Job, tokenizer: Tokenizer, *limits: int) -> list[Sequence[int]]:
    """The evaluation text in windows that both libraries take; a limit of -1 is none."""
    text = _only_file(job).read_text(encoding="utf-8")
    documents = evaluate.documents(text, tokenizer)
    return list(evaluate.windows(documents, min([evaluate.WINDOW, *(limit for limit in limits if limit > 0)])))


def _only_file(job: Job) -> Path:
    paths = [entry.path for entry in job.inputs["text"].files.values()]
    if len(paths) != 1:
        raise MlcBuildError(f"the evaluation text is {len(paths)} files, expected one")
    return paths[0]


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise MlcBuildError(f"{folder}: {len(found)} files {pattern}, expected one")
    return found[0]


def _static_checks(folder: Path, weights_folder: Path) -> list[str]:
    """What can be said of a library that does not run here."""
    suffixes = (*package.LOADABLE, *package.OTHER_LIBRARIES)
    libraries = [path for path in sorted(folder.iterdir()) if path.suffix in suffixes]
    if len(libraries) != 1:
        raise MlcBuildError(f"the package holds {len(libraries)} libraries, expected one")
    return library_file.check(libraries[0], weights.read_index(weights_folder), libraries[0].name)


def _failure(name: str, problems: Sequence[str], figures: dict[str, float | int], limits: quality.Bounds) -> str:
    return (
        f"{name} does not pass verification: {'; '.join(problems)}.\n"
        f"KL divergence {figures['kl']:g} (at most {limits.fail_kl:g}), "
        f"perplexity {figures['perplexity']:g} against {figures['reference_perplexity']:g} unquantized "
        f"({figures['perplexity_increase']:+.1%}, at most {limits.fail_perplexity_increase:+.1%}), "
        f"same likeliest token {figures['top1_agreement']:.0%}, over {figures['tokens']} tokens.\n"
        "Use a finer quantization, or, where this is right for the model, say so in its YAML file: "
        "`verify: {kl: ...}` for other bounds, `verify: {gate: report}` to record a miss only"
    )
