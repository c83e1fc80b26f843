"""How a GPU library decodes and prefills, and whether its logits are the CPU's: on a machine with an NVIDIA GPU.

    python benchmarks/cuda.py bundle FOLDER                     # here, no GPU: libraries, weights, runtime, this script
    python3 FOLDER/cuda.py run FOLDER                           # there: Python and the driver, nothing else
    python benchmarks/cuda.py bundle FOLDER --target cpu        # the same on the CPU, to see that the script works
    python benchmarks/cuda.py run FOLDER --device cpu

The bundle holds `stories` in q4f16_1 with the logits that our CPU library gives for its weights, libraries of a 1B and
an 8B shape (TinyLlama's and Llama 3.1's), whose weights are made up there, and wheels of NumPy and tvm_ffi with TVM's
runtime (`--python`: of the machine with the GPU). `run` prints how far the logits are off, decode and prefill in tokens
a second, and the bytes of weights that decoding reads a second beside the device's own rate of copying; under the 8B
shape, what gpu_model.py has modelled for the devices of the bundle's architecture.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's numbers
QUANTIZATION = "q4f16_1"
TEXT = "Once upon a time there was a little boat that wanted to see the whole wide sea. "
PAGE, STEPS, PROMPT, ROUNDS = 16, 64, 512, 5
RUNTIME = ("libtvm_runtime.so", "libtvm_runtime_cuda.so")
CONFIG_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}


def bundle(folder: Path, target_name: str, architectures: Sequence[str], python: str) -> None:
    """Everything that `run` needs, in `folder`."""
    sys.path.insert(0, str(ROOT))
    for name in ("runtime", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if _target(target_name).device["kind"] == "cuda":
        from mlcbuild.compiler.gpu import cuda

        cuda.load_runtime(cuda.toolkit(), folder / "scratch")  # before TVM is imported, which looks for it then
    from benchmarks import shape_1b

    shutil.copy(__file__, folder / "cuda.py")
    _stories(folder, target_name)
    for name, changes in (("1b", {}), ("8b", CONFIG_8B)):
        shape = shape_1b.structure({**shape_1b.CONFIG, **changes})
        _library(shape, target_name, architectures, folder / f"{name}.so", folder / "scratch" / name)
    if _target(target_name).device["kind"] == "cuda":
        (folder / "modelled.json").write_text(json.dumps(_modelled(architectures[0])))
    shutil.rmtree(folder / "scratch")
    _runtime(folder, python)
    print(f"{folder}: take it to the machine with the GPU and run `python3 cuda.py run .` in it")


def _stories(folder: Path, target_name: str) -> None:
    """The package of the shipped model for the target, and what the CPU library makes of the same weights."""
    import numpy as np

    from mlcbuild.runtime import load

    names = f"stories-{QUANTIZATION}-{target_name}", f"stories-{QUANTIZATION}-cpu-exact"
    subprocess.run([sys.executable, "-m", "doit", "build", f"recipe={','.join(names)}"], cwd=ROOT, check=True)
    package, ours = (ROOT / "dist" / name for name in names)
    (weights,) = package.glob("*-MLC")
    (library,) = package.glob("*.so")
    (reference,) = ours.glob("*.so")
    shutil.copytree(weights, folder / "stories", dirs_exist_ok=True)
    shutil.copy(library, folder / "stories.so")
    model = load(weights, library=reference)
    ids = model.tokenizer.encode(TEXT * 4)
    np.savez(folder / "stories.npz", ids=np.asarray(ids, np.int32), logits=model.logits(ids))


def _library(shape: Any, target_name: str, architectures: Sequence[str], output: Path, scratch: Path) -> None:
    from dataclasses import replace

    from benchmarks import shape_1b

    scratch.mkdir(parents=True, exist_ok=True)
    target = _target(target_name)
    if target.device["kind"] == "llvm":
        return shape_1b.build(QUANTIZATION, output, scratch, shape, target)
    from mlcbuild.compiler import assemble
    from mlcbuild.compiler.gpu.build import build
    from mlcbuild.compiler.gpu.lower import lower

    quantization = shape_1b.quantization(QUANTIZATION)
    module = lower(replace(shape, vocab_size=1), quantization, QUANTIZATION, target.device)
    assemble.save(module, scratch / "module.json")
    given = (scratch / "module.json", target.device, target.host, target.linker)
    build(*given, output, scratch, architectures=architectures)


def _modelled(architecture: str) -> dict[str, dict[str, float]]:
    """By device of the architecture, what gpu_model.py expects of the 8B shape; it needs nvdisasm."""
    import yaml

    devices = yaml.safe_load((ROOT / "benchmarks" / "gpu_devices.yaml").read_text())
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_model.py"), "--shape", "llama-3.1-8b"]
    command += ["--json", str(PAGE + STEPS // 2), str(PROMPT), "--device"]
    return {
        name: json.loads(subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True).stdout)
        for name, device in devices.items()
        if device["arch"] == architecture
    }


def _target(name: str) -> Any:
    import yaml

    from mlcbuild.recipes import convert

    return convert.target(name, yaml.safe_load((ROOT / "recipes" / "targets" / f"{name}.yaml").read_text()))


def _runtime(folder: Path, python: str) -> None:
    """TVM's runtime, CUDA's, and the wheels of what `run` imports."""
    from importlib import metadata

    site = Path(importlib.import_module("tvm_ffi").__file__ or "").parents[1]
    for name in RUNTIME:
        shutil.copy(site / "tvm" / "lib" / name, folder / "runtime" / name)
    for found in site.glob("nvidia/**/libcudart.so.*"):
        shutil.copy(found, folder / "runtime" / found.name)
    wanted = [f"{name}=={metadata.version(name)}" for name in ("numpy", "apache-tvm-ffi")]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "--python-version", python]
    subprocess.run([*pip, "--platform", "manylinux_2_28_x86_64", "-d", str(folder / "wheels"), *wanted], check=True)


def run(folder: Path, device: str) -> None:
    """Print every figure. Raises SystemExit where the device is not there."""
    if device == "cuda" and not _there():
        raise SystemExit("no CUDA device here: take the bundle to a machine that has one, or say --device cpu")
    sys.path[:0] = _installed(folder)
    import numpy as np

    for name in RUNTIME[: 1 + (device == "cuda")]:
        for dependency in sorted((folder / "runtime").glob("libcudart.so.*")) if "cuda" in name else ():
            ctypes.CDLL(str(dependency), ctypes.RTLD_GLOBAL)
        if name == RUNTIME[0]:
            importlib.import_module("tvm_ffi")  # libtvm_ffi, which it needs
        ctypes.CDLL(str(folder / "runtime" / name), ctypes.RTLD_GLOBAL)
    expected = np.load(folder / "stories.npz")
    model = Model(folder / "stories.so", device, folder / "stories")
    difference = np.abs(model.logits(expected["ids"]) - expected["logits"]) / expected["logits"].std()
    print(f"stories, logits against the CPU library's, over their deviation: largest {difference.max():.1e}, "
          f"mean {difference.mean():.1e}")  # fmt: skip
    rate = copying_rate(device)
    print(
        f"{device} copies {rate:.0f} GB/s (read and written)\n"
        f"{'':5} {'decode':>9} {'read':>10} {'of it':>6} {'prefill':>9}"
    )
    for name in ("1b", "8b"):
        model = Model(folder / f"{name}.so", device)
        decode, prefill = (
            statistics.median(measure() for _ in range(ROUNDS)) for measure in (model.decode, model.prefill)
        )
        read = decode * model.bytes_of_a_token / 1e9
        print(f"{name:5} {decode:5.0f} t/s {read:5.0f} GB/s {read / rate:6.0%} {prefill:5.0f} t/s")
        del model
    modelled = folder / "modelled.json"
    for sheet, figures in json.loads(modelled.read_text()).items() if device == "cuda" and modelled.exists() else ():
        print(f"8b modelled for {sheet}: {figures['decode']:.0f} t/s, prefill {figures['prefill']:.0f} t/s")


def _there() -> bool:
    """Whether the driver has a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _installed(folder: Path) -> list[str]:
    """The folder of what the wheels hold, put there the first time; nothing where the bundle is run in place."""
    site = folder / "site"
    if not site.exists() and importlib.util.find_spec("tvm_ffi") is None:
        import zipfile

        for wheel in (folder / "wheels").glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(site)
    return [str(site)] if site.exists() else []


class Model:
    """A library on a device, with the weights of a folder or made up, and a KV cache for one sequence."""

    def __init__(self, library: Path, device: str, weights: Path | None = None) -> None:
        import numpy as np
        import tvm_ffi

        self._ffi, self._np = tvm_ffi, np
        self._device = tvm_ffi.device(device, 0)
        self._module = tvm_ffi.load_module(str(library.absolute()))["vm_load_executable"]()
        devices = [DEVICES[device], 0, 2] + ([DEVICES["cpu"], 0, 2] if device != "cpu" else [])  # 2: pooled memory
        self._module["vm_initialization"](*devices)
        self._metadata = json.loads(str(self._function("_metadata")()))
        vocab_size = 128256
        made = _read(weights) if weights else None
        params: list[Any] = []
        self.bytes_of_a_token = 0
        for p in self._metadata["params"]:
            shape = [size if isinstance(size, int) else vocab_size for size in p["shape"]]
            values = made[p["name"]] if made else _random(shape, p["dtype"])
            params.append(self.tensor(values))
            self.bytes_of_a_token += 0 if "embed_tokens" in p["name"] else values.nbytes
        self._params = tvm_ffi.Array(params)  # made once: every call takes it
        sizes = (1, 2 * PROMPT, min(PROMPT, self._metadata["prefill_chunk_size"]), PAGE, 0)
        shapes = [tvm_ffi.Shape([size]) for size in sizes]
        self._cache = self._function("create_tir_paged_kv_cache")(*shapes)

    def tensor(self, values: Any) -> Any:
        """A copy on the device."""
        allocate = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        out = allocate(self._ffi.Shape(values.shape), self._ffi.dtype(str(values.dtype)), self._device, None)
        self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")(
            out, values.ctypes.data_as(ctypes.c_void_p), values.nbytes
        )
        return out

    def host(self, tensor: Any) -> Any:
        out = self._np.empty(tuple(tensor.shape), str(tensor.dtype))
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        copy(tensor, out.ctypes.data_as(ctypes.c_void_p), out.nbytes)
        return out

    def logits(self, ids: Any) -> Any:
        """float32 [n, V]: every position, one token after the other."""
        with self._sequence():
            return self._np.concatenate(
                [self.host(self._forward("decode", ids[i : i + 1]))[0] for i in range(len(ids))]
            )

    def decode(self) -> float:
        """Tokens a second, after 16."""
        ids = self._np.arange(PAGE, dtype=self._np.int32)
        with self._sequence():
            self.host(self._forward("prefill", ids))
            self.host(self._forward("decode", ids[:1]))
            begin = time.perf_counter()
            for _ in range(STEPS):
                self.host(self._forward("decode", ids[:1]))
            return STEPS / (time.perf_counter() - begin)

    def prefill(self) -> float:
        """Tokens a second, of a prompt in one call."""
        ids = self._np.arange(PROMPT, dtype=self._np.int32)
        with self._sequence():
            begin = time.perf_counter()
            self.host(self._forward("prefill", ids))
            return PROMPT / (time.perf_counter() - begin)

    def _forward(self, name: str, ids: Any) -> Any:
        hidden = self._function("embed")(self.tensor(ids), self._params)
        shape = self._ffi.Shape([1, *hidden.shape])
        view = self._ffi.get_global_func("runtime.TVMTensorCreateView")(hidden, shape, str(hidden.dtype), 0)
        self._state("begin_forward", self._ffi.Shape([0]), self._ffi.Shape([len(ids)]))
        logits = self._function(name)(view, self._cache, self._params)[0]
        self._state("end_forward")
        return logits

    def _sequence(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def one() -> Any:
            self._state("add_sequence", 0)
            try:
                yield
            finally:
                self._state("remove_sequence", 0)

        return one()

    def _state(self, method: str, *arguments: Any) -> None:
        self._ffi.get_global_func(f"vm.builtin.kv_state_{method}")(self._cache, *arguments)

    def _function(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = self._module.get_function(name, query_imports=True)
        return found


def copying_rate(device: str) -> float:
    """GB/s read and written by copies within the device's memory, the best of several."""
    import numpy as np
    import tvm_ffi

    nbytes = 1 << (30 if device == "cuda" else 28)
    where = tvm_ffi.device(device, 0)
    allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    a, b = (allocate(tvm_ffi.Shape([nbytes]), tvm_ffi.dtype("uint8"), where, None) for _ in range(2))
    copy, wait = (tvm_ffi.get_global_func(f"runtime.{name}") for name in ("TVMTensorCopyFromTo", "Device_StreamSync"))
    rates = []
    for _ in range(9):
        begin = time.perf_counter()
        copy(a, b)
        wait(where, 0)
        rates.append(2 * nbytes / (time.perf_counter() - begin) / 1e9)
    return float(np.max(rates))


def _read(folder: Path) -> dict[str, Any]:
    """The weights of a folder by name."""
    import numpy as np

    found = {}
    for shard in json.loads((folder / "tensor-cache.json").read_text())["records"]:
        data = (folder / shard["dataPath"]).read_bytes()
        for record in shard["records"]:
            piece = np.frombuffer(data, record["dtype"], int(np.prod(record["shape"])), record["byteOffset"])
            found[record["name"]] = piece.reshape(record["shape"])
    return found


def _random(shape: Sequence[int], dtype: str) -> Any:
    import numpy as np

    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "u":
        return np.resize(random.integers(0, 1 << 32, 1 << 20, np.uint32).view(dtype), shape)
    return np.resize(
        (random.standard_normal(1 << 16, np.float32) * (1.0 if len(shape) == 1 else 0.003)).astype(dtype), shape
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("bundle", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cuda", help="the stock target that libraries are built for")
    parser.add_argument("--architectures", default="sm_90", help="of the CUDA libraries of the two shapes")
    parser.add_argument("--python", default="3.11", help="of the machine with the GPU")
    parser.add_argument("--device", choices=tuple(DEVICES), default="cuda")
    options = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count()))
    if options.command == "bundle":
        bundle(options.folder, options.target, options.architectures.split(","), options.python)
    else:
        run(options.folder, options.device)


if __name__ == "__main__":
    main()
