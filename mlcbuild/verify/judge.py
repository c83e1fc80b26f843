"""A package judged: one of the methods makes figures of it, bounds make the verdict, quality.json says both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlcbuild.chat.compare import TemplateReport, check
from mlcbuild.errors import MlcBuildError
from mlcbuild.models import structure
from mlcbuild.models.parameters import parameters
from mlcbuild.recipes.types import quantization_from_json
from mlcbuild.runtime import library_file, package, weights
from mlcbuild.runtime.embedding import pooling, text_limit, truncated
from mlcbuild.runtime.model import Model, conversation, load_network
from mlcbuild.runtime.tokenizer import Tokenizer, load_tokenizer
from mlcbuild.verify import embeddings, evaluate, layers
from mlcbuild.verify.packed import Packed
from mlcbuild.verify.pieces import Pieces
from mlcbuild.verify.reference import load_reference
from mlcbuild.verify.tensors import Unquantized


@dataclass(frozen=True)
class Case:
    """A package and what it is judged by.

    fields      those of the step verify
    folder      the package
    convert     parameters.json, whose parts are in `materials`: sha256 -> checkpoint file
    libraries   by name: `reference`, and `cpu_library` or `blocks` where the method takes them
    scratch     an empty folder, for the reference's numbers
    progress    is told what is done, of how much, and the unit
    """

    fields: Mapping[str, Any]
    folder: Path
    convert: Mapping[str, Any]
    materials: Mapping[str, Path]
    libraries: Mapping[str, Path]
    text: str
    scratch: Path
    progress: Callable[[int, int, str], None]
    execution: Mapping[str, Any] | None = None  # of the library's kernels, where they were tried apart

    @cached_property
    def weights(self) -> Path:
        return package.find_weights(self.folder)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """mlc-chat-config.json"""
        return package.read_config(self.weights)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.weights)

    def count(self, unit: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done, total, unit)


@dataclass(frozen=True)
class Measured:
    """What a method found: rounded figures, and what else quality.json is to say."""

    figures: Mapping[str, float | int]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way of judging.

    criteria    the module whose `bounds`, `judge` and `advice` are for such figures
    own         fields that have a model's own bounds
    executes    it runs the package's own library, where that is for this machine
    converses   there is a template of conversations to be looked at
    """

    measure: Callable[[Case], Measured]
    criteria: Any
    own: tuple[str, ...]
    executes: bool = True
    converses: bool = True


def judge(case: Case, note: Callable[[str], None]) -> dict[str, Any]:
    """The content of quality.json.

    Raises MlcBuildError for logits or hidden states that are not finite, and with `gate: fail` for a miss.
    """
    fields = case.fields
    method, gate = METHODS[fields["method"]], fields["gate"]
    name = case.weights.name.removesuffix("-MLC")
    executed = method.executes and "cpu_library" not in case.libraries
    static_checks = [] if executed else _static_checks(case)
    measured = method.measure(case)
    limits = method.criteria.bounds(fields["class"], fields["model_dtype"], *(fields[name] for name in method.own))
    status, problems = method.criteria.judge(measured.figures, limits)
    template, stops = TemplateReport({"checked": False, "reason": "a model of texts"}), list[str]()
    if method.converses:
        template, stops = check(conversation(case.config), case.weights)
    status, problems = "failed" if stops else status, [*stops, *problems]
    if status == "failed" and gate == "fail":
        advice = method.criteria.advice(measured.figures, limits)
        raise MlcBuildError(f"{name} does not pass verification: {'; '.join(problems)}.\n{advice}")
    for text in (*problems, *(f"warning: {warning}" for warning in template.warnings)):
        note(f"{name}: {text}")
    notes = case.convert.get("notes", [])
    return {
        "status": status,
        "gate": gate,
        "method": fields["method"],
        **measured.figures,
        **measured.details,
        "thresholds": dataclasses.asdict(limits),
        "problems": problems,
        **({"notes": notes} if notes else {}),  # what is true of the weights before this build touched them
        **_execution(case, executed),
        "static_checks": static_checks,
        "template": template.report,
    }


def _execution(case: Case, executed: bool) -> dict[str, Any]:
    """Whether the library was run: true for this very one with these weights, else what ran its kernels."""
    if case.execution is not None:
        found = dict(case.execution)
        return {"library_executed": found.pop("executed"), "execution": found}
    reason = case.fields.get("not_executed")
    return {"library_executed": executed, **({"execution": {"reason": reason}} if reason else {})}


def _whole(case: Case) -> Measured:
    """Both models in memory, one window of the text after the other."""
    model, reference = _models(case)
    texts = _windows(case, model.context_window_size, reference.context_window_size)
    found = evaluate.compare(model.logits_in_pieces, reference.logits_in_pieces, texts, case.count("tokens"))
    return Measured(evaluate.rounded(found))


def _layers(case: Case) -> Measured:
    """The text through one layer of both models after the other."""
    model = structure.from_json(case.fields["structure"])
    ours, theirs = (Pieces(case.libraries[name]) for name in ("blocks", "reference"))
    format_ = quantization_from_json(case.fields["quantization"])
    found = layers.compare(
        model,
        (theirs, Unquantized(case.convert, case.materials)),
        (ours, Packed(case.weights, parameters(model), format_)),
        _windows(case, case.config.get("context_window_size", -1), theirs.window),
        case.count("layers"),
    )
    errors = {"tensors": found.tensors, "blocks": found.blocks}
    rounded = {kind: {name: float(f"{e:.1e}") for name, e in each.items()} for kind, each in errors.items()}
    return Measured(evaluate.rounded(found.figures), {"relative_error": rounded})


def _embeddings(case: Case) -> Measured:
    """Both models in memory, the vectors of one document after the other."""
    model, reference = _models(case)
    how = pooling(case.config, model.network.library)
    limit = text_limit(case.config, model.network.library)
    texts = [truncated(ids, limit) for ids in evaluate.documents(case.text, case.tokenizer)]
    found = embeddings.compare(model.hidden_states, reference.hidden_states, how, texts, case.count("tokens"))
    return Measured(embeddings.rounded(found), {"pooling": dataclasses.asdict(how)})


METHODS = {
    "whole": Method(_whole, evaluate, ("kl", "perplexity_increase")),
    "layers": Method(_layers, evaluate, ("kl", "perplexity_increase"), executes=False),
    "embeddings": Method(_embeddings, embeddings, ("cosine",), converses=False),
}


def _models(case: Case) -> tuple[Model, Model]:
    """The package, on a library that runs here, and the unquantized model."""
    library = case.libraries.get("cpu_library")
    network = load_network(package.find(case.weights if library else case.folder, library))
    model = Model(network, case.config, case.weights)
    return model, load_reference(case.libraries["reference"], case.convert, case.materials, case.scratch)


def _windows(case: Case, *limits: int) -> list[Sequence[int]]:
    """The evaluation text in windows that both libraries take; a limit of -1 is none."""
    documents = evaluate.documents(case.text, case.tokenizer)
    return list(evaluate.windows(documents, min([evaluate.WINDOW, *(limit for limit in limits if limit > 0)])))


def _static_checks(case: Case) -> list[str]:
    """What can be said of a library that does not run here."""
    suffixes = (*package.LOADABLE, *package.OTHER_LIBRARIES)
    libraries = [path for path in sorted(case.folder.iterdir()) if path.suffix in suffixes]
    if len(libraries) != 1:
        raise MlcBuildError(f"the package holds {len(libraries)} libraries, expected one")
    return library_file.check(libraries[0], weights.read_index(case.weights), libraries[0].name)
