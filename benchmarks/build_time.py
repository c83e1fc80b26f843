"""How long a library takes to build for this CPU: lower, code generation and link, each shape in a process of its own.

    python benchmarks/build_time.py
    python benchmarks/build_time.py --quantizations q4f16_1,q0f16 --rounds 3

The 1.1B and the 7B shape, and the 7B shape with 2 layers instead of 32: passes must not cost more with more layers that
are alike. `start` is what importing TVM takes before that, once in a process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, tuple[str, int]] = {"1.1B": ("CONFIG", 22), "7B": ("CONFIG_7B", 32), "7B, 2 layers": ("CONFIG_7B", 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizations", type=lambda text: text.split(","), default=["q4f16_1"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    print(f"{'':24} {'lower':>7} {'build':>7} {'both':>7} {'start':>7} {'library':>9} {'memory':>8}")
    for quantization in options.quantizations:
        for shape in SHAPES:
            command = [sys.executable, str(Path(__file__)), "--child", quantization, shape]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(options.rounds)
            ]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            both = statistics.median(run["lower"] + run["build"] for run in runs)
            times = "".join(f" {value:6.1f}s" for value in (middle["lower"], middle["build"], both, middle["start"]))
            sizes = f" {middle['library'] / 1e3:6.0f} kB {middle['memory'] / 1e6:5.0f} MB"
            print(f"{quantization + ' ' + shape:24}{times}{sizes}", flush=True)


def measure(quantization: str, shape: str) -> dict[str, Any]:
    begin = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    from benchmarks import shape_1b
    from mlcbuild.compiler import assemble, targets
    from mlcbuild.compiler.cpu.build import build
    from mlcbuild.compiler.cpu.lower import lower

    config, layers = SHAPES[shape]
    structure = shape_1b.structure(getattr(shape_1b, config), num_hidden_layers=layers)
    device = targets.resolve(shape_1b.CPU)
    started = time.perf_counter()
    bits = shape_1b.CPU.activation_bits
    module = lower(structure, shape_1b.quantization(quantization), quantization, device, activation_bits=bits)
    lowered = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output, file = Path(folder) / "model.so", Path(folder) / "module.json"
        assemble.save(module, file)
        build(file, device, {}, shape_1b.CPU.linker, output, Path(folder))
        built = time.perf_counter()
        size = output.stat().st_size
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = {"start": started - begin, "lower": lowered - started, "build": built - lowered}
    return {**times, "library": size, "memory": usage}


if __name__ == "__main__":
    main()
