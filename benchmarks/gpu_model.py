"""How fast a CUDA library should decode and prefill on a device, from its machine code and the device's data sheet.

    python benchmarks/gpu_model.py --device a100-80gb --shape llama-3.1-8b               # every kernel of a token
    python benchmarks/gpu_model.py --device h100-sxm --shape vicuna-7b --summary         # tokens a second only

No GPU is needed: nvcc and nvdisasm are (`pip install -e '.[test,cuda]' nvidia-cuda-nvdisasm`). Kernels of products and
of attention are compiled for the device one by one, as the library has them, and their instructions are counted. A
kernel takes as long as the slowest of these, after a launch:

    memory   its bytes, at REACHED of the data sheet's rate, or as many as are on their way at once in LATENCY; less
             what the kernel before has asked for, which comes during the launch
    issue    its instructions, four a cycle and multiprocessor, by waves of blocks
    tensor   its matrix instructions, at the tensor cores' rate with float32 sums

What it assumes beyond gpu_devices.yaml is ASSUMED (gpu_launches.py). Figures are modelled: benchmarks/cuda.py measures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_launches import LEFT, Code, Launch, begun_early, seconds  # noqa: E402
from benchmarks.gpu_shapes import OF_EXPERTS, SHAPES, Shape  # noqa: E402

FORM, BITS, GROUP = "4, 32, false of float16", 4, 32  # q4f16_1
ROWS, CONTEXTS, PROMPTS = (1, 8, 64), (512, 4096, 32768), (512, 4096, 32768)
CHUNK = 2048  # tokens of a prompt that are prefilled in one call


class Machine:
    """Machine code for one architecture, each kernel compiled once."""

    def __init__(self, shape: Shape, architecture: str, folder: Path) -> None:
        from mlcbuild.compiler.gpu import cuda_many, cuda_rows
        from tests.support import cuda_products, sass

        self.few: dict[tuple[int, int, int, bool, bool], tuple[Any, Code]] = {}
        self.many: dict[tuple[int, int, bool], tuple[Any, Code]] = {}
        tiled = {name: at for name, at in shape.products.items() if shape.experts and name in OF_EXPERTS}
        matrices = {*shape.products.values(), (shape.vocabulary, shape.hidden)} - {*tiled.values()}
        few: dict[Any, Any] = {}
        for most in cuda_rows.COUNTS:
            few |= {(*at, most, False, False): cuda_rows.instance(FORM, *at, most) for at in matrices}
            keys = [] if tiled else [(*shape.products["gate_up"], most, most == 1, True)]
            keys += [(*shape.products["qkv"], 1, True, False)] if most == 1 else []
            few |= {key: cuda_rows.fused(FORM, *key) for key in keys}
        many = {(*at, narrow): cuda_many.instance(FORM, *at, narrow) for at in matrices for narrow in (True, False)}
        pairs: tuple[tuple[Any, Any, Any], ...] = (
            (few, cuda_products.source, self.few),
            (many, cuda_products.source_of_many, self.many),
        )
        for instances, text, kept in pairs:
            names: dict[Any, str] = {}
            for one in instances.values():
                names.setdefault(one, f"k{len(names)}")
            text_of = text({name: one for one, name in names.items()}, begun_early(architecture))
            found = sass.kernels(text_of, architecture, folder)
            for key, one in instances.items():
                kept[key] = one, _code(found[names[one]], one, key[1])
        if tiled:
            named = {name: ("q4f16_1", *at, name == "down") for name, at in tiled.items()}
            found = sass.kernels(cuda_products.source_of_experts(named), architecture, folder)
        for name, (rows, columns) in tiled.items():
            for narrow in (True, False):
                one = cuda_many.instance(FORM, None, columns, narrow)
                self.many[rows, columns, narrow] = one, _code(found[f"{name}_{2 - narrow}"], one, columns)
        self.attend, self.prompt = _attention(shape, architecture, folder)

    def product(
        self,
        name: str,
        at: tuple[int, int],
        n: int,
        count: int,
        extra: float,
        normed: bool = False,
        gated: bool = False,
    ) -> Launch:
        """`extra` bytes beside the matrix and x; with a norm before or a gate behind it."""
        from mlcbuild.compiler.gpu import cuda_many, cuda_prefetch, cuda_rows

        rows, columns = at
        matrix = rows * columns * BITS / 8 + rows * columns / GROUP * 2
        most = next((most for most in cuda_rows.COUNTS if n <= most), None)
        if most is not None:
            small, code = self.few[(*at, most, normed, gated)]
            blocks, early = math.ceil(rows / small.rows), cuda_prefetch.KILOBYTES * 1024.0
            return Launch(name, count, matrix + extra + n * columns * 2, blocks, code, early=early)
        one, code = self.many[(*at, n <= cuda_many.limit(rows))]
        blocks = math.ceil(rows / one.height) * math.ceil(n / one.width)
        return Launch(name, count, matrix + extra + n * columns * 2, blocks, code)

    def chosen(self, name: str, shape: Shape, n: int, count: int) -> Launch:
        """With experts: a few choices read a matrix each; of more, half a tile of each expert is not there."""
        from mlcbuild.compiler.gpu import expert_plan

        (rows, columns), choices = shape.products[name], n * shape.choices
        matrix, moved = rows * columns * (BITS / 8 + 2 / GROUP), choices * (rows + columns) * 2
        if choices <= expert_plan.few(shape.experts):
            return Launch(name, count, choices * matrix + moved)
        one, code = self.many[rows, columns, choices <= expert_plan.TILE * shape.experts]
        tiles = max(shape.chosen(n), choices / one.width + shape.experts / 2)
        return Launch(name, count, shape.chosen(n) * matrix + moved, tiles * math.ceil(rows / one.height), code)

    def mlp(self, shape: Shape, n: int, count: int, decoding: bool) -> Iterator[Launch]:
        """Gate and up, what is made of both, down. Experts are chosen, ordered, and their results added.

        `decoding`: a gate ends a product of few rows, which one row's norm is part of, too.
        """
        from mlcbuild.compiler.gpu import cuda_rows

        gated = decoding and not shape.experts and n <= cuda_rows.COUNTS[-1]
        normed = gated and n == 1
        width, (wide, _) = 2 * n * shape.hidden, shape.products["gate_up"]
        if shape.experts:
            yield Launch("choice of experts", 4 * count, n * (shape.experts + shape.choices) * 4)
            yield self.chosen("gate_up", shape, n, count)
        else:
            written = n * shape.intermediate * 2 if gated else n * wide * 2
            yield self.product("gate_up", shape.products["gate_up"], n, count, written, normed, gated)
        if not gated:
            yield Launch("gate", count, n * shape.choices * 3 * shape.intermediate * 2)
        if shape.experts:
            yield self.chosen("down", shape, n, count)
            yield Launch("sum of experts", count, (shape.choices + 1) * width)
        else:
            yield self.product("down", shape.products["down"], n, count, 2 * width)


def _code(kernel: Any, one: Any, columns: int) -> Code:
    from mlcbuild.compiler.gpu import cuda_many

    if isinstance(one, cuda_many.Instance):
        return Code(kernel, 128, one.shared * 4, math.ceil(columns / 32 / one.along))
    return Code(kernel, one.threads, one.shared * 4, max(1, math.ceil(columns / 4 / one.threads / one.ahead)))


def _attention(shape: Shape, architecture: str, folder: Path) -> tuple[Code, Code]:
    """Of one step of 16 keys: of decoding, and of new tokens over each other."""
    import dataclasses

    from benchmarks import shape_1b
    from mlcbuild.compiler.gpu import cuda_attention, sources
    from tests.support import device_code, sass

    given: dict[str, Any] = {
        "head_dim": shape.head_dim,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
    }
    structure = dataclasses.replace(shape_1b.structure(), **given)
    target = shape_1b.TARGETS["cuda"].device
    made = []
    for kernel in (cuda_attention.decode, cuda_attention.ragged):
        code, blocks = device_code.source(kernel(structure, "float16"), target)
        name = next(iter(blocks))
        found = sass.kernels(sources.complete(code, begun_early(architecture)), architecture, folder)[name]
        made.append(Code(found, 32 * cuda_attention.WARPS, 0, 1))
    return made[0], made[1]


def of_a_token(machine: Machine, shape: Shape, n: int, context: int) -> Iterator[Launch]:
    """Of `n` sequences, a token each."""
    import dataclasses

    from mlcbuild.compiler.gpu import cuda_attention as kernels

    width, layers = shape.hidden * 2 * n, shape.layers
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * 2 * n
    at = shape.products
    yield Launch("embedding", 1, 1.5 * width)
    fused = n == 1  # a norm with the product that follows, but for experts
    norms = (layers if shape.experts else 0) if fused else 2 * layers
    yield Launch("norms", norms + 1, 2 * width)
    # What experts are multiplied by asks for no other matrix.
    alone: dict[str, float] = {"early": 0.0} if shape.experts else {}
    yield dataclasses.replace(machine.product("qkv", at["qkv"], n, layers, heads, fused), **alone)
    if shape.norms_of_heads:
        yield Launch("norms of heads", layers, 2 * heads)
    yield Launch("rotary", layers, 2 * heads, in_graph=False, first=True)
    if n > 1:
        yield Launch("append", layers, heads, in_graph=False)
    tiles = shape.kv_heads * math.ceil(shape.heads / shape.kv_heads / kernels.SHARING)
    splits = max(1, min(math.ceil(kernels.BLOCKS / (n * tiles)), context // kernels.PAGE // kernels.PAGES))
    steps = math.ceil(context / kernels.PAGE / splits / kernels.WARPS)
    code = dataclasses.replace(machine.attend, steps=max(1, steps))
    cached = n * context * 2 * shape.kv_heads * shape.head_dim * 2
    joined = n * splits * shape.heads * (shape.head_dim + 2) * 8.0 if splits > 1 else 0.0  # written, and read again
    tail = (2 + math.ceil(splits / 16)) * LEFT if splits > 1 else 0.0  # what it wrote, the count, the others'
    tail += LEFT if n == 1 else 0  # the new key and value, which it puts into the cache first
    blocks = n * tiles * splits
    yield Launch("attention", layers, cached + heads + joined, blocks, code, in_graph=False, tail=tail)
    o = machine.product("o", at["o"], n, layers, 2 * width)
    # Beside the product before, rotary embedding asks, and of attention the blocks that do not join parts.
    asking = 3 - (1 / splits if splits > 1 else 0)
    yield dataclasses.replace(o, first=True, early=asking * o.early, asking=asking)
    yield from machine.mlp(shape, n, layers, decoding=True)
    head = machine.product("head", (shape.vocabulary, shape.hidden), n, 1, n * shape.vocabulary * 4)
    yield dataclasses.replace(head, **alone)


def of_a_prompt(machine: Machine, shape: Shape, length: int) -> Iterator[Launch]:
    """In calls of CHUNK tokens, each onto the ones before."""
    import dataclasses

    from mlcbuild.compiler.gpu import cuda_attention as kernels

    n = min(length, CHUNK)
    calls = math.ceil(length / n)
    times = calls * shape.layers
    width, heads = shape.hidden * 2 * n, (shape.heads + 2 * shape.kv_heads) * shape.head_dim * 2 * n
    at = shape.products
    yield Launch("norms", 2 * times + 1, 2 * width, in_graph=False)
    products = [machine.product(name, at[name], n, times, extra) for name, extra in (("qkv", heads), ("o", 2 * width))]
    for launch in [*products, *machine.mlp(shape, n, times, decoding=False)]:
        yield dataclasses.replace(launch, in_graph=False)
    yield Launch("rotary and append", 2 * times, 2 * heads, in_graph=False)
    rows = kernels.SHARING * 2 * kernels.WARPS  # of a block: two tiles for each warp
    blocks = math.ceil(n * shape.heads / shape.kv_heads / rows) * shape.kv_heads
    keys = (length + n) / 2 if calls > 1 else n / 2  # that a row sees, on the average
    code = dataclasses.replace(machine.prompt, steps=max(1, round(keys / 16)))
    yield Launch("attention", times, 2 * heads, blocks, code, in_graph=False)
    head = machine.product("head", (shape.vocabulary, shape.hidden), 1, 1, 0)
    yield dataclasses.replace(head, in_graph=False, early=0)


def floor(shape: Shape, n: int, context: int, device: Mapping[str, Any]) -> float:
    """Seconds of a token that the bytes of weights and of the cache take at the data sheet's rate."""
    matrices = shape.numbers(shape.chosen(n)) * shape.layers
    weights = (matrices + shape.vocabulary * shape.hidden) * (BITS / 8 + 2 / GROUP)
    cached = n * context * 2 * shape.kv_heads * shape.head_dim * 2 * shape.layers
    return float((weights + cached) / (device["bandwidth"] * 1e9))


def tensor_floor(shape: Shape, length: int, device: Mapping[str, Any]) -> float:
    """Seconds of a prompt's products and attention at the tensor cores' dense rate."""
    matrices = shape.numbers(shape.choices)
    attention = length / 2 * shape.heads * shape.head_dim * 2
    rate = device["multiprocessors"] * device["products"] * device["clock"] * 1e9
    return float(length * shape.layers * (matrices + attention) / rate)


def table(launches: list[Launch], device: Mapping[str, Any]) -> float:
    """Print every kernel; the seconds of all."""
    print(
        f"{'kernel':18} {'launches':>8} {'MB each':>8} {'µs each':>8} {'bound':>10}   of a warp: instructions, tensor"
    )
    total = 0.0
    for launch in launches:
        each, bound = seconds(launch, device)
        total += launch.count * each
        code = launch.code
        counted = f"{code.count():10,.0f} {code.count('HMMA'):8,.0f}" if code is not None else ""
        print(f"{launch.name:18} {launch.count:8} {launch.bytes / 1e6:8.2f} {each * 1e6:8.1f} {bound:>10} {counted}")
    return total


def figures(device: Mapping[str, Any], name: str, context: int, length: int) -> dict[str, float]:
    """Tokens a second: of decoding one sequence, and of a prompt."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(shape, device["arch"], Path(folder))
    decode, prompt = of_a_token(machine, shape, 1, context), of_a_prompt(machine, shape, length)
    one, all_ = (sum(launch.count * seconds(launch, device)[0] for launch in each) for each in (decode, prompt))
    return {"decode": 1 / one, "prefill": length / all_}


def modelled(device: Mapping[str, Any], name: str, summary: bool) -> None:
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(shape, device["arch"], Path(folder))
    print("modelled, q4f16_1:")
    for n in ROWS:
        for context in CONTEXTS:
            launches = list(of_a_token(machine, shape, n, context))
            total = sum(launch.count * seconds(launch, device)[0] for launch in launches)
            if not summary:
                print(f"\n{n} rows, context {context}")
                table(launches, device)
            least = floor(shape, n, context, device)
            count = sum(launch.count for launch in launches)
            print(
                f"decode {n:2} x {context:6}: {n / total:8.0f} t/s, {least / total:4.0%} of the floor, {count} launches"
            )
    for length in PROMPTS:
        launches = list(of_a_prompt(machine, shape, length))
        total = sum(launch.count * seconds(launch, device)[0] for launch in launches)
        if not summary:
            print(f"\nprompt of {length}")
            table(launches, device)
        share = tensor_floor(shape, length, device) / total
        print(f"prefill     {length:6}: {length / total:8.0f} t/s, {share:4.0%} of the tensor cores' rate")


def main() -> None:
    devices = yaml.safe_load((Path(__file__).parent / "gpu_devices.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(devices), default="a100-80gb")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--summary", action="store_true", help="no table of kernels")
    parser.add_argument("--json", nargs=2, type=int, metavar=("CONTEXT", "PROMPT"), help="two figures only")
    options = parser.parse_args()
    import pytest

    try:
        if options.json:
            print(json.dumps(figures(devices[options.device], options.shape, *options.json)))
        else:
            modelled(devices[options.device], options.shape, options.summary)
    except pytest.skip.Exception as error:  # of tests.support.sass: a tool is missing
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
