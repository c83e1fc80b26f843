"""What mlcbuild supports, made from recipes/: counts in README.md, tables in docs/.

python scripts/supported.py            # write the tables
python scripts/supported.py --check    # exit with 1 where they are not what the files say
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import yaml

from mlcbuild.errors import MlcBuildError
from mlcbuild.models import wrappers
from mlcbuild.models.fields import CHOICES, NUMBERS
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Catalog, Quantization, Target

COMMAND = "python scripts/supported.py"
BEGIN, END = "<!-- supported: begin -->", "<!-- supported: end -->"
_CHOSEN = (
    *(*CHOICES, *NUMBERS, "rotary_dim", "kv_lora_rank", "q_lora_rank", "sliding_window_size", "layer_types"),
    "max_position_embeddings",
)

_TESTED = {"transformers": "transformers", "reference": "a reference of the tests", None: "–"}

_PAGE = f"""# What is supported

Made by `{COMMAND}` from the files in `recipes/`; the text between the two marks is overwritten.

{BEGIN}
{END}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the tables; the exit status."""
    parser = argparse.ArgumentParser(COMMAND, description="Bring the tables of what is supported up to date.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository")
    options = parser.parse_args(arguments)
    root: Path = options.root.absolute()
    page = root / "docs" / "supported.md"
    try:
        catalog = load(root)
        if not page.exists() and not options.check:
            page.write_text(_PAGE, encoding="utf-8")
        explained = root / "docs" / "architectures.md"
        texts = {
            root / "README.md": _filled(root / "README.md", short(catalog)),
            page: _filled(page, long(catalog)),
            explained: _filled(explained, architectures(catalog)),
        }
    except MlcBuildError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        name = path.relative_to(root)
        if options.check:
            print(f"{name}: not what the files in recipes/ say: run `{COMMAND}`", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale and options.check else 0


def short(catalog: Catalog) -> str:
    """How many there are of each kind, and the page that lists them."""
    kinds: dict[str, tuple[Sized, str]] = {
        "architectures": (catalog.architectures, "docs/architectures.md#what-there-is"),
        "quantizations": (catalog.quantizations, "docs/supported.md#quantizations"),
        "targets": (catalog.targets, "docs/supported.md#targets"),
        "conversation templates": (catalog.templates, "docs/supported.md#templates"),
        "models that come along": (catalog.models, "docs/supported.md#models-that-come-along"),
    }
    return " · ".join(f"[{len(names)} {kind}]({page})" for kind, (names, page) in kinds.items())


def long(catalog: Catalog) -> str:
    """A section for each kind, a row for each file."""
    sections: list[tuple[str, Callable[[Catalog], str]]] = [
        ("Architectures", _names_of_architectures),
        ("Quantizations", _quantizations),
        ("Targets", _targets),
        ("Templates", _templates),
        ("Models that come along", _models),
        ("Recipes of this repository", _recipes),
    ]
    return "\n\n".join(f"## {title}\n\n{rows(catalog)}" for title, rows in sections)


def architectures(catalog: Catalog) -> str:
    """A row for each architecture: what it computes, what it was compared with, what it can be packed in."""
    rows = []
    for name, architecture in catalog.architectures.items():
        data = architecture.data
        types = ", ".join(map(_code, architecture.match["model_type"]))
        rows.append((_code(name), types, _choices(data), _TESTED[data.get("tested_against")], _packed_in(data)))
    heads = ("architecture", "`model_type` in config.json", "choices", "tested against", "quantizations")
    inside = ", ".join(map(_code, wrappers.known()))
    others = textwrap.fill(f"The text model inside these, too ([wrappers](#wrappers)): {inside}.", 120)
    return f"{_table(heads, rows)}\n\n{others}"


def _names_of_architectures(catalog: Catalog) -> str:
    names = ", ".join(map(_code, catalog.architectures))
    return f"{names}.\n\n[architectures.md](architectures.md#what-there-is) has a row for each."


def _choices(data: Mapping[str, Any]) -> str:
    """What the file fixes, then what config.json decides."""
    decoder = data.get("decoder", {})
    fixed = [str(data["kind"])] if "kind" in data else []
    fixed += [f"{key} {value}" for key, value in decoder.items() if isinstance(value, str | float | int)]
    if decoder.get("rope_scaling"):
        fixed.append(f"rope scaling {'/'.join(decoder['rope_scaling'])}")
    chosen = [field for field in data["config"] if field in _CHOSEN]
    return "; ".join(filter(None, (", ".join(fixed), ", ".join(map(_code, chosen)))))


def _packed_in(data: Mapping[str, Any]) -> str:
    """AutoAWQ's own words cannot be put into another order."""
    moved = any("convert" in rule and rule["role"].endswith("_proj") for rule in data["parameters"])
    return "all but `q4f16_autoawq`" if moved else "all"


def _quantizations(catalog: Catalog) -> str:
    rows = []
    for name, quantization in catalog.quantizations.items():
        choices = ("–", "–")
        if quantization.weights is not None:
            choices = (f"{quantization.embedding}, {quantization.lm_head}", quantization.rounding)
        rows.append(
            (_code(name), quantization.kind, _weights(quantization), quantization.model_dtype, *choices,
             _description(catalog, "quantizations", name))
        )  # fmt: skip
    return _table(("quantization", "class", "weights", "model dtype", "embedding, lm_head", "rounding", ""), rows)


def _weights(quantization: Quantization) -> str:
    weights = quantization.weights
    if quantization.bits_per_weight is not None:
        return f"{quantization.bits_per_weight:g} bits in all, of {', '.join(name for name, _ in quantization.formats)}"
    if weights is None:
        return "–"
    groups = f"groups of {weights.group_size}, " if weights.group_size else ""
    return f"{weights.bits} bits, {groups}{weights.storage_dtype}, {weights.layout}"


def _processors(target: Target) -> list[str]:
    """What a target's kernels are compiled for, in the words of its file."""
    named = target.architectures or [target.device[key] for key in ("mcpu", "device") if key in target.device]
    return list(named)


def _targets(catalog: Catalog) -> str:
    rows = [
        (_code(name), ", ".join([target.device["kind"], *_processors(target)]), _code(f".{target.library}"),
         ", ".join(filter(None, [target.linker.kind, target.linker.target])), target.executes,
         _description(catalog, "targets", name))
        for name, target in catalog.targets.items()
    ]  # fmt: skip
    return _table(("target", "device", "library", "linker", "executes on", ""), rows)


def _templates(catalog: Catalog) -> str:
    rows = [
        (_code(name), ", ".join(_code(text) for text in template.data.get("stop_str", ())) or "–")
        for name, template in catalog.templates.items()
    ]
    return _table(("template", "stops at"), rows)


def _models(catalog: Catalog) -> str:
    rows = []
    for name, model in catalog.models.items():
        path = model.source.path
        source = f"`recipes/{path.relative_to(catalog.root / 'recipes')}`" if path else _code(str(model.source))
        if model.delta_of is not None:
            source += f", a delta to {_code(str(model.delta_of))}"
        context = model.overrides.get("context_window_size")
        rows.append((_code(name), source, _code(model.template), f"{context:,}" if context else "its own"))
    return _table(("model", "source", "template", "context"), rows)


def _recipes(catalog: Catalog) -> str:
    by_origin: dict[str, list[str]] = {}
    for name, recipe in catalog.recipes.items():
        by_origin.setdefault(recipe.origin, []).append(_code(name))
    return _table(("file", "recipes"), [(_code(origin), ", ".join(names)) for origin, names in by_origin.items()])


def _description(catalog: Catalog, folder: str, name: str) -> str:
    path = catalog.root / "recipes" / folder / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return str(content.get("description", ""))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"


def _filled(path: Path, content: str) -> str:
    """The file's text with `content` between its two marks. Raises MlcBuildError where they are missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MlcBuildError(f"{path}: no such file: run `{COMMAND}`") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest:
        raise MlcBuildError(
            f"{path}: write the lines {BEGIN} and {END} once, where the table belongs, then run it again"
        )
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
