"""`mlcbuild compare A B`: two packages' figures side by side, from their manifests and quality reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.text import executed, table

Package = Mapping[str, Any]

# (what, how to get it; None where a package does not have it)
_ROWS: tuple[tuple[str, Callable[[Package], object]], ...] = (
    ("model", lambda p: p["recipe"]["model"]["name"]),
    ("quantization", lambda p: p["recipe"]["quantization"]["name"]),
    ("target", lambda p: p["recipe"]["target"]["name"]),
    ("status", lambda p: p["quality"]["status"]),
    ("KL divergence", lambda p: p["quality"].get("kl")),
    ("same likeliest token", lambda p: p["quality"].get("top1_agreement")),
    ("perplexity", lambda p: p["quality"].get("perplexity")),
    ("unquantized perplexity", lambda p: p["quality"].get("reference_perplexity")),
    ("perplexity increase", lambda p: p["quality"].get("perplexity_increase")),
    ("cosine of vectors", lambda p: p["quality"].get("cosine")),
    ("error of hidden states", lambda p: p["quality"].get("hidden_error")),
    ("tokens compared", lambda p: p["quality"]["tokens"]),
    ("library executed", lambda p: executed(p["quality"])),
    ("bits per parameter", lambda p: p["bits_per_parameter"]),
    ("weights, bytes", lambda p: p["weights_bytes"]),
    ("library, bytes", lambda p: p["library_bytes"]),
)
_PERCENT = ("same likeliest token", "perplexity increase", "error of hidden states")


def compare(one: Path, other: Path) -> str:
    """A table with a row per figure: both packages' values and, for numbers, how the second relates to the first.

    Raises MlcBuildError for a folder that is not a package.
    """
    packages = [read_package(folder) for folder in (one, other)]
    lines = [("", one.name, other.name, "second / first")]
    for what, get in _ROWS:
        values = [get(package) for package in packages]
        if values != [None, None]:  # a figure of another kind of model
            lines.append((what, _text(what, values[0]), _text(what, values[1]), _relation(what, *values)))
    return "".join(f"{line}\n" for line in table(lines))


def read_package(folder: Path) -> dict[str, Any]:
    """manifest.json with what its files say of sizes. Raises MlcBuildError where there is none, or not a whole one."""
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files: Mapping[str, Any] = manifest["files"]
        index = next(name for name in files if name.endswith("/tensor-cache.json"))
        bits = json.loads((folder / index).read_text(encoding="utf-8"))["metadata"]["BitsPerParam"]
        quality = manifest["quality"]
    except FileNotFoundError as error:
        raise MlcBuildError(
            f"{error.filename}: no such file; a package is a folder dist/RECIPE that a build made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise MlcBuildError(f"{path}: not the manifest of a package ({error!r})") from None
    weights = sum(file["size"] for name, file in files.items() if name.endswith(".bin"))
    library = sum(file["size"] for name, file in files.items() if "/" not in name and name != "quality.json")
    return {
        **manifest,
        "quality": quality,
        "bits_per_parameter": round(bits, 3),
        "weights_bytes": weights,
        "library_bytes": library,
    }


def _text(what: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if what in _PERCENT else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _relation(what: str, first: object, second: object) -> str:
    if not isinstance(first, int | float) or not isinstance(second, int | float):
        return ""
    if what in _PERCENT:
        return f"{second - first:+.1%}"
    return f"{second / first:.3g}" if first else ""
