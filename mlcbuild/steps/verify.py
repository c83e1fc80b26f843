"""Verify: a package's own weights, run and compared with the unquantized model; the verdict is quality.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.chat.tokenizer_info import unknown_stops
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import evaluate, library_file, package, quality, weights
from mlcbuild.runtime.model import Model, load_network
from mlcbuild.runtime.reference import load_reference
from mlcbuild.steps.job import Job

VERSION = 1
CODE = (
    "mlcbuild.chat.conversation",
    "mlcbuild.chat.tokenizer_info",
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
TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "tokenizers", "sentencepiece")


def run(job: Job) -> None:
    """Fields: class (q0, q3, q4, q8), model_dtype, kl and perplexity_increase (null: the class's), gate.

    Inputs: `package`, `convert` (parameters.json), `reference` (a float32 library of the structure), `text` (one file);
    and `cpu_library`, a library of the same structure and quantization that this machine can run, where the package's
    own is for another machine. Raises MlcBuildError for logits that are not finite, and with `gate: fail` for a miss.
    """
    limits = quality.bounds(
        job.fields["class"], job.fields["model_dtype"], job.fields["kl"], job.fields["perplexity_increase"]
    )
    folder = job.folder(job.inputs["package"], job.scratch / "package")
    weights_folder = package.find_weights(folder)
    executed = "cpu_library" not in job.inputs
    static_checks = [] if executed else _static_checks(folder, weights_folder)
    library = None if executed else _only(job.folder(job.inputs["cpu_library"], job.scratch / "cpu"), "model.*")
    files = package.find(folder if executed else weights_folder, library)
    model = Model(load_network(files), files.config, files.weights)
    reference = load_reference(
        _only(job.folder(job.inputs["reference"], job.scratch / "reference"), "model.*"),
        job.inputs["convert"].read_json("parameters.json"),
        lambda digest, _: job.materials[digest],
        job.scratch,
    )
    name = weights_folder.name.removesuffix("-MLC")
    job.note(f"{name}: comparing with the unquantized model")
    figures = evaluate.rounded(
        evaluate.compare(
            model.logits_in_pieces,
            reference.logits_in_pieces,
            _windows(job, model, reference),
            lambda done, total: job.progress(done, total, "tokens"),
        )
    )
    status, problems = quality.judge(figures, limits)
    stops = _unknown_stops(model)
    status, problems = ("failed", [*stops, *problems]) if stops else (status, problems)
    gate = job.fields["gate"]
    if status == "failed" and gate == "fail":
        raise MlcBuildError(_failure(name, problems, figures, limits))
    for problem in problems:
        job.note(f"{name}: {problem}")
    report = {
        "status": status,
        "gate": gate,
        **figures,
        "thresholds": dataclasses.asdict(limits),
        "problems": problems,
        "library_executed": executed,
        "static_checks": static_checks,
    }
    (job.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _windows(job: Job, model: Model, reference: Model) -> list[Sequence[int]]:
    """The evaluation text in windows that both libraries take."""
    text = _only_file(job).read_text(encoding="utf-8")
    limits = [limit for limit in (model.context_window_size, reference.context_window_size) if limit > 0]
    documents = evaluate.documents(text, model.tokenizer)
    return list(evaluate.windows(documents, min([evaluate.WINDOW, *limits])))


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


def _unknown_stops(model: Model) -> list[str]:
    template = model.conversation.to_json()
    unknown = unknown_stops(template["stop_token_ids"], template["stop_str"], model.tokenizer.tokens())
    return [
        f"template {template['name']}: {problem}: choose the template that the model was trained with"
        for problem in unknown
    ]


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
