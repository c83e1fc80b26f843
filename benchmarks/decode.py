"""How fast libraries decode and prefill on this CPU, next to llama.cpp and to the rate at which memory can be read.

    python benchmarks/decode.py                                        # q4f16_1, q4f32_1, q0f16 at one and two threads
    python benchmarks/decode.py --llama-python /path/to/python         # llama.cpp beside them (PyPI llama-cpp-python)
    python benchmarks/decode.py --torch                                # transformers on torch in bfloat16 beside them
    python benchmarks/decode.py --quantizations q3f16_1,q8f16_1 --threads 1
    python benchmarks/decode.py --target cpu-exact                     # activations not rounded to 8 bits
    python benchmarks/decode.py --model dist/gemma --gguf gemma.gguf --llama-python /path/to/python

Without `--model`, a 1.1B shape with random weights. With it, packages that were built, beside `--gguf`: a GGUF file of
the same model, which llama.cpp itself makes Q4_0 of; `pure`: its embedding too, which else has 6 or 8 bits. A fork's
`llama-bench` runs the same files (`--llama-bench`, so ik_llama.cpp), and OpenVINO GenAI what `optimum-cli export
openvino` wrote (`--openvino`, `--openvino-python`).

Every contestant is a process that stays, its threads on as many cores; rounds are interleaved, each with a measurement
of the read bandwidth on the same cores, and medians are printed: absolute figures of a shared machine wander, ratios
less. Decoding starts after 16 tokens, prefill is 512 tokens at once. Bytes of a token are all weights but an embedding
that is no head, of which one row is read.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contestants import Contestant, Worker, cores  # noqa: E402

LLAMA = ("Q4_0", "Q8_0", "F16")
_LIKE = {"q0": "F16", "q8": "Q8_0"}  # which of them has as many bits; Q4_0 is what the others are held against
TORCH = "torch bf16"
# Q4_0 is ggml's type 2, and the file type of that number; a tied embedding is left in more bits unless all is `pure`.
_REQUANTIZE = """
import ctypes, sys
from llama_cpp import llama_cpp as api
silent = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(silent, ctypes.c_void_p())
options = api.llama_model_quantize_default_params()
options.ftype, options.allow_requantize, options.pure = 2, True, sys.argv[3] == "pure"
sys.exit(api.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""

READ = """
typedef long long i64; typedef float v __attribute__((vector_size(64)));
float read_all(const char *p, i64 n) {
    v a = {}, b = {}, c = {}, d = {};
    for (i64 i = 0; i + 256 <= n; i += 256) {
        a += *(v *)(p + i); b += *(v *)(p + i + 64); c += *(v *)(p + i + 128); d += *(v *)(p + i + 192);
        for (int l = 0; l < 256; l += 64) __builtin_prefetch(p + i + 4096 + l);
    }
    a += b + c + d;
    return a[0];
}
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        contestants = _packages(options, folder) if options.model else _shapes(options, folder)
        for threads in options.threads:
            compare(contestants, threads, options.rounds, folder)


def compare(contestants: list[Contestant], threads: int, rounds: int, folder: Path) -> None:
    workers, loads = {}, {}
    for each in contestants:
        workers[each.name] = Worker(each, threads)
        loads[each.name] = workers[each.name].ask("load")  # one after the other
    bandwidth = Bandwidth(folder, threads)
    figures: dict[tuple[str, str], list[float]] = {}
    for what in ("decode", "prefill"):
        for _ in range(rounds):
            for name, worker in workers.items():
                figures.setdefault((name, "bandwidth"), []).append(bandwidth.measure())
                figures.setdefault((name, what), []).append(worker.ask(what))
    width = max(11, *(len(name) for name in workers))
    print(f"\n{threads} thread{'s' * (threads > 1)}, medians of {rounds} rounds")
    print(f"{'':{width}} {'decode':>8} {'GB/s':>6} {'of read':>8} {'prefill':>8} {'load':>6} {'resident':>9}")
    for each in contestants:
        name = each.name
        decode, prefill = (statistics.median(figures[name, what]) for what in ("decode", "prefill"))
        rate = decode * each.nbytes / 1e9
        load, resident = f"{loads[name]:5.1f}s", f"{workers[name].ask('resident') / 1e9:7.2f}GB"
        share = statistics.median(d * each.nbytes / 1e9 / b for d, b in zip(
            figures[name, "decode"], figures[name, "bandwidth"], strict=False))  # fmt: skip
        print(f"{name:{width}} {decode:8.1f} {rate:6.1f} {share:8.0%} {prefill:8.1f} {load} {resident}")
    reads = [value for (_, what), values in figures.items() if what == "bandwidth" for value in values]
    print(f"read bandwidth {statistics.median(reads):.1f} GB/s ({min(reads):.1f} to {max(reads):.1f})")
    for each in contestants:
        for rival in each.rivals:
            if rival in workers:
                ratios = [_median_ratio(figures, each.name, rival, what) for what in ("decode", "prefill")]
                print(f"{each.name} / {rival}: decode {ratios[0]:.2f}, prefill {ratios[1]:.2f}")
    for worker in workers.values():
        worker.close()


def _median_ratio(figures: dict[tuple[str, str], list[float]], a: str, b: str, what: str) -> float:
    return statistics.median(x / y for x, y in zip(figures[a, what], figures[b, what], strict=True))


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
        os.sched_setaffinity(0, cores(self._threads))
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


def _shapes(options: argparse.Namespace, folder: Path) -> list[Contestant]:
    """The 1.1B shape in each quantization, and what runs beside it."""
    from benchmarks import llama_cpp_file, shape_1b

    shape, target = shape_1b.structure(), shape_1b.TARGETS[options.target]
    contestants = []
    for name in options.quantizations:
        ours = folder / name
        if not (ours / "weights" / "tensor-cache.json").exists():
            shape_1b.write_weights(name, ours / "weights", shape)
        shape_1b.build(name, ours / "model.so", ours / "scratch", shape, target)
        rivals = (f"llama.cpp {_LIKE.get(name[:2], 'Q4_0')}", TORCH)
        contestants.append(
            Contestant(name, "mlcbuild", sys.executable, ours, _bytes_of_a_token(ours / "weights"), rivals)
        )
    if options.torch:
        nbytes = llama_cpp_file.bytes_of_a_token("F16", shape_1b.CONFIG)  # as many bytes as float16
        contestants.append(Contestant(TORCH, "torch", sys.executable, folder, nbytes))
    if not _has_llama(options.llama_python):
        return contestants
    for name in LLAMA:
        path = folder / f"{name}.gguf"
        if not path.exists():
            llama_cpp_file.write(path, name, shape_1b.CONFIG)
        nbytes = llama_cpp_file.bytes_of_a_token(name, shape_1b.CONFIG)
        contestants.append(Contestant(f"llama.cpp {name}", "llama.cpp", options.llama_python, path, nbytes))
    return contestants


def _packages(options: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Packages of one model, and the same model in other programs."""
    from mlcbuild.runtime import package

    theirs = []
    if options.gguf and _has_llama(options.llama_python):
        for kind in ("Q4_0", "Q4_0 pure"):
            path = folder / f"{options.gguf.stem}-{kind.replace(' ', '-')}.gguf"
            if not path.exists():
                command = [options.llama_python, "-c", _REQUANTIZE, str(options.gguf), str(path), kind[5:]]
                subprocess.run(command, check=True)
            size = path.stat().st_size  # and some megabytes of vocabulary
            theirs.append(Contestant(f"llama.cpp {kind}", "llama.cpp", options.llama_python, path, size))
            if options.llama_bench:
                link = folder / f"{path.stem}.json"
                link.write_text(json.dumps([str(options.llama_bench), str(path)]))
                theirs.append(Contestant(f"llama-bench {kind}", "llama-bench", sys.executable, link, size))
    if options.openvino:
        size = sum(path.stat().st_size for path in options.openvino.glob("openvino_model.bin"))
        theirs.append(Contestant("OpenVINO", "openvino", options.openvino_python, options.openvino, size))
    rivals = tuple(each.name for each in theirs)
    found = {path.name: path.absolute() for path in options.model}
    ours = [
        Contestant(n, "mlcbuild", sys.executable, p, _bytes_of_a_token(package.find(p).weights), rivals)
        for n, p in found.items()
    ]
    return [*ours, *theirs]


def _bytes_of_a_token(weights: Path) -> int:
    index = json.loads((weights / "tensor-cache.json").read_text())
    records = [record for shard in index["records"] for record in shard["records"]]
    tied = not any("lm_head" in record["name"] for record in records)
    return sum(record["nbytes"] for record in records if tied or "embed_tokens" not in record["name"])


def _has_llama(python: str | None) -> bool:
    found = python and not subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode
    if not found:
        print("llama.cpp is left out: name a Python with the package llama-cpp-python by --llama-python")
    return bool(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizations", type=lambda text: text.split(","), default=["q4f16_1", "q4f32_1", "q0f16"])
    parser.add_argument("--target", default="cpu", help="a stock target for this machine: cpu or cpu-exact")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--torch", action="store_true", help="transformers on torch in bfloat16, too")
    parser.add_argument("--model", type=Path, nargs="+", help="packages of one model, in place of the 1.1B shape")
    parser.add_argument("--gguf", type=Path, help="the same model, for llama.cpp")
    parser.add_argument("--llama-bench", type=Path, help="a llama-bench that runs the GGUF files, too")
    parser.add_argument("--openvino", type=Path, help="the same model as OpenVINO's folder")
    parser.add_argument("--openvino-python", default=sys.executable, help="an interpreter that has openvino-genai")
    parser.add_argument("--folder", type=Path, help="where to keep weights and libraries between runs")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
