"""The shape that the benchmarks run (TinyLlama's, 1.1 billion parameters), its libraries and its random weights."""

from __future__ import annotations

import itertools
import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlcbuild.chat.config import chat_config
from mlcbuild.chat.conversation import from_data
from mlcbuild.chat.tokenizer_info import json_tokenizer
from mlcbuild.compiler import assemble, targets
from mlcbuild.compiler.cpu.build import build as build_library
from mlcbuild.compiler.cpu.lower import lower
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.recipes import convert
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Quantization, Target

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
CONFIG_7B = {
    **CONFIG,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}
TARGETS = load(ROOT).targets
CPU = TARGETS["cpu"]


def structure(config: dict[str, Any] = CONFIG, **changes: Any) -> Structure:
    return resolve(load(ROOT).architectures["llama"], {**config, **changes}, {"max_batch_size": 8})


def quantization(name: str) -> Quantization:
    data = yaml.safe_load((ROOT / "recipes" / "quantizations" / f"{name}.yaml").read_text())
    return convert.quantization(name, data, {})


def build(name: str, output: Path, scratch: Path, shape: Structure, target: Target = CPU) -> None:
    """The library of `shape` in quantization `name` for this machine, as `target` (a stock one for it) says."""
    scratch.mkdir(parents=True, exist_ok=True)
    device, bits = targets.resolve(target), target.activation_bits
    lowered = scratch / "module.json"
    module = lower(replace(shape, vocab_size=1), quantization(name), name, device, activation_bits=bits)
    assemble.save(module, lowered)
    build_library(lowered, device, {}, target.linker, output, scratch)


def write_weights(name: str, folder: Path, shape: Structure) -> int:
    """A weights folder of random numbers, small enough that nothing overflows; its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    block = random.integers(0, 1 << 32, 1 << 20, np.uint32)
    shards: list[dict[str, Any]] = []
    total = 0
    for each in quantized_parameters(parameters(shape), quantization(name)):
        bits = np.dtype("uint16" if each.dtype == "bfloat16" else each.dtype)
        count = int(np.prod(each.shape))
        if bits.kind == "u" and each.dtype != "bfloat16":
            data = np.resize(block.view(bits), count)
        else:
            scale = 1.0 if len(each.shape) == 1 else 0.02 if each.form == "value" else 0.003
            floats = np.resize(random.standard_normal(1 << 16, np.float32) * scale, count)
            data = (floats.view(np.uint32) >> 16).astype(np.uint16) if each.dtype == "bfloat16" else floats.astype(bits)
        path = f"params_shard_{len(shards)}.bin"
        (folder / path).write_bytes(data.tobytes())
        record = {"name": each.name, "shape": each.shape, "dtype": each.dtype, "format": "raw"}
        record |= {"nbytes": data.nbytes, "byteOffset": 0}
        shards.append(
            {"dataPath": path, "format": "raw-shard", "nbytes": data.nbytes, "md5sum": "", "records": [record]}
        )
        total += data.nbytes
    index = {"metadata": {"ParamSize": len(shards), "ParamBytes": total, "BitsPerParam": 0.0}, "records": shards}
    (folder / "tensor-cache.json").write_text(json.dumps(index))
    return total


def write_package(name: str, folder: Path, scratch: Path) -> None:
    """A package of the shape as a build leaves it in dist/: weights, library, configuration, a made-up tokenizer."""
    shape = structure()
    weights = folder / f"shape-{name}-MLC"
    write_weights(name, weights, shape)
    build(name, folder / f"shape-{name}-cpu.so", scratch, shape)
    tokenizer = byte_level_tokenizer(CONFIG["vocab_size"])
    (weights / "tokenizer.json").write_text(json.dumps(tokenizer))
    sizes = {"vocab_size": CONFIG["vocab_size"], "context_window_size": 2048, "prefill_chunk_size": 512}
    template = from_data(
        "LM", {"roles": {"user": "", "assistant": ""}, "seps": [""], "stop_str": [], "system_message": ""}
    )
    ends = [{"eos_token_id": 0, "bos_token_id": 0}]
    config = chat_config("llama", name, sizes, template, json_tokenizer(tokenizer), ["tokenizer.json"], ends)
    (weights / "mlc-chat-config.json").write_text(json.dumps(config))


def byte_level_tokenizer(size: int) -> dict[str, Any]:
    """A tokenizer.json of so many tokens: bytes, and words of two and four letters that merges make of them."""
    from tokenizers import pre_tokenizers

    singles = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    merges = [*([*pair] for pair in pairs), *map(list, itertools.product(pairs, repeat=2))]
    tokens = ["<end>", *singles, *("".join(merge) for merge in merges)][:size]
    merges = merges[: size - 1 - len(singles)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    end = {"id": 0, "content": "<end>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [{**end, "normalized": False}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
