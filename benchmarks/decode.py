"""How fast libraries decode and prefill on this CPU, next to llama.cpp and to the rate at which memory can be read.

    python benchmarks/decode.py                                        # q4f16_1, q4f32_1, q0f16 at one and two threads
    python benchmarks/decode.py --llama-python /path/to/python         # llama.cpp beside them (PyPI llama-cpp-python)
    python benchmarks/decode.py --torch                                # transformers on torch in bfloat16 beside them
    python benchmarks/decode.py --quantizations q3f16_1,q8f16_1 --threads 1
    python benchmarks/decode.py --target cpu-exact                     # activations not rounded to 8 bits

A 1.1B shape with random weights. Every contestant is a process that stays, its threads on as many cores; rounds are
interleaved, each with a measurement of the read bandwidth on the same cores, and medians are printed: absolute figures
of a shared machine wander, ratios less. Decoding starts after 16 tokens, prefill is 512 tokens at once. Bytes of a
token are all weights but the embedding, of which one row is read.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPT, STEPS, LONG = 16, 16, 512
LLAMA = ("Q4_0", "Q8_0", "F16")
_LIKE = {"q0": "F16", "q8": "Q8_0"}  # which of them has as many bits; Q4_0 is what the others are held against
TORCH = "torch bf16"
Measure = dict[str, Callable[[], float]]

READ = """
typedef long long i64; typedef float v __attribute__((vector_size(64)));
float read_all(const char *p, i64 n) {
    v a = {}, b = {}, c = {}, d = {};
    for (i64 i = 0; i + 256 <= n; i += 256) {
        a += *(v *)(p + i); b += *(v *)(p + i + 64); c += *(v *)(p + i + 128); d += *(v *)(p + i + 192);
        __builtin_prefetch(p + i + 4096);
    }
    a += b + c + d;
    return a[0];
}
"""


def main() -> None:
    options = _options()
    if options.worker:
        return serve(*options.worker)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        contestants = _prepare(options, folder)
        for threads in options.threads:
            compare(contestants, threads, options.rounds, folder)


def compare(contestants: list[tuple[str, str, Path, int]], threads: int, rounds: int, folder: Path) -> None:
    """`contestants`: name, interpreter, folder or file, bytes of a token."""
    workers, loads = {}, {}
    for name, python, path, _ in contestants:
        workers[name] = Worker(python, name, path, threads)
        loads[name] = workers[name].ask("load")  # one after the other
    bandwidth = Bandwidth(folder, threads)
    figures: dict[tuple[str, str], list[float]] = {}
    for what in ("decode", "prefill"):
        for _ in range(rounds):
            for name, worker in workers.items():
                figures.setdefault((name, "bandwidth"), []).append(bandwidth.measure())
                figures.setdefault((name, what), []).append(worker.ask(what))
    print(f"\n{threads} thread{'s' * (threads > 1)}, medians of {rounds} rounds")
    print(f"{'':11} {'decode':>8} {'GB/s':>6} {'of read':>8} {'prefill':>8} {'load':>6} {'resident':>9}")
    for name, _, _, nbytes in contestants:
        decode, prefill = (statistics.median(figures[name, what]) for what in ("decode", "prefill"))
        rate = decode * nbytes / 1e9
        load, resident = loads[name], workers[name].ask("resident")
        share = statistics.median(d * nbytes / 1e9 / b for d, b in zip(
            figures[name, "decode"], figures[name, "bandwidth"], strict=False))  # fmt: skip
        print(f"{name:11} {decode:8.1f} {rate:6.1f} {share:8.0%} {prefill:8.1f} {load:5.1f}s {resident / 1e9:7.2f}GB")
    reads = [value for (_, what), values in figures.items() if what == "bandwidth" for value in values]
    print(f"read bandwidth {statistics.median(reads):.1f} GB/s ({min(reads):.1f} to {max(reads):.1f})")
    for ours in (n for n in workers if n not in (*LLAMA, TORCH)):
        for name in (_LIKE.get(ours[:2], "Q4_0"), TORCH):
            if name in workers:
                ratios = [_median_ratio(figures, ours, name, what) for what in ("decode", "prefill")]
                title = name if name == TORCH else f"llama.cpp {name}"
                print(f"{ours} / {title}: decode {ratios[0]:.2f}, prefill {ratios[1]:.2f}")
    for worker in workers.values():
        worker.close()


def _median_ratio(figures: dict[tuple[str, str], list[float]], a: str, b: str, what: str) -> float:
    return statistics.median(x / y for x, y in zip(figures[a, what], figures[b, what], strict=True))


class Worker:
    """A contestant in its own process, asked one measurement at a time."""

    def __init__(self, python: str, name: str, path: Path, threads: int) -> None:
        command = [python, str(Path(__file__)), "--worker", name, str(path), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, what: str) -> float:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contestant ended; its message is above")
        return float(line)

    def close(self) -> None:
        self._process.communicate()


class Bandwidth:
    """GB/s of plain reading, from memory that no cache holds."""

    def __init__(self, folder: Path, threads: int) -> None:
        import numpy as np

        source, library = folder / "read.c", folder / "read.so"
        source.write_text(READ)
        flags = ["-O3", "-mcpu=native", "-shared", "-fPIC", "-nostdlib", "-o", str(library), str(source)]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags], check=True)
        self._read = ctypes.CDLL(str(library)).read_all
        self._memory = np.ones(64 << 20, np.float32)
        self._threads = threads

    def measure(self) -> float:
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, _cores(self._threads))
        part = self._memory.nbytes // self._threads // 64 * 64
        start = self._memory.ctypes.data // 64 * 64 + 64
        readers = [
            threading.Thread(target=self._read, args=(ctypes.c_void_p(start + i * part), ctypes.c_int64(part - 64)))
            for i in range(self._threads)
        ]
        begin = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        seconds = time.perf_counter() - begin
        os.sched_setaffinity(0, cpus)
        return self._memory.nbytes / seconds / 1e9


def serve(name: str, path: str, count: str) -> None:
    """The contestant `name`: answer `decode`, `prefill` in tokens a second, `load` in seconds, `resident` in bytes."""
    os.sched_setaffinity(0, _cores(int(count)))
    begin = time.perf_counter()
    start = _llama if name in LLAMA else _torch if name == TORCH else _ours
    measures = start(Path(path), int(count))
    loaded = time.perf_counter() - begin
    measures |= {"load": lambda: loaded, "resident": _resident}
    for line in sys.stdin:
        print(measures[line.strip()](), flush=True)


def _ours(folder: Path, threads: int) -> Measure:
    sys.path.insert(0, str(ROOT))
    from mlcbuild.runtime.library import Library, Network
    from mlcbuild.runtime.session import Session
    from mlcbuild.runtime.weights import load, read_index

    library = Library(folder / "model.so")
    records = {record.name: record for record in read_index(folder / "weights")}
    tensors = list(load([records[p.name] for p in library.metadata.parameters]))
    session = Session(Network(library, tensors, 32000, threads), 1, 1024)

    def decode() -> float:
        sequence = session.add()
        session.prefill(sequence, range(PROMPT))
        session.decode(sequence, 0)
        begin = time.perf_counter()
        for token in range(STEPS):
            session.decode(sequence, token)
        seconds = time.perf_counter() - begin
        session.remove(sequence)
        return STEPS / seconds

    def prefill() -> float:
        sequence = session.add()
        begin = time.perf_counter()
        session.prefill(sequence, range(LONG))
        seconds = time.perf_counter() - begin
        session.remove(sequence)
        return LONG / seconds

    return {"decode": decode, "prefill": prefill}


def _llama(path: Path, threads: int) -> Measure:
    from llama_cpp import llama_cpp as api

    api.llama_backend_init()
    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, ctypes.c_void_p())
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    parameters = api.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 1024, LONG, LONG
    parameters.n_threads = parameters.n_threads_batch = threads
    context = api.llama_init_from_model(model, parameters)

    def feed(*tokens: int) -> None:
        array = (api.llama_token * len(tokens))(*tokens)
        if api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama_decode failed")

    def decode(_keep: Any = silent) -> float:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        feed(*range(PROMPT))
        feed(0)
        begin = time.perf_counter()
        for token in range(STEPS):
            feed(token)
            api.llama_get_logits(context)
        return STEPS / (time.perf_counter() - begin)

    def prefill() -> float:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        begin = time.perf_counter()
        feed(*range(LONG))
        api.llama_get_logits(context)
        return LONG / (time.perf_counter() - begin)

    return {"decode": decode, "prefill": prefill}


def _torch(_: Path, threads: int) -> Measure:
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    from benchmarks import shape_1b

    torch.set_num_threads(threads)
    config = {key: value for key, value in shape_1b.CONFIG.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # Made from the config, not a weight, so `to_empty` leaves it undefined.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

    def feed(tokens: range | list[int], past: Any = None) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([list(tokens)]), past_key_values=past, use_cache=True, logits_to_keep=1)

    def decode() -> float:
        past = feed([0], feed(range(PROMPT)).past_key_values).past_key_values
        begin = time.perf_counter()
        for token in range(STEPS):
            past = feed([token], past).past_key_values
        return STEPS / (time.perf_counter() - begin)

    def prefill() -> float:
        begin = time.perf_counter()
        feed(range(LONG))
        return LONG / (time.perf_counter() - begin)

    return {"decode": decode, "prefill": prefill}


def _prepare(options: argparse.Namespace, folder: Path) -> list[tuple[str, str, Path, int]]:
    sys.path.insert(0, str(ROOT))
    from benchmarks import llama_cpp_file, shape_1b

    shape, target = shape_1b.structure(), shape_1b.TARGETS[options.target]
    contestants = []
    for name in options.quantizations:
        ours = folder / name
        if not (ours / "weights" / "tensor-cache.json").exists():
            shape_1b.write_weights(name, ours / "weights", shape)
        shape_1b.build(name, ours / "model.so", ours / "scratch", shape, target)
        index = json.loads((ours / "weights" / "tensor-cache.json").read_text())
        read = [r for s in index["records"] for r in s["records"] if "embed_tokens" not in r["name"]]
        contestants.append((name, sys.executable, ours, sum(r["nbytes"] for r in read)))
    if options.torch:
        nbytes = llama_cpp_file.bytes_of_a_token("F16", shape_1b.CONFIG)  # as many bytes as float16
        contestants.append((TORCH, sys.executable, folder, nbytes))
    python = options.llama_python
    if python is None or subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        print("llama.cpp is left out: name a Python with the package llama-cpp-python by --llama-python")
        return contestants
    for name in LLAMA:
        path = folder / f"{name}.gguf"
        if not path.exists():
            llama_cpp_file.write(path, name, shape_1b.CONFIG)
        contestants.append((name, python, path, llama_cpp_file.bytes_of_a_token(name, shape_1b.CONFIG)))
    return contestants


def _cores(count: int) -> set[int]:
    """The last ones: the first take most interrupts."""
    return set(sorted(os.sched_getaffinity(0))[-count:])


def _resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return float(line.split()[1]) * 1024
    return float("nan")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizations", type=lambda text: text.split(","), default=["q4f16_1", "q4f32_1", "q0f16"])
    parser.add_argument("--target", default="cpu", help="a stock target for this machine: cpu or cpu-exact")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--torch", action="store_true", help="transformers on torch in bfloat16, too")
    parser.add_argument("--folder", type=Path, help="where to keep weights and libraries between runs")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
