"""One scheduled TIR kernel in, one SPIR-V module out.

How TVM's Vulkan runtime calls it: buffers are bindings 0, 1, … of descriptor set 0 in the order of the parameters;
numbers lie in slots of eight bytes, in push constants while there are 16 or fewer, else in a uniform buffer that is the
last binding, which flag 1 tells the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlcbuild.compiler.gpu import wide_buffers
from mlcbuild.compiler.vulkan import arithmetic
from mlcbuild.compiler.vulkan.expressions import Expressions, constant_of, type_of
from mlcbuild.compiler.vulkan.opcodes import Op
from mlcbuild.compiler.vulkan.spirv import Type
from mlcbuild.errors import MlcBuildError

_SLOTS = 16  # of eight bytes: the 128 bytes of push constants that every device has
_UNIFORM_BUFFER = 1
_WORKGROUP_ID, _LOCAL_ID = 26, 27
_UNROLLED = 3  # TIR's kind of loop
_AXES = "xyz"


@dataclass(frozen=True)
class Kernel:
    """words: the SPIR-V module; flag: what the runtime is told of it; parameters: dtypes, `handle` for a buffer.

    features: what a device must have for it, by the names of a target's `supports`.
    """

    name: str
    words: Sequence[int]
    flag: int
    parameters: Sequence[str]
    launch: Sequence[str]
    features: frozenset[str] = frozenset()


def translate(function: Any, shared_memory: int) -> Kernel:
    """The kernel of a device function. Raises MlcBuildError, naming it, where it has what SPIR-V or this lacks.

    `shared_memory`: the bytes that a block's threads may share.
    """
    name = str(function.attrs["global_symbol"])
    try:
        return _Translation(shared_memory).kernel(wide_buffers.kernel(function), name)
    except MlcBuildError as error:
        raise MlcBuildError(f"kernel {name}: no SPIR-V can be made of {error}") from error


class _Translation(Expressions):
    """The state of one kernel: what its variables are, the threads of a block, and what they share."""

    def __init__(self, shared_memory: int) -> None:
        super().__init__()
        self.block = dict.fromkeys(_AXES, 1)
        self.shared, self.most_shared = 0, shared_memory

    def kernel(self, function: Any, name: str) -> Kernel:
        buffers = [type(each.ty).__name__ == "PointerType" for each in function.params]
        handles, numbers = function.params[: sum(buffers)], function.params[sum(buffers) :]
        if not all(buffers[: len(handles)]):
            raise MlcBuildError("a number before a buffer among its parameters")
        for binding, each in enumerate(handles):
            self.arrays[hash(each)] = self.module.buffer(type_of(each.ty.element_type.dtype), binding)
        in_buffer = len(numbers) > _SLOTS
        if numbers:
            types = [type_of(each.ty.dtype) for each in numbers]
            values = self.module.scalars(types, len(handles) if in_buffer else None)
            self.values.update(zip(map(hash, numbers), values, strict=True))
        self.statement(function.body)
        if self.shared > self.most_shared:
            raise MlcBuildError(f"{self.shared} bytes of shared memory, where the target has {self.most_shared}")
        return Kernel(
            name,
            self.module.assemble(name, list(self.block.values())),
            _UNIFORM_BUFFER if in_buffer else 0,
            ["handle"] * len(handles) + [str(each.ty.dtype) for each in numbers],
            [str(each) for each in function.attrs.get("tirx.kernel_launch_params", ())],
            frozenset(self.module.features),
        )

    def statement(self, node: Any) -> None:
        kind = type(node).__name__
        visit = _STATEMENTS.get(kind)
        if visit is None:
            raise MlcBuildError(f"the statement {kind}")
        visit(self, node)

    def sequence(self, node: Any) -> None:
        for each in node.seq:
            self.statement(each)

    def attribute(self, node: Any) -> None:
        if node.attr_key == "thread_extent":
            self.thread(node.node, node.value)
        elif node.attr_key == "virtual_thread":
            raise MlcBuildError("a virtual thread")
        self.statement(node.body)

    def thread(self, axis: Any, extent: Any) -> None:
        which, _, letter = str(axis.thread_tag).partition(".")
        if letter not in _AXES or which not in ("blockIdx", "threadIdx"):
            raise MlcBuildError(f"the thread axis {axis.thread_tag}")
        if which == "threadIdx":
            self.block[letter] = constant_of(extent, "the extent of threadIdx")
        built_in = _LOCAL_ID if which == "threadIdx" else _WORKGROUP_ID
        found = self.module.coordinate(built_in, _AXES.index(letter))
        self.values[hash(axis.var)] = arithmetic.cast(self.module, found, type_of(axis.var.ty.dtype))

    def allocate(self, node: Any) -> None:
        buffer = node.buffer
        element, scope = type_of(buffer.ty.dtype), str(buffer.ty.storage_scope) or "local"
        count = 1
        for each in buffer.ty.shape:
            count *= constant_of(each, f"the shape of {buffer.name}")
        if scope not in ("local", "shared"):
            raise MlcBuildError(f"memory of scope {scope}")
        if scope == "shared":
            self.shared += count * max(element.bits // 8, 1) * element.lanes
        volatile = bool(node.annotations.get("tirx.volatile", False))
        self.arrays[hash(buffer)] = self.module.array(element, count, scope == "shared", volatile)

    def declare(self, node: Any) -> None:
        """Another name for memory that is known."""
        data = node.data
        if type(data).__name__ == "Call":
            (data,) = data.args
        array = self.arrays[hash(data)]
        dtype = type_of(node.buffer.ty.dtype)
        if dtype != array.element and dtype.code != "bool":
            raise MlcBuildError(f"{node.buffer.name}, which is {dtype} in memory of {array.element}")
        self.arrays[hash(node.buffer)] = array

    def bind(self, node: Any) -> None:
        self.values[hash(node.var)] = self.expression(node.value)

    def store(self, node: Any) -> None:
        (index,) = node.indices
        value, array = self.expression(node.value), self.arrays[hash(node.buffer)]
        if value.type.code == "bool":
            value = arithmetic.cast(self.module, value, Type(array.element.code, array.element.bits, value.type.lanes))
        for i, at in enumerate(self.places(index, value.type, array)):
            part = value
            if value.type != array.element:
                part = self.module.pure(Op.CompositeExtract, array.element, value.id, i)
            self.module.store(array, at, part)

    def evaluate(self, node: Any) -> None:
        call = node.value
        name = getattr(getattr(call, "op", None), "name", "")
        if name == "tirx.tvm_storage_sync":
            if call.args[0].value != "shared":
                raise MlcBuildError(f"a barrier for {call.args[0].value} memory")
            self.module.barrier()
        elif name:
            raise MlcBuildError(f"a call of {name}")

    def conditional(self, node: Any) -> None:
        def otherwise() -> None:
            if node.else_case is not None:
                self.statement(node.else_case)

        self.branches(self.expression(node.condition), lambda: self.statement(node.then_case), otherwise)

    def loop(self, node: Any) -> None:
        module = self.module
        if node.step is not None and constant_of(node.step, "a loop's step") != 1:
            raise MlcBuildError("a loop with a step")
        start, extent = self.expression(node.min), self.expression(node.extent)
        if getattr(node.extent, "value", None) == 1:
            self.values[hash(node.loop_var)] = start
            self.statement(node.body)
            return
        end = arithmetic.binary(module, "Add", start, extent)
        before, control = module.label, int(int(node.kind) == _UNROLLED)
        header, inside, following, merge = (module.new() for _ in range(4))
        module.effect(Op.Branch, header)
        module.start(header)
        counter, phi = module.phi(start.type, start.id, before)
        self.values[hash(node.loop_var)] = counter
        more = arithmetic.binary(module, "LT", counter, end)
        module.effect(Op.LoopMerge, merge, following, control)
        module.effect(Op.BranchConditional, more.id, inside, merge)
        module.start(inside)
        self.statement(node.body)
        module.effect(Op.Branch, following)
        module.start(following)
        after = arithmetic.binary(module, "Add", counter, module.constant(start.type, 1))
        phi += [after.id, following]
        module.effect(Op.Branch, header)
        module.start(merge)

    def repeat(self, node: Any) -> None:
        module = self.module
        header, test, inside, following, merge = (module.new() for _ in range(5))
        module.effect(Op.Branch, header)
        module.start(header)
        module.effect(Op.LoopMerge, merge, following, 0)
        module.effect(Op.Branch, test)
        module.start(test)
        condition = self.expression(node.condition)
        module.effect(Op.BranchConditional, condition.id, inside, merge)
        module.start(inside)
        self.statement(node.body)
        module.effect(Op.Branch, following)
        module.start(following)
        module.effect(Op.Branch, header)
        module.start(merge)


_STATEMENTS: Mapping[str, Callable[[_Translation, Any], None]] = {
    "SeqStmt": _Translation.sequence,
    "AttrStmt": _Translation.attribute,
    "AllocBuffer": _Translation.allocate,
    "DeclBuffer": _Translation.declare,
    "Bind": _Translation.bind,
    "BufferStore": _Translation.store,
    "Evaluate": _Translation.evaluate,
    "IfThenElse": _Translation.conditional,
    "For": _Translation.loop,
    "While": _Translation.repeat,
}
