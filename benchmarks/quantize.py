"""How fast a checkpoint becomes quantized weights, and in how much memory.

    python benchmarks/quantize.py                       # a 1.1B shape, 2.2 GB of float16, to q4f16_1
    python benchmarks/quantize.py --shape 7b --layers 4 # the same at a 7B model's matrix sizes, fewer layers
    python benchmarks/quantize.py --quantization q4f16_1-mse --rounds 1 --no-llama

Makes a random, sharded checkpoint in a temporary folder, which is removed afterwards. Every measurement is a process of
its own on as many cores as it has threads; rounds are interleaved and medians are printed, beside a plain copy of the
same files, a sha256 of them, and llama.cpp's Q4_0 quantizer on the same numbers. That one needs the package
llama-cpp-python, in this Python or in the one that `--llama-python` names; without it its line says so. Files are in
the page cache: the disk is not what is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2},
    # TinyLlama-1.1B and Llama-2-7B.
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
}  # fmt: skip
COMMON = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
          "hidden_act": "silu", "tie_word_embeddings": False}  # fmt: skip
SHARD = 500_000_000  # bytes of one checkpoint file, about
ROOT = Path(__file__).parents[1]
GB = 1e9


@dataclass(frozen=True)
class Result:
    seconds: float
    cpu: float  # user and system, all threads
    peak: int  # resident bytes, including mapped files


def main() -> None:
    options = _options()
    if options.child:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        print(json.dumps(CHILDREN[options.child](**json.loads(options.arguments))))
        return
    config = COMMON | SHAPES[options.shape]
    if options.layers:
        config["num_hidden_layers"] = options.layers
    size = sum(2 * _count(shape) for _, shape in _tensors(config))
    needed = int(size * (2.4 if options.no_llama else 3.7))
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        sys.exit(f"{options.folder}: {needed / GB:.1f} GB are needed, {free / GB:.1f} GB are free; choose a --folder")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mlcbuild-benchmark-") as name:
        _run(options, config, Path(name), size)


def _run(options: argparse.Namespace, config: dict[str, Any], folder: Path, size: int) -> None:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    print(f"making a {options.shape} checkpoint of {config['num_hidden_layers']} layers, {size / GB:.2f} GB of float16")
    make_checkpoint(config, checkpoint)
    llama = None if options.no_llama else _llama_python(options.llama_python)
    if llama:
        write_gguf(config, checkpoint, folder / "model.gguf")
    runs: dict[str, tuple[str, dict[str, Any], str]] = {}
    for threads in options.threads:
        arguments = {"folder": str(folder), "quantization": options.quantization, "threads": threads}
        runs[f"mlcbuild {options.quantization}, {_threads(threads)}"] = ("convert", arguments, sys.executable)
    runs["copy"] = ("copy", {"folder": str(folder)}, sys.executable)
    runs["sha256"] = ("sha256", {"folder": str(folder)}, sys.executable)
    if llama:
        for threads in options.threads:
            arguments = {"folder": str(folder), "threads": threads}
            runs[f"llama.cpp Q4_0, {_threads(threads)}"] = ("llama", arguments, llama)
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name, (child, arguments, python) in runs.items():
            _show(f"round {number + 1} of {options.rounds}: {name}")
            results[name].append(measure(python, child, arguments, arguments.get("threads", 1)))
    _show("")
    report(results, size, options.quantization)
    if not llama and not options.no_llama:
        print("llama.cpp: skipped: no llama-cpp-python here; name a Python that has it with --llama-python")


def _show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:70}\r", end="", file=sys.stderr, flush=True)


def report(results: dict[str, list[Result]], size: int, quantization: str) -> None:
    """Medians, and how the conversion compares with the rest."""
    print(f"{'':36}{'GB/s':>8}{'seconds':>9}{'CPU s':>8}{'GB per CPU s':>14}{'peak MB':>9}")
    middle = {}
    for name, all_of_it in results.items():
        seconds, cpu = (statistics.median(getattr(each, key) for each in all_of_it) for key in ("seconds", "cpu"))
        middle[name] = seconds
        peak = max(each.peak for each in all_of_it) / 1e6
        rate, work = size / GB / seconds, size / GB / max(cpu, 1e-9)
        print(f"{name:36}{rate:8.2f}{seconds:9.2f}{cpu:8.2f}{work:14.2f}{peak:9.0f}")
    for name in middle:
        if not name.startswith("mlcbuild"):
            continue
        threads = name.partition(", ")[2]
        others = [other for other in middle if other in ("copy", "sha256") or other == f"llama.cpp Q4_0, {threads}"]
        ratios = ", ".join(f"{middle[other] / middle[name]:.2f} x {other.partition(',')[0]}" for other in others)
        print(f"speed of {quantization} with {threads}: {ratios}")


def measure(python: str, child: str, arguments: dict[str, Any], cores: int) -> Result:
    """One measurement in a process of its own on so many cores. It times itself: starting Python is not part of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, __file__, "--child", child, "--cores", str(cores), "--arguments", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{child} failed:\n{done.stdout}{done.stderr}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


# What the processes do. Each returns the fields of a Result.


def convert(folder: str, quantization: str, threads: int) -> dict[str, float]:
    """What the steps convert and quantize do, without the cache."""
    from mlcbuild.checkpoints.index import index
    from mlcbuild.checkpoints.table import read_table
    from mlcbuild.models.architecture import resolve
    from mlcbuild.models.parameters import ignored, parameters
    from mlcbuild.quantization.stream import quantize
    from mlcbuild.recipes.load import load

    catalog = load(ROOT)
    checkpoint = Path(folder) / "checkpoint"
    config = json.loads((checkpoint / "config.json").read_text())
    structure = resolve(catalog.architectures["llama"], config, {})
    with tempfile.TemporaryDirectory(dir=folder) as output, tempfile.TemporaryDirectory(dir=folder) as scratch:
        clock = _Clock()
        files = {path.name: path for path in checkpoint.iterdir()}
        table = read_table(files, {name: name for name in files})
        wanted = parameters(structure)
        document = index(wanted, table, ignored(structure))
        chosen = catalog.quantizations[quantization]
        quantize(document, files, wanted, chosen, Path(output), threads=threads, scratch=Path(scratch))
        return clock.stop()


def copy(folder: str) -> dict[str, float]:
    """Through this process's memory, as a conversion's bytes go."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        clock = _Clock()
        buffer = bytearray(1 << 20)
        for path in sorted((Path(folder) / "checkpoint").glob("*.safetensors")):
            with path.open("rb", buffering=0) as source, (Path(output) / path.name).open("wb", buffering=0) as target:
                while count := source.readinto(buffer):
                    target.write(memoryview(buffer)[:count])
        return clock.stop()


def sha256(folder: str) -> dict[str, float]:
    clock = _Clock()
    for path in sorted((Path(folder) / "checkpoint").glob("*.safetensors")):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return clock.stop()


def llama(folder: str, threads: int) -> dict[str, float]:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.pure = True  # every matrix in Q4_0, none in a larger format
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    source, target = Path(folder) / "model.gguf", Path(folder) / "quantized.gguf"
    clock = _Clock()
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    result = clock.stop()
    if status or target.stat().st_size < source.stat().st_size // 8:
        sys.exit(f"llama_model_quantize failed with status {status}")
    target.unlink()
    return result


CHILDREN = {"convert": convert, "copy": copy, "sha256": sha256, "llama": llama}


class _Clock:
    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._cpu = sum(os.times()[:2])

    def stop(self) -> dict[str, float]:
        seconds, cpu = time.perf_counter() - self._start, sum(os.times()[:2]) - self._cpu
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        return {"seconds": seconds, "cpu": cpu, "peak": peak}


# The checkpoint, and the same numbers as llama.cpp wants them.


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (key_value, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (key_value, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """config.json, shards and their index: normally distributed float16 numbers."""
    import numpy as np

    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in _tensors(config):
        if filled > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * _count(shape)
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + 2 * _count(shape)
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[name] = path.name
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                for start in range(0, _count(shape), 1 << 22):
                    count = min(1 << 22, _count(shape) - start)
                    values = rng.standard_normal(count, np.float32)
                    values *= np.float32(0.02)
                    file.write(values.astype(np.float16).data)
    index = {"metadata": {"total_size": sum(2 * _count(shape) for _, shape in _tensors(config))},
             "weight_map": weight_map}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(config: dict[str, Any], checkpoint: Path, path: Path) -> None:
    """The checkpoint as a GGUF file (ggml-org/ggml docs/gguf.md), float16 matrices and float32 norms, no tokenizer."""
    import numpy as np

    from mlcbuild.checkpoints.mapped import read
    from mlcbuild.checkpoints.table import read_table

    table = read_table({file.name: file for file in checkpoint.iterdir()})
    facts = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "no_vocab",
    }
    head = b"GGUF" + _u32(3) + _u64(len(table)) + _u64(len(facts))
    for key, value in facts.items():
        head += _text(key)
        if isinstance(value, str):
            head += _u32(8) + _text(value)
        elif isinstance(value, float):
            head += _u32(6) + np.float32(value).tobytes()
        else:
            head += _u32(4) + _u32(value)
    offset = 0
    for name, ref in table.items():
        dimensions = b"".join(_u64(size) for size in reversed(ref.shape))
        matrix = len(ref.shape) == 2
        head += _text(_gguf_name(name)) + _u32(len(ref.shape)) + dimensions + _u32(1 if matrix else 0) + _u64(offset)
        nbytes = _count(ref.shape) * (2 if matrix else 4)
        offset += nbytes + -nbytes % 32
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for ref in table.values():
            values = read(ref) if len(ref.shape) == 2 else read(ref).astype(np.float32)
            file.write(np.ascontiguousarray(values).data)
            file.write(bytes(-values.nbytes % 32))


def _gguf_name(name: str) -> str:
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
               "lm_head.weight": "output.weight"}  # fmt: skip
    if name in outside:
        return outside[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    return f"blk.{layer}.{parts[part.removesuffix('.weight')]}.weight"


def _text(text: str) -> bytes:
    return _u64(len(text)) + text.encode()


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _llama_python(wanted: str) -> str | None:
    """`wanted`, if it has llama-cpp-python."""
    try:
        found = subprocess.run([wanted, "-c", "import llama_cpp"], capture_output=True, check=False)
    except OSError as error:
        sys.exit(f"--llama-python {wanted}: {error.strerror}")
    return None if found.returncode else wanted


def _options() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1b", help="matrix sizes (default: 1.1b)")
    parser.add_argument("--layers", type=int, help="how many layers (default: as many as the shape has)")
    parser.add_argument("--quantization", default="q4f16_1", help="a name of recipes/quantizations (default: q4f16_1)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores)}), help="default: 1 2")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the temporary folder goes")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--no-llama", action="store_true", help="without llama.cpp")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
