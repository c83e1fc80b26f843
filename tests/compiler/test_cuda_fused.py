"""Which kernels of a graph become one on CUDA devices, and what each asks for of the next one's matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tvm import IRModule, relax, target, te, tirx

from mlcbuild.compiler.gpu import cuda_fused, cuda_prefetch, products, rows, schedules
from mlcbuild.compiler.gpu.calls import bindings_of, given_to
from mlcbuild.compiler.gpu.device import device_of
from mlcbuild.compiler.operations import call
from mlcbuild.compiler.script import quick
from mlcbuild.quantization.schemes import parts_of
from tests.support import llama
from tests.support.gpus import DEVICES

CUDA, WIDTH = DEVICES[0].TARGET, 64
PLAIN = (("weight", (2 * WIDTH, WIDTH), "float16"),)
PACKED = llama.QUANTIZATIONS["q4f16_1"].weights


class Graph:
    """A function of x [n, WIDTH] and of what its calls read beside; everything is float16."""

    def __init__(self, build: Callable[[Graph, Any], list[Any]]) -> None:
        self.builder, n, self.matrices = relax.BlockBuilder(), tirx.Var("n", "int64"), list[Any]()
        self.given = [relax.Var("x", relax.TensorType([n, WIDTH], "float16"))]
        with self.builder.function("main"):
            with self.builder.dataflow():
                out = self.builder.emit_output(relax.Tuple(build(self, self.given[0])))
            self.builder.emit_func_output(out, self.given)
        with quick(), target.Target(dict(CUDA)):
            self.module = schedules._narrow(self.builder.finalize())

    def reads(self, shape: tuple[int, ...], dtype: str = "float16") -> Any:
        self.given.append(relax.Var(f"given_{len(self.given)}", relax.TensorType(list(shape), dtype)))
        return self.given[-1]

    def norm(self, x: Any, scale: float = 1.0) -> Any:
        """With a scale behind it, as a function that both were fused into would be."""
        function = rows.rms_norm(WIDTH, 1e-5, "float16")
        if scale != 1.0:
            row, weight = (te.placeholder(shape, "float16") for shape in ((tirx.Var("n", "int64"), WIDTH), (WIDTH,)))
            k = te.reduce_axis((0, WIDTH), "k")
            squares = te.compute(row.shape[:1], lambda i: te.sum(row[i, k] * row[i, k], axis=k), name="squares")
            normed = te.compute(row.shape, lambda i, j: row[i, j] * squares[i] * weight[j], name="normed")
            scaled = te.compute(row.shape, lambda i, j: normed[i, j] * tirx.const(scale, "float16"), name="scaled")
            function = rows.private([row, weight, scaled]).with_attr(rows.NORM, 1e-5)
        return call(self.builder, function, "norm", [x, self.reads((WIDTH,))], list(x.ty.shape), "float16")

    def product(self, x: Any, weights: Any = None) -> Any:
        shape = (2 * WIDTH, WIDTH)
        packed = parts_of(shape, weights, "float16") if weights is not None else ()
        parts = tuple((part.form, tuple(part.shape), part.dtype) for part in packed) or PLAIN
        function = products.linear(parts, weights, *shape, "float16", "float16", False)
        given = [self.reads(of, dtype) for _, of, dtype in parts]
        self.matrices.append(given[0])
        return call(self.builder, function, "product", [x, *given], [x.ty.shape[0], 2 * WIDTH], "float16")

    def gate(self, x: Any) -> Any:
        function = rows.gated("silu", WIDTH, "float16")
        return call(self.builder, function, "gate", [x], [x.ty.shape[0], WIDTH], "float16")


def two_products(g: Graph, x: Any) -> list[Any]:
    normed = g.norm(x)
    return [g.product(normed), g.product(normed)]


def read_twice(g: Graph, x: Any) -> list[Any]:
    product = g.product(x)
    return [g.gate(product), product]


@pytest.mark.parametrize(
    ("build", "called"),
    [
        (lambda g, x: [g.gate(g.product(g.norm(x)))], ["norm_product_gate"]),
        (two_products, ["norm", "product", "product"]),
        (read_twice, ["product", "gate"]),
        (lambda g, x: [g.product(g.norm(x, 2.0))], ["norm", "product"]),
    ],
    ids=["a chain", "a norm of two products", "a product that is read twice", "a norm and a scale"],
)
def test_what_becomes_one(build: Callable[[Graph, Any], list[Any]], called: list[str]) -> None:
    module = Graph(build).module
    with quick(), target.Target(dict(CUDA)):
        fused = cuda_fused.fuse(module, lambda function, _: function)
    calls = [binding.value.args[0].name_hint for binding in bindings_of(fused["main"]) if given_to(binding)]
    assert calls == called


def test_what_is_asked_for_ahead() -> None:
    """The matrix of the next product, in whatever words; nothing by the last one."""

    def build(g: Graph, x: Any) -> list[Any]:
        return [g.product(x, PACKED), g.product(x), g.product(g.norm(x), PACKED), g.product(x, PACKED)]

    graph = Graph(build)
    with quick(), target.Target(dict(CUDA)):
        module = schedules.schedule(graph.module, device_of(CUDA))
    order = [binding for binding in bindings_of(module["main"]) if given_to(binding)]
    for binding, wanted in zip(order[:-1], graph.matrices[1:], strict=True):
        function, given = module[binding.value.args[0]], given_to(binding)
        assert given[-1].same_as(wanted) and function.params[len(given) - 1].dtype == wanted.ty.dtype
        assert function.script().count("prefetch_next") == len(schedules.FEW)
    last = order[-1]
    assert len(given_to(last)) == 3 and "prefetch_next" not in module[last.value.args[0]].script()


@pytest.mark.parametrize(
    ("sizes", "dtype", "wanted"),
    [
        ((256_000, 12_288), "float16", 6 << 20),  # more bytes, and more numbers, than int32 has
        ((1024, 512), "uint32", 2 << 20),
        ((4096, 512), "uint32", 6 << 20),
        ((128, 64), "float16", 1 << 14),
    ],
)
def test_how_much_is_asked_for(sizes: tuple[int, ...], dtype: str, wanted: int) -> None:
    variables = [tirx.Var(f"size_{i}", "int32") for i in range(2)]
    body = tirx.Evaluate(cuda_prefetch.bytes_of(variables, dtype))
    function = tirx.PrimFunc(variables, body).specialize(dict(zip(variables, sizes, strict=True)))
    folded = tirx.transform.StmtSimplify()(IRModule({"main": function}))["main"].body.value
    assert int(folded) == wanted
