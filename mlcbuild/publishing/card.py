"""README.md of a repository of weights: what it is, where it comes from, how good it is, how to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlcbuild.publishing.memory import memory
from mlcbuild.publishing.origin import Origin
from mlcbuild.publishing.package import Package

_MIB = 2**20


def card(repository: str, packages: Sequence[Package], origin: Origin, libraries: Mapping[str, str]) -> str:
    """The model card. `packages` are those that have these weights, whatever their target; the first speaks for all.

    `libraries` are the addresses of published libraries, by recipe.
    """
    import yaml

    package = packages[0]
    head: dict[str, Any] = {"library_name": "mlc-llm"}
    if origin.repositories:
        bases = list(origin.repositories)
        head |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "quantized"}
    head |= {**origin.licence, **origin.carried, "tags": ["mlc-llm", "web-llm"]}
    if package.config.get("model_task", "chat") == "chat":
        head["pipeline_tag"] = "text-generation"
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    parts = [
        _about(package, origin),
        _figures(package),
        _libraries(packages, libraries),
        _run(repository, packages, libraries),
        _versions(package),
    ]
    body = "\n\n".join(parts)
    return f"---\n{text}---\n\n# {package.weights.name}\n\n{body}\n"


def _about(package: Package, origin: Origin) -> str:
    bases = [
        f"[{name}](https://huggingface.co/{name}) at commit `{commit}`" for name, commit in origin.repositories.items()
    ]
    source = " and ".join(bases) or f"a local checkpoint called `{package.model}`"
    licence = origin.licence.get("license_name") or origin.licence.get("license")
    said = f"Its licence is carried over: {licence}." if licence else "The base states no licence that could be read."
    return (
        f"The weights of {source}, in the format `{package.quantization['name']}` of [MLC LLM](https://llm.mlc.ai), "
        f"for the MLC engine, WebLLM and the apps. {said}"
    )


def _figures(package: Package) -> str:
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
    rows = {
        "quantization": f"{package.quantization['name']} ({format_}, {package.quantization['model_dtype']})",
        **measured,
        "compared over": _number(quality.get("tokens"), "tokens"),
        "weights": f"{needed.parameters / _MIB:.1f} MiB",
        "context window": f"{package.config['context_window_size']} tokens, {needed.kv_cache / _MIB:.1f} MiB",
    }
    return "\n".join(["## Figures", "", "| | |", "|---|---|", *(f"| {key} | {text} |" for key, text in rows.items())])


def _libraries(packages: Sequence[Package], libraries: Mapping[str, str]) -> str:
    lines = [f"- [{each.target['name']}]({libraries[each.recipe]})" for each in packages if each.recipe in libraries]
    if not lines:
        return "## Libraries\n\nMLC LLM compiles one for the machine that it runs on."
    return "\n".join(["## Libraries", "", *dict.fromkeys(lines)])


def _run(repository: str, packages: Sequence[Package], libraries: Mapping[str, str]) -> str:
    package = packages[0]
    web = [libraries[each.recipe] for each in packages if each.library.suffix == ".wasm" and each.recipe in libraries]
    library = web[0] if web else "the address of a .wasm library of this model's structure"
    return f"""## Run it

With [MLC LLM](https://llm.mlc.ai) on the command line:

```bash
mlc_llm chat HF://{repository}
```

In Python:

```python
from mlc_llm import MLCEngine

engine = MLCEngine("HF://{repository}")
answer = engine.chat.completions.create(messages=[{{"role": "user", "content": "Hello"}}])
print(answer.choices[0].message.content)
engine.terminate()
```

In a browser, with [WebLLM](https://webllm.mlc.ai):

```javascript
import {{ CreateMLCEngine }} from "@mlc-ai/web-llm";

const model_list = [{{
  model: "https://huggingface.co/{repository}",
  model_id: "{package.weights.name}",
  model_lib: "{library}",
}}];
const engine = await CreateMLCEngine("{package.weights.name}", {{ appConfig: {{ model_list }} }});
```"""


def _versions(package: Package) -> str:
    tools = {"mlcbuild": package.manifest["mlcbuild"], **package.manifest["tools"]}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(tools.items()))
    return (
        f"## How it was made\n\nBy mlcbuild, from a recipe: {listed}. `provenance/` has the manifest of each build, "
        "with the digest of everything that went in, an in-toto statement and a CycloneDX bill of materials."
    )


def _number(value: Any, unit: str = "") -> str:
    return f"{value:g} {unit}".rstrip() if isinstance(value, int | float) else "not measured"
