"""Who runs in decode.py: a process each, which loads its model, and is asked one measurement at a time.

A kind of contestant is a function that loads a model and returns what can be measured of it: `decode` and `prefill`, in
tokens a second. llama.cpp and torch may live in another Python than mlcbuild.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMPT, STEPS, LONG = 16, 16, 512
Measure = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class Contestant:
    """`kind` is one of `KINDS`; `python` its interpreter; `path` what it loads; `nbytes` are read for each token."""

    name: str
    kind: str
    python: str
    path: Path
    nbytes: int
    rivals: tuple[str, ...] = ()  # contestants that it is held against


class Worker:
    """A contestant in its own process, on the last `threads` cores."""

    def __init__(self, contestant: Contestant, threads: int) -> None:
        command = [contestant.python, __file__, contestant.kind, str(contestant.path), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def ask(self, what: str) -> float:
        """`decode` or `prefill` in tokens a second, `load` in seconds, `resident` in bytes."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a contestant ended; its message is above")
        return float(line)

    def close(self) -> None:
        self._process.communicate()


def cores(count: int) -> set[int]:
    """The last ones: the first take most interrupts."""
    return set(sorted(os.sched_getaffinity(0))[-count:])


def _serve(kind: str, path: str, threads: str) -> None:
    os.sched_setaffinity(0, cores(int(threads)))
    begin = time.perf_counter()
    measures = KINDS[kind](Path(path), int(threads))
    loaded = time.perf_counter() - begin
    measures |= {"load": lambda: loaded, "resident": _resident}
    for line in sys.stdin:
        print(measures[line.strip()](), flush=True)


def _ours(folder: Path, threads: int) -> Measure:
    """A package of `doit build`, or a folder of shape_1b's with `model.so` and `weights`."""
    sys.path.insert(0, str(ROOT))
    from mlcbuild.runtime.library import Library, Network
    from mlcbuild.runtime.session import Session
    from mlcbuild.runtime.weights import load, read_index

    library, weights, vocabulary = _files(folder)
    loaded = Library(library)
    records = {record.name: record for record in read_index(weights)}
    tensors = list(load([records[p.name] for p in loaded.metadata.parameters]))
    session = Session(Network(loaded, tensors, vocabulary, threads), 1, 1024)

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


def _files(folder: Path) -> tuple[Path, Path, int]:
    """Library, weights, size of the vocabulary."""
    if (folder / "model.so").exists():
        from benchmarks import shape_1b

        return folder / "model.so", folder / "weights", int(shape_1b.CONFIG["vocab_size"])
    from mlcbuild.runtime import package

    found = package.find(folder)
    return found.library, found.weights, int(found.config["vocab_size"])


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


def _llama_bench(link: Path, threads: int) -> Measure:
    """`link`: a JSON list of a `llama-bench` (llama.cpp's, or that of a fork) and a GGUF file."""
    program, model = json.loads(link.read_text())

    def run(*options: str) -> float:
        command = [program, "-m", model, "-t", str(threads), "-r", "1", "-o", "json", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{program} failed: {done.stderr[-500:]}")
        return float(json.loads(done.stdout)[0]["avg_ts"])

    return {"decode": lambda: run("-p", "0", "-n", str(STEPS)), "prefill": lambda: run("-p", str(LONG), "-n", "0")}


def _openvino(folder: Path, threads: int) -> Measure:
    """A folder that `optimum-cli export openvino` wrote, run by OpenVINO GenAI."""
    import openvino
    import openvino_genai

    first = itertools.count(1000)
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(length: int, new: int) -> Any:
        # Another text each time: it keeps the keys of prompts that it has seen.
        ids = openvino.Tensor([[next(first), *range(10, length + 9)]])
        config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        return pipeline.generate(ids, config).perf_metrics

    return {
        "decode": lambda: 1000 / run(PROMPT, STEPS + 1).get_tpot().mean,
        "prefill": lambda: 1000 * LONG / run(LONG, 1).get_ttft().mean,
    }


def _torch(_: Path, threads: int) -> Measure:
    """transformers in bfloat16, at the shape of shape_1b.py."""
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

    def feed(tokens: Sequence[int], past: Any = None) -> Any:
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


def _resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return float(line.split()[1]) * 1024
    return float("nan")


KINDS: dict[str, Callable[[Path, int], Measure]] = {
    "mlcbuild": _ours,
    "llama.cpp": _llama,
    "llama-bench": _llama_bench,
    "openvino": _openvino,
    "torch": _torch,
}

if __name__ == "__main__":
    _serve(*sys.argv[1:])
