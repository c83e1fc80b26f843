"""A matrix of many recipes built from nothing, for real: what runs, how often, and what it costs.

    python benchmarks/matrix.py                        # 100 recipes
    python benchmarks/matrix.py --recipes 1000 --workers 2
    python benchmarks/matrix.py --keep /tmp/matrix     # leave the workspace, its cache and its log there

The models are tiny llamas with random weights: twenty recipes of each (ten quantizations, two targets), and one model
in five has a structure of its own. So a thousand recipes are 50 models, 500 sets of weights and 200 libraries. Every
step is the real one: quantized, compiled, linked, verified, installed.

Printed are the steps by kind, how often each ran (once), the wall time, the CPU time of everything that was started,
and what a second build costs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlcbuild.recipes.files import stock
from mlcbuild.workspace.init import init

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import many

MODELS_PER_STRUCTURE = 5
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 64, 128, 4, 2, 2048
TEXT = "One day a star fell into the garden.<|endoftext|>The cat looked at it and was not afraid."


def main() -> None:
    options = _options()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="matrix-"))
    try:
        root = folder / "workspace"
        make_workspace(root, options.recipes)
        measure(root, options.workers)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def make_workspace(root: Path, count: int) -> None:
    """A workspace with `count` recipes, none of them built."""
    init(root)
    (root / "recipes" / "stories-cpu.yaml").unlink()
    models = root / "recipes" / "models"
    models.mkdir(exist_ok=True)
    (models / "text.txt").write_text(TEXT)
    names = [f"m{number:03}" for number in range(many.models(count))]
    for number, name in enumerate(names):
        write_checkpoint(models / name, layers=1 + number // MODELS_PER_STRUCTURE, seed=number)
        # Random numbers lose more to few bits than a trained model's.
        model = {"source": {"path": name}, "template": "chatml", "verify": {"gate": "report", "text": "text.txt"}}
        (models / f"{name}.yaml").write_text(json.dumps(model))
    many.write_matrices(root, names, count)


def write_checkpoint(folder: Path, layers: int, seed: int) -> None:
    """A llama of random weights, with the tokenizer of the model that ships with mlcbuild."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stock().recipes / "models" / "stories" / file, folder / file)
    random = np.random.default_rng(seed)
    narrow = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    for layer in range(layers):
        part = f"model.layers.{layer}"
        shapes |= {
            f"{part}.input_layernorm": (HIDDEN,),
            f"{part}.post_attention_layernorm": (HIDDEN,),
            f"{part}.self_attn.q_proj": (HIDDEN, HIDDEN),
            f"{part}.self_attn.k_proj": (narrow, HIDDEN),
            f"{part}.self_attn.v_proj": (narrow, HIDDEN),
            f"{part}.self_attn.o_proj": (HIDDEN, HIDDEN),
            f"{part}.mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            f"{part}.mlp.up_proj": (INTERMEDIATE, HIDDEN),
            f"{part}.mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
    tensors = {
        f"{name}.weight": (random.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")


def measure(root: Path, workers: int) -> None:
    """Build everything from nothing, then again, and print the figures."""
    log = root / "log.jsonl"
    first = build(root, f"cores={workers}", f"log_json={log}")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    built = [event for event in events if event["event"] == "step_finished" and event["outcome"] == "built"]
    times = Counter(event["step"] for event in built)
    kinds = Counter(event["kind"] for event in built)
    recipes = sum(event["event"] == "recipe_planned" for event in events)
    installed = sum(event["event"] == "package_installed" for event in events)
    print(f"{recipes:,} recipes, {installed:,} installed, {len(times):,} unique steps, {workers} workers")
    for kind, count in kinds.items():
        seconds = sum(event["seconds"] for event in built if event["kind"] == kind)
        print(f"  {kind:<10} {count:>6,}  {seconds / count:7.2f} s each")
    print(
        f"each step ran {', '.join(f'{often} times' if often > 1 else 'once' for often in sorted(set(times.values())))}"
    )
    print(f"wall {first.wall:,.0f} s, CPU {first.cpu:,.0f} s: {first.cpu / first.wall:.2f} cores busy", end="")
    print(f"; {first.wall / recipes:.2f} s a recipe")
    again = build(root)
    print(f"again: wall {again.wall:.2f} s, CPU {again.cpu:.2f} s")


def build(root: Path, *words: str) -> many.Cost:
    """What `doit build` costs. Raises RuntimeError."""
    command = [sys.executable, "-m", "doit", "build", *words]
    return many.run(command, root, {"TVM_NUM_THREADS": "1"}, root / "output.txt")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=100, metavar="N")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="cores that steps may use together")
    parser.add_argument("--keep", metavar="DIR", help="make the workspace there and leave it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
