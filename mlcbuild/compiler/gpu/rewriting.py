"""Parts of TVM's kernels, found by the names of their buffers and variables, to be changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import ir

from mlcbuild.errors import MlcBuildError

_KNOWN = "0.27"  # the version of apache-tvm whose names these are


def arguments(function: Any) -> dict[str, Any]:
    """The kernel's arguments by name."""
    return {str(param.name): param for param in function.params}


def variable(body: Any, name: str) -> Any:
    found = {var: None for var in nodes(body, ir.Var) if str(var.name) == name}
    expect([*found], 1, f"there is a variable `{name}`")
    return next(iter(found))


def index_of(node: Any, buffer: str) -> Any:
    """The variable that alone indexes the buffer of this name."""
    loads = [load.indices[0] for load in nodes(node, ir.TensorLoad) if load.source.name == buffer]
    found = [index for index in loads if isinstance(index, ir.Var)][:1]
    expect(found, 1, f"{buffer} is read at the number of a sequence")
    return found[0]


def is_length(load: Any) -> bool:
    """How many keys a sequence has in the cache."""
    return bool(load.source.name == "kv_chunk_len")


def nodes(root: Any, of: Any) -> list[Any]:
    found: list[Any] = []

    def note(node: Any) -> Any:
        found.append(node)
        return node

    mapped(root, of, note)
    return found


def mapped(root: Any, of: Any, change: Callable[[Any], Any]) -> Any:
    """`root` with each node of this class changed, its parts first."""
    return tvm_ffi.structural_map(root, [(of, change)])


def expect(places: Sequence[Any], count: int, what: str) -> None:
    """Raise MlcBuildError unless there are `count` of the places that a kernel of TVM's is changed at."""
    if len(places) != count:
        raise MlcBuildError(
            f"the attention kernels of TVM {tvm.__version__} are not those of {_KNOWN}, which mlcbuild changes: "
            f"{what} in {len(places)} places and not in {count}; install apache-tvm {_KNOWN}"
        )
