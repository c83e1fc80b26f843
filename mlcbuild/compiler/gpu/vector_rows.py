"""Products of few rows of x on devices whose language is not CUDA's: the matrix is read once, 16 bytes at a time.

A thread has four rows of the matrix. Of each it loads 16 bytes (a *chunk*: columns of one group, with one scale) before
it uses any of them. So the numbers of a column are a vector, one for each row, and so are sums. Chunks are shared out
to the lanes of a block, whose sums are added through shared memory. What follows a product (a bias, a residual) is
applied to the sums, as on CUDA devices (cuda_rows.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, target, tirx

from mlcbuild.compiler.gpu.cuda_rows import FORMAT, Epilogue, launched
from mlcbuild.compiler.gpu.inlining import inline_consumers
from mlcbuild.compiler.gpu.rewriting import mapped

KINDS = ("metal", "opencl", "vulkan", "webgpu")  # of devices
COUNTS = (1, 4, 8)  # rows of x that there are kernels for: up to so many
_FOUR = 4  # rows of a thread; words of a chunk; numbers of a vector
_THREADS = 128  # of a block
_TOGETHER = 4  # rows of x whose sums are added at a time: shared memory


@dataclass(frozen=True)
class _Format:
    """bits: of a code, or of a number where there are no codes; group: columns of a scale, 0 where there is none.

    across: four neighbouring rows of the matrix lie beside each other, not four storage words of a row.
    """

    bits: int
    group: int
    across: bool
    dtype: str

    @property
    def codes(self) -> int:
        """Columns of a storage word."""
        return 32 // self.bits

    @property
    def chunk(self) -> int:
        """Columns whose numbers are 16 bytes of a row, or four words under each other."""
        return _FOUR * self.codes

    @property
    def zero(self) -> int:
        """The code of 0."""
        return (1 << self.bits - 1) - 1


@dataclass(frozen=True)
class _Product:
    """x [n, columns] · the matrix [rows, columns]ᵀ. `given`: x, the numbers or the words, scales where there are."""

    of: _Format
    n: Any
    rows: Any
    columns: int
    given: tuple[Any, ...]
    epilogue: Epilogue

    @property
    def chunks(self) -> int:
        return math.ceil(self.columns / (self.of.group or self.of.chunk)) * max(1, self.of.group // self.of.chunk)


def few_rows(function: tirx.PrimFunc, product: Any, most: int) -> tirx.PrimFunc | None:
    """`function`, a product with what follows, for up to `most` rows of x; None where the format has no such kernel."""
    found = _read(function, product)
    if found is None:
        return None
    body, device = _Kernel(found, most).body(), target.Target.current(allow_none=True)
    opencl = device is not None and device.kind.name == "opencl"
    return function.with_body(mapped(body, tirx.Shuffle, _literal) if opencl else body)


def _read(function: tirx.PrimFunc, product: Any) -> _Product | None:
    n, rows, columns = (var.dom.extent for var in product.iter_vars)
    sch = s_tir.Schedule(function)
    block = sch.get_sblock(str(product.name_hint))
    x, w = (_sources(sch, block, region.source) for region in product.reads)
    if len(x) != 1 or len(w) > 2:
        return None
    dtype, form = str(x[0].dtype), product.annotations.get(FORMAT)
    if form is None and not (len(w) == 1 and str(w[0].dtype) == dtype):
        return None
    bits, group, across = str(form).partition(" of ")[0].split(", ") if form else ("32", "0", "false")
    of = _Format(int(bits), int(group), across == "true", dtype)
    fixed = isinstance(rows, tirx.IntImm)
    if of.group % of.chunk or int(columns) % (_FOUR if of.group else of.chunk):
        return None
    if of.across and not (fixed and int(rows) % _FOUR == 0):
        return None
    last = sch.get(inline_consumers(sch, block) or block)
    if len(last.iter_vars) != 2 and last.init is None:
        return None
    return _Product(of, n, rows, int(columns), (*x, *w), Epilogue(last, product.writes[0].source))


def _sources(sch: Any, block: Any, buffer: Any) -> list[Any]:
    """The function's parameters that `buffer`, which `block` reads, is made of."""
    for producer in sch.get_producers(block):
        made = sch.get(producer)
        if made.writes[0].source.same_as(buffer):
            return [each for read in made.reads for each in _sources(sch, producer, read.source)]
    return [buffer]


class _Kernel:
    def __init__(self, product: _Product, most: int) -> None:
        self.product, self.most, self.statements = product, most, list[Any]()
        # Neighbouring threads read neighbouring bytes: of a row, or across rows.
        across = product.of.across
        lanes = _THREADS // 8 if across else min(32, 1 << (product.chunks - 1).bit_length())
        self.lanes, self.groups = lanes, _THREADS // lanes
        self.block, self.lane, self.group = (_var(name) for name in ("bx", "lane", "group"))
        self.first = (self.block * self.groups + self.group) * _FOUR
        self.sums = tirx.decl_buffer((most,), "float32x4", "sums", scope="local")
        height = self.groups * _FOUR  # rows of the matrix, of a block
        self.outputs = height * min(most, _TOGETHER)
        self.stride = self.outputs + 1  # another bank of memory for each lane
        self.shared = tirx.decl_buffer((lanes * self.stride,), "float32", "shared_sums", scope="shared")
        self.buffers = [self.sums, self.shared]

    def body(self) -> Any:
        chunk, chunks = _var("chunk"), self.product.chunks
        extent = (chunks - self.lane + (self.lanes - 1)) // self.lanes if chunks % self.lanes else chunks // self.lanes
        for i in range(self.most):
            self.add(tirx.BufferStore(self.sums, _splat(0.0), [i]))
        before, self.statements = self.statements, []
        self._chunk(chunk * self.lanes + self.lane)
        loop = tirx.For(chunk, 0, extent, tirx.ForKind.SERIAL, tirx.SeqStmt(self.statements))
        self.statements = [*before, loop]
        for first in range(0, self.most, _TOGETHER):
            self._store(first, min(self.most, _TOGETHER))
        height = self.groups * _FOUR
        x, y = (self.lane, self.lanes), (self.group, self.groups)
        x, y = (y, x) if self.product.of.across else (x, y)
        axes = {"threadIdx.y": y, "blockIdx.x": (self.block, (self.product.rows + (height - 1)) // height)}
        return launched(tirx.SeqStmt(self.statements), self.buffers, x, axes)

    def add(self, statement: Any) -> None:
        self.statements.append(statement)

    def let(self, name: str, value: Any) -> Any:
        """`value` by a name. TVM puts what reads no memory in the place of its name: see `kept`."""
        made = tirx.Var(name, str(value.ty.dtype))
        self.add(tirx.Bind(made, value))
        return made

    def room(self, name: str, dtype: str, size: int = 1) -> Any:
        self.buffers.append(tirx.decl_buffer((size,), dtype, name, scope="local"))
        return self.buffers[-1]

    def kept(self, room: Any, values: list[Any]) -> list[Any]:
        for i, value in enumerate(values):
            self.add(tirx.BufferStore(room, value, [i]))
        return [tirx.BufferLoad(room, [i]) for i in range(len(values))]

    def _chunk(self, chunk: Any) -> None:
        """A lane's part of the sums that the columns of one chunk of four rows make."""
        of = self.product.of
        at = self._words(chunk) if of.group else self._numbers(chunk)
        scales = self._scales(chunk) if of.group else None
        alone = self.most == 1
        mask = (1 << of.bits) - 1

        def code(k: int) -> Any:
            """Four codes, times 2 ** (bits * j): what is not shifted costs nothing."""
            p, j = divmod(k, of.codes)
            return (at(p) & tirx.Broadcast(tirx.const(mask << of.bits * j, "uint32"), _FOUR)).astype("float32x4")

        if scales is None or not alone:
            w = self.room("w", "float32x4", _FOUR)
        if scales is not None and alone:
            part, total = self.room("part", "float32x4"), self.room("total", "float32")
            shifted = self.room("shifted", "float32x4")
            self.kept(part, [_splat(0.0)])
            self.kept(total, [tirx.const(0.0, "float32")])
        elif scales is not None:
            factors = [scales * _splat(_power(-of.bits * j)) if j else scales for j in range(of.codes)]
            factors = self.kept(self.room("factors", "float32x4", of.codes), factors)
            (lowest,) = self.kept(self.room("lowest", "float32x4"), [scales * _splat(-float(of.zero))])
        for piece in range(0, of.chunk, _FOUR):
            columns = range(piece, piece + _FOUR)
            if scales is None:
                numbers = self.kept(w, [at(k).astype("float32x4") for k in columns])
            elif alone:
                numbers = [code(k) for k in columns]
            else:
                numbers = self.kept(w, [code(k) * factors[k % of.codes] + lowest for k in columns])
            for i in range(self.most):
                x = self._x(i, chunk * of.chunk + piece)
                into, place = self.sums, i
                if scales is not None and alone:
                    self._increased(total, 0, _lane(x, 0) + _lane(x, 1) + (_lane(x, 2) + _lane(x, 3)))
                    (x,) = self.kept(shifted, [x * _vector_of([_power(-of.bits * (k % of.codes)) for k in columns])])
                    into = part
                for t, number in enumerate(numbers):
                    self._increased(into, place, _splat(_lane(x, t)) * number)
        if scales is not None and alone:
            middle = tirx.BufferLoad(total, [0]) * tirx.const(float(of.zero), "float32")
            self._increased(self.sums, 0, scales * (tirx.BufferLoad(part, [0]) - _splat(middle)))

    def _increased(self, buffer: Any, place: int, value: Any) -> None:
        self.add(tirx.BufferStore(buffer, tirx.BufferLoad(buffer, [place]) + value, [place]))

    def _row(self, r: int) -> Any:
        """Row `r` of a thread's four; those behind the matrix are its last one, whose sums nobody stores."""
        return tirx.min(self.first + r, self.product.rows - 1)

    def _words(self, chunk: Any) -> Callable[[int], Any]:
        """Four words, one of each row."""
        words = self.product.given[1]
        if self.product.of.across:
            first = tirx.min(self.first, self.product.rows - _FOUR)
            loaded = [self.let("words", _vector(words, chunk * _FOUR + p, first)) for p in range(_FOUR)]
            return loaded.__getitem__
        loaded = [self.let("words", _vector(words, self._row(r), chunk * _FOUR)) for r in range(_FOUR)]
        columns = [_vector_of([_lane(each, p) for each in loaded]) for p in range(_FOUR)]
        return self.kept(self.room("columns", "uint32x4", _FOUR), columns).__getitem__

    def _numbers(self, chunk: Any) -> Callable[[int], Any]:
        """Four numbers of a column, one of each row."""
        of, matrix = self.product.of, self.product.given[1]
        loaded = [
            [
                self.let("numbers", _vector(matrix, self._row(r), chunk * of.chunk + k))
                for k in range(0, of.chunk, _FOUR)
            ]
            for r in range(_FOUR)
        ]

        return lambda k: _vector_of([_lane(row[k // _FOUR], k % _FOUR) for row in loaded])

    def _scales(self, chunk: Any) -> Any:
        of, scales = self.product.of, self.product.given[2]
        group = chunk // (of.group // of.chunk)
        if of.across:
            found = _vector(scales, group, tirx.min(self.first, self.product.rows - _FOUR))
        else:
            found = _vector_of([tirx.BufferLoad(scales, [self._row(r), group]) for r in range(_FOUR)])
        return self.let("scales", found.astype("float32x4"))

    def _x(self, i: int, column: Any) -> Any:
        """Four neighbouring numbers of a row of x, in float32; 0 behind its last column."""
        product = self.product
        row = tirx.min(i, product.n - 1) if i else 0
        value = _vector(product.given[0], row, column)
        if product.columns < product.chunks * product.of.chunk:
            zeros = tirx.Broadcast(tirx.const(0.0, product.of.dtype), _FOUR)
            value = tirx.if_then_else(column < product.columns, value, zeros)
        return self.let("x", value.astype("float32x4"))

    def _store(self, first: int, count: int) -> None:
        """The lanes' sums of `count` rows of x from `first` on are added, and what follows is stored."""
        shared, height = self.shared, self.groups * _FOUR
        if first:
            self.add(_barrier())
        for i in range(count):
            sums = self.let("sum", tirx.BufferLoad(self.sums, [first + i]))
            place = self.lane * self.stride + (i * height + self.group * _FOUR)
            for r in range(_FOUR):
                self.add(tirx.BufferStore(shared, _lane(sums, r), [place + r]))
        self.add(_barrier())
        number, outputs = _var("i"), height * count
        at = number * _THREADS + self.group * self.lanes + self.lane
        terms = [tirx.BufferLoad(shared, [at + lane * self.stride]) for lane in range(self.lanes)]
        while len(terms) > 1:
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        row, column = first + at // height, self.block * height + at % height
        inside = tirx.all(at < outputs, row < self.product.n, column < self.product.rows)
        store = tirx.IfThenElse(inside, self.product.epilogue.at(row, column, terms[0]), None)
        self.add(tirx.For(number, 0, -(-outputs // _THREADS), tirx.ForKind.SERIAL, store))


def _literal(node: Any) -> Any:
    """A vector of numbers as OpenCL C wants it, `(float4)(...)`: TVM writes C++, which its compilers refuse."""
    if len(node.vectors) == 1:
        return node
    lanes = str(node.ty.dtype).replace("float16", "half").replace("float32", "float").replace("uint32", "uint")
    return tirx.call_pure_extern(node.ty.dtype, f"({lanes.replace('x', '')})", *node.vectors)


def _vector(buffer: Any, row: Any, column: Any) -> Any:
    return tirx.BufferLoad(buffer, [row, tirx.Ramp(column, 1, _FOUR)])


def _vector_of(values: list[Any]) -> Any:
    return tirx.Shuffle(values, list(range(_FOUR)))


def _lane(value: Any, lane: int) -> Any:
    return tirx.Shuffle([value], [lane])


def _splat(value: Any) -> Any:
    return tirx.Broadcast(tirx.const(value, "float32") if isinstance(value, float) else value, _FOUR)


def _power(exponent: int) -> Any:
    """2 ** exponent. Written as a decimal number, TVM would round it to seven digits."""
    return tirx.reinterpret("float32", tirx.const(127 + exponent << 23, "uint32"))


def _barrier() -> Any:
    return tirx.Evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def _var(name: str) -> Any:
    return tirx.Var(name, "int32")
