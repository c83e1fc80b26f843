"""Quantizations that are made of others: `format` (those bytes, rounded otherwise) and `overrides`."""

from __future__ import annotations

from collections.abc import Mapping

from mlcbuild.recipes import convert
from mlcbuild.recipes.document import Document
from mlcbuild.recipes.problems import Problem
from mlcbuild.recipes.types import Quantization


def resolve(documents: Mapping[str, Document]) -> tuple[dict[str, Quantization], list[Problem]]:
    """Every quantization by name, sorted, and what is wrong with the names that they mention.

    One that names an unknown or damaged file is left out without another problem.
    """
    problems: list[Problem] = []
    plain = {name: each for name, each in documents.items() if "format" not in each.data}
    whole = {}
    for name, each in plain.items():
        mentioned = each.data.get("overrides", {})
        if any(other not in documents for other in mentioned.values()):
            continue
        wrong = [
            problem for pattern, other in mentioned.items() for problem in _clashes(each, pattern, documents[other])
        ]
        problems += wrong
        if not wrong:
            others = {other: documents[other].data for other in mentioned.values()}
            whole[name] = convert.quantization(name, each.data, others)
    for name, each in documents.items():
        base = each.data.get("format")
        if base in whole and each.data["rounding"] != "nearest" and not _has_scales(whole[base]):
            text = (
                f"`rounding` is `{each.data['rounding']}`, expected `nearest` for the format `{base}`: "
                "there is no other scale to search for"
            )
            problems.append(each.problem(text, ("rounding",)))
        elif base in whole:
            whole[name] = convert.rounded_otherwise(name, each.data, whole[base])
        elif base in documents and "format" in documents[base].data:
            text = f"`format` is `{base}`, which is no format of its own; name the one whose bytes it has"
            problems.append(each.problem(text, ("format",)))
    return {name: whole[name] for name in sorted(whole)}, problems


def _has_scales(quantization: Quantization) -> bool:
    weights = [quantization.weights, *(other for _, other in quantization.overrides)]
    return any(each is not None and each.scheme == "group" and each.symmetric for each in weights)


def _clashes(document: Document, pattern: str, other: Document) -> list[Problem]:
    if "format" in other.data:
        text = (
            f"`overrides.{pattern}` is `{other.file.name}`, which only rounds otherwise; name the format of its bytes"
        )
    elif "overrides" in other.data:
        text = f"`overrides.{pattern}` is `{other.file.name}`, which has overrides itself; name one without"
    elif other.data["model_dtype"] != document.data["model_dtype"]:
        text = (
            f"`overrides.{pattern}` is `{other.file.name}`, whose model_dtype is {other.data['model_dtype']}; "
            f"expected one with {document.data['model_dtype']}, as here"
        )
    else:
        return []
    return [document.problem(text, ("overrides", pattern))]
