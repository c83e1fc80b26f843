"""README.md of a repository of weights: what it is, where it comes from, how good it is, how to run it.

Its words are in card.md.jinja; here is what is put into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlcbuild.publishing.memory import MIB, memory
from mlcbuild.publishing.origin import Origin
from mlcbuild.publishing.package import Package
from mlcbuild.text import executed

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_NO_LIBRARY = "the address of a .wasm library of this model's structure"


def card(repository: str, packages: Sequence[Package], origin: Origin, libraries: Mapping[str, str]) -> str:
    """The model card. `packages` are those that have these weights, whatever their target; the first speaks for all.

    `libraries` are the addresses of published libraries, by recipe.
    """
    import jinja2
    import yaml

    package = packages[0]
    bases = [
        f"[{name}](https://huggingface.co/{name}) at commit `{commit}`" for name, commit in origin.repositories.items()
    ]
    said = origin.licence.get("license_name") or origin.licence.get("license")
    tools = {"mlcbuild": package.manifest["mlcbuild"], **package.manifest["tools"]}
    published = [each for each in packages if each.recipe in libraries]
    web = [libraries[each.recipe] for each in published if each.library.suffix == ".wasm"]
    template = jinja2.Template(
        _TEMPLATE.read_text("utf-8"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    text: str = template.render(
        head=yaml.safe_dump(_head(package, origin), sort_keys=False, allow_unicode=True),
        package=package,
        repository=repository,
        source=" and ".join(bases) or f"a local checkpoint called `{package.model}`",
        licence=f"Its licence is carried over: {said}." if said else "The base states no licence that could be read.",
        figures=_figures(package),
        libraries=list(dict.fromkeys(_line(each, libraries[each.recipe]) for each in published)),
        web_library=web[0] if web else _NO_LIBRARY,
        tools=", ".join(f"{name} {version}" for name, version in sorted(tools.items())),
    )
    return text


def _head(package: Package, origin: Origin) -> dict[str, Any]:
    """The facts that the hub reads."""
    head: dict[str, Any] = {"library_name": "mlc-llm"}
    if origin.repositories:
        bases = list(origin.repositories)
        head |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "quantized"}
    head |= {**origin.licence, **origin.carried, "tags": ["mlc-llm", "web-llm"]}
    if package.config.get("model_task", "chat") == "chat":
        head["pipeline_tag"] = "text-generation"
    return head


def _figures(package: Package) -> dict[str, str]:
    quality, needed = package.quality, memory(package)
    weights = package.quantization["weights"]
    format_ = f"{weights['bits']} bits, groups of {weights['group_size']}" if weights else "not quantized"
    measured = {
        "KL divergence from the base": _number(quality.get("kl"), "nats per token"),
        "perplexity": f"{_number(quality.get('perplexity'))} (base: {_number(quality.get('reference_perplexity'))})",
        "agreement on the likeliest token": _number(quality.get("top1_agreement")),
    }
    if quality.get("method") == "embeddings":
        measured = {
            "cosine to the base's vectors": _number(quality.get("cosine")),
            "lowest cosine of a text": _number(quality.get("lowest_cosine")),
        }
    return {
        "quantization": f"{package.quantization['name']} ({format_}, {package.quantization['model_dtype']})",
        **measured,
        "compared over": _number(quality.get("tokens"), "tokens"),
        "weights": f"{needed.parameters / MIB:.1f} MiB",
        "context window": f"{package.config['context_window_size']} tokens, {needed.kv_cache / MIB:.1f} MiB",
    }


def _line(package: Package, address: str) -> str:
    return f"- [{package.target['name']}]({address}); executed before it was shipped: {executed(package.quality)}"


def _number(value: Any, unit: str = "") -> str:
    return f"{value:g} {unit}".rstrip() if isinstance(value, int | float) else "not measured"
