"""What a launch of a kernel takes on a device, by its machine code and the device's data sheet (gpu_model.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASSUMED = {
    "of the bandwidth that reading reaches": 0.92,
    "seconds that a load takes on a busy device": 800e-9,
    "seconds that one takes of a block that is left alone": 400e-9,
    "seconds between kernels of a graph": 1.2e-6,
    "seconds of a kernel launched alone": 2.5e-6,
    "seconds less of a kernel that begins before the one before has ended": 0.7e-6,
    "registers of a multiprocessor": 65536,
    "warps that issue at once": 4,
}
REACHED, LATENCY, LEFT, IN_GRAPH, ALONE, EARLIER, REGISTERS, ISSUING = ASSUMED.values()
PRODUCTS_OF_AN_INSTRUCTION = 16 * 8 * 16


@dataclass(frozen=True)
class Code:
    """Machine code of a kernel: what one warp executes for a row of `steps` steps, and what its block holds."""

    kernel: Any  # tests.support.sass.Kernel
    threads: int
    shared: int  # bytes
    steps: int  # rounds of the loop

    def count(self, name: str = "") -> float:
        """Instructions of a warp, or those whose names begin so."""
        begin, end = self.kernel.loop
        names = self.kernel.instructions
        once, each = (sum(n.startswith(name) for n in part) for part in (names, names[begin:end]))
        return float(once + (self.steps - 1) * each)


@dataclass(frozen=True)
class Launch:
    """A kernel, and how often it is launched in a token or a prompt. No code: its bytes are all that it costs."""

    name: str
    count: int
    bytes: float
    blocks: float = 0
    code: Code | None = None
    in_graph: bool = True
    tail: float = 0  # seconds of what a block does when all others have ended
    early: float = 0  # bytes that kernels before have asked for,
    asking: float = 1  # and how many of them, each at its end
    first: bool = False  # of a graph, or behind one: never launched early


def fit(code: Code, device: Mapping[str, Any]) -> int:
    """Blocks that a multiprocessor holds at once."""
    registers = code.threads * math.ceil(code.kernel.registers / 8) * 8
    most = [device["warps"] * 32 // code.threads, int(REGISTERS // registers)]
    most += [device["shared"] * 1024 // (code.shared + 1024)] if code.shared else []
    return max(1, int(min(most)))


def seconds(launch: Launch, device: Mapping[str, Any]) -> tuple[float, str]:
    """Of one launch, and what binds it."""
    begins_early = not launch.first and begun_early(device["arch"])
    cost = (IN_GRAPH if launch.in_graph else ALONE) - (EARLIER if begins_early else 0)
    rate = device["bandwidth"] * 1e9 * REACHED
    early = min(launch.early, launch.asking * rate * min(cost, LATENCY))  # no more are on their way when one ends
    times = {"memory": (launch.bytes - early) / rate}
    code = launch.code
    if code is not None:
        hold, units = fit(code, device), device["multiprocessors"]
        busy = min(hold, launch.blocks / units)
        waves = math.ceil(launch.blocks / units) / (launch.blocks / units) if launch.blocks < 8 * units else 1.0
        loads = sum("LDG" in n and "128" in n for n in code.kernel.instructions[: code.kernel.loop[1]])
        asynchronous = any(n.startswith("LDGSTS") for n in code.kernel.instructions)
        if loads and not asynchronous:
            on_their_way = max(busy, 1 / units) * code.threads * 16 * loads / 2
            times["in flight"] = launch.bytes / units / max(on_their_way / LATENCY, 1.0)
        warps = launch.blocks * code.threads / 32 / units * waves
        cycle = 1e-9 / device["clock"]
        times["issue"] = warps * code.count() / ISSUING * cycle
        products = code.count("HMMA") * PRODUCTS_OF_AN_INSTRUCTION
        if any(n.startswith("HMMA.1688") for n in code.kernel.instructions):
            products /= 2
        times["tensor"] = warps * products / (device["products"] * device["reach"]) * cycle
    bound = max(times, key=lambda name: times[name])
    if times[bound] < cost:
        bound = "launch"
    return cost + max(times.values()) + launch.tail, bound


def begun_early(architecture: str) -> bool:
    """Whether kernels are launched before the ones before them have ended: in a library of the target cuda-sm_90."""
    from mlcbuild.compiler.gpu.device import device_of

    return device_of({"kind": "cuda", "arch": architecture}).early
