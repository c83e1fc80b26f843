"""Verify: a package's own weights, run and compared with the unquantized model; the verdict is quality.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.chat.compare import Comparison as Checked
from mlcbuild.chat.compare import check
from mlcbuild.engine.job import Job
from mlcbuild.errors import MlcBuildError
from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.recipes.types import quantization_from_json
from mlcbuild.runtime import library_file, package, weights
from mlcbuild.runtime.embedding import pooling, text_limit, truncated
from mlcbuild.runtime.model import Model, conversation, load_network
from mlcbuild.runtime.tokenizer import Tokenizer, load_tokenizer
from mlcbuild.verify import embeddings, evaluate, layers, quality
from mlcbuild.verify.blocks import Blocks
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.reference import load_reference
from mlcbuild.verify.unquantized import Unquantized

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi", "jinja2", "numpy", "tokenizers", "sentencepiece")


Config = Mapping[str, Any]  # mlc-chat-config.json


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a method found: `status` (passed, warned, failed) and why, figures, what else quality.json is to say, the
    bounds, and for a failure the figures beside the bounds and what to do.
    """

    status: str
    problems: list[str]
    figures: Mapping[str, float | int]
    details: Mapping[str, Any]
    thresholds: Mapping[str, float]
    explanation: str


def run(job: Job) -> None:
    """Fields: method (whole, layers, embeddings), class (q0, q3, q4, q8), model_dtype, kl and perplexity_increase
    (null: the class's), gate; for layers also structure and quantization, for embeddings cosine (null: the class's).

    Inputs: `package`, `convert` (parameters.json), `text` (one file), `reference`: a float32 library of the structure,
    or of its pieces for method layers. For method whole, `cpu_library` of the same structure and quantization that this
    machine can run, where the package's own is for another machine; for method layers, `blocks`: the library of pieces
    of that quantization. Method embeddings takes what `whole` does. Raises MlcBuildError for logits or hidden states
    that are not finite, and with `gate: fail` for a miss.
    """
    method = {"whole": _whole, "layers": _layers, "embeddings": _embeddings}[job.fields["method"]]
    folder = job.folder(job.inputs["package"], job.scratch / "package")
    weights_folder = package.find_weights(folder)
    name = weights_folder.name.removesuffix("-MLC")
    config, tokenizer = package.read_config(weights_folder), load_tokenizer(weights_folder)
    job.note(f"{name}: comparing with the unquantized model")
    executed = method is not _layers and "cpu_library" not in job.inputs
    static_checks = [] if executed else _static_checks(folder, weights_folder)
    verdict = method(job, folder, config, tokenizer)
    status, problems = verdict.status, verdict.problems
    if method is _embeddings:  # which nobody has a conversation with
        template, stops = Checked({"checked": False, "reason": "a model of texts"}), list[str]()
    else:
        template, stops = check(conversation(config), weights_folder)
    status, problems = ("failed", [*stops, *problems]) if stops else (status, problems)
    gate = job.fields["gate"]
    if status == "failed" and gate == "fail":
        raise MlcBuildError(f"{name} does not pass verification: {'; '.join(problems)}.\n{verdict.explanation}")
    for problem in problems:
        job.note(f"{name}: {problem}")
    for warning in template.warnings:
        job.note(f"{name}: warning: {warning}")
    notes = job.inputs["convert"].read_json("parameters.json").get("notes", [])
    report = {
        "status": status,
        "gate": gate,
        "method": job.fields["method"],
        **verdict.figures,
        **verdict.details,
        "thresholds": verdict.thresholds,
        "problems": problems,
        **({"notes": notes} if notes else {}),  # what is true of the weights before this build touched them
        "library_executed": executed,
        "static_checks": static_checks,
        "template": template.report,
    }
    (job.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _whole(job: Job, folder: Path, config: Config, tokenizer: Tokenizer) -> Verdict:
    """Both models in memory, one window of the text after the other."""
    model, reference = _models(job, folder, config)
    comparison = evaluate.compare(
        model.logits_in_pieces,
        reference.logits_in_pieces,
        _windows(job, tokenizer, model.context_window_size, reference.context_window_size),
        lambda done, total: job.progress(done, total, "tokens"),
    )
    return _of_tokens(job, comparison, {})


def _embeddings(job: Job, folder: Path, config: Config, tokenizer: Tokenizer) -> Verdict:
    """Both models in memory, the vectors of one document after the other."""
    model, reference = _models(job, folder, config)
    how = pooling(config, model.network.library)
    limit = text_limit(model.network.library)
    texts = [truncated(ids, limit) for ids in evaluate.documents(_text(job), tokenizer)]
    comparison = embeddings.compare(
        model.hidden_states,
        reference.hidden_states,
        how,
        texts,
        lambda done, total: job.progress(done, total, "tokens"),
    )
    limits = embeddings.bounds(job.fields["class"], job.fields["model_dtype"], job.fields["cosine"])
    figures = embeddings.rounded(comparison)
    status, problems = embeddings.judge(figures, limits)
    details = {"pooling": dataclasses.asdict(how)}
    return Verdict(status, problems, figures, details, dataclasses.asdict(limits), embeddings.advice(figures, limits))


def _models(job: Job, folder: Path, config: Config) -> tuple[Model, Model]:
    """The package, on a library that runs here, and the unquantized model."""
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
    return model, reference


def _layers(job: Job, folder: Path, config: Config, tokenizer: Tokenizer) -> Verdict:
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
    details = {
        "relative_error": {kind: {name: float(f"{e:.1e}") for name, e in each.items()} for kind, each in errors.items()}
    }
    return _of_tokens(job, found.comparison, details)


def _of_tokens(job: Job, comparison: evaluate.Comparison, details: dict[str, Any]) -> Verdict:
    """What the logits of a model that writes come to."""
    fields = job.fields
    limits = quality.bounds(fields["class"], fields["model_dtype"], fields["kl"], fields["perplexity_increase"])
    figures = evaluate.rounded(comparison)
    status, problems = quality.judge(figures, limits)
    return Verdict(status, problems, figures, details, dataclasses.asdict(limits), _explanation(figures, limits))


def _windows(job: Job, tokenizer: Tokenizer, *limits: int) -> list[Sequence[int]]:
    """The evaluation text in windows that both libraries take; a limit of -1 is none."""
    documents = evaluate.documents(_text(job), tokenizer)
    return list(evaluate.windows(documents, min([evaluate.WINDOW, *(limit for limit in limits if limit > 0)])))


def _text(job: Job) -> str:
    paths = [entry.path for entry in job.inputs["text"].files.values()]
    if len(paths) != 1:
        raise MlcBuildError(f"the evaluation text is {len(paths)} files, expected one")
    return paths[0].read_text(encoding="utf-8")


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


def _explanation(figures: Mapping[str, float | int], limits: quality.Bounds) -> str:
    return (
        f"KL divergence {figures['kl']:g} (at most {limits.fail_kl:g}), "
        f"perplexity {figures['perplexity']:g} against {figures['reference_perplexity']:g} unquantized "
        f"({figures['perplexity_increase']:+.1%}, at most {limits.fail_perplexity_increase:+.1%}), "
        f"same likeliest token {figures['top1_agreement']:.0%}, over {figures['tokens']} tokens.\n"
        "Use a finer quantization, or, where this is right for the model, say so in its YAML file: "
        "`verify: {kl: ...}` for other bounds, `verify: {gate: report}` to record a miss only"
    )
