"""The quality of every quantization on a model, as a Markdown table: `python benchmarks/quality.py > table.md`.

Builds the packages with doit, in a temporary workspace and a cache that can be kept, and reads their reports. The
figures are those of quality.json: the same on every machine (docs/verification.md says how they are rounded).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Quantization

ROUNDINGS = ("nearest", "mse", "calibrated", "gptq")
_DODO = '"""The tasks of this workspace."""\n\nfrom mlcbuild.tasks import *  # noqa: F403\n'
_HEADER = "| format | rounding | bits per parameter | KL divergence | same likeliest token | perplexity | increase |\n"
_LINE = "|---|---|---|---|---|---|---|\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("quantizations", nargs="*", help="names (default: all that can be built from this checkpoint)")
    parser.add_argument("--model", default="stories", help="a model that comes with mlcbuild (default: stories)")
    parser.add_argument("--target", default="cpu-exact", help="(default: cpu-exact, which rounds no activations)")
    parser.add_argument("--cache", type=Path, help="a cache to use and keep (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "workspace"
        cache = options.cache.absolute() if options.cache else Path(temporary) / "cache"
        (root / "recipes").mkdir(parents=True)
        (root / "dodo.py").write_text(_DODO)
        known = load(root).quantizations
        names = options.quantizations or [name for name, each in known.items() if not _only_read(each)]
        for name in names:
            text = f"model: {options.model}\nquantization: {name}\ntarget: {options.target}\nverify: {{gate: report}}\n"
            (root / "recipes" / f"{name}.yaml").write_text(text)
        command = [sys.executable, "-m", "doit", "--continue", f"cache={cache}"]
        status = subprocess.run(command, cwd=root, stdout=sys.stderr, check=False).returncode
        packages = {name: root / "dist" / name for name in names if (root / "dist" / name).is_dir()}
        sys.stdout.write(table({name: read(folder) for name, folder in packages.items()}, known))
    return status


def table(found: Mapping[str, Mapping[str, Any]], known: Mapping[str, Quantization]) -> str:
    """A row for each package, formats from many bits to few, roundings of one format together."""
    rows = [_HEADER, _LINE]
    bits = {known[name].format: figures["bits"] for name, figures in found.items()}
    for name in sorted(found, key=lambda name: _order(known[name], bits)):
        each, figures = known[name], found[name]
        rounding = each.rounding if each.weights is not None else "–"
        increase = f"{figures['perplexity_increase']:+.1%}"
        rows.append(
            f"| `{each.format}` | {rounding} | {figures['bits']:.2f} | {figures['kl'] or '< 0.0001'} | "
            f"{figures['top1_agreement']:.0%} | {figures['perplexity']:#.3g} | {increase} |\n"
        )
    return "".join(rows)


def read(folder: Path) -> dict[str, Any]:
    """The figures of a package. Bits are those of the weights folder, for each number of the unquantized model."""
    (index,) = folder.glob("*-MLC/tensor-cache.json")
    bits = json.loads(index.read_text(encoding="utf-8"))["metadata"]["BitsPerParam"]
    quality: dict[str, Any] = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    return {**quality, "bits": bits}


def _order(quantization: Quantization, bits: Mapping[str, float]) -> tuple[float, str, int]:
    return -bits[quantization.format], quantization.format, ROUNDINGS.index(quantization.rounding)


def _only_read(quantization: Quantization) -> bool:
    """AWQ's format is read from checkpoints that have it, never made."""
    return quantization.weights is not None and quantization.weights.scheme == "awq"


if __name__ == "__main__":
    sys.exit(main())
