"""A Vulkan library run by TVM's own runtime: `python -m tests.support.vulkan_model RUNTIME LIBRARY WEIGHTS ARRAYS`.

RUNTIME is a libtvm_runtime_vulkan, ARRAYS an .npz with token ids `ids` and the length of each `chunk` that they are
taken in; written there: float32 `logits` of every position. In a process of its own, because of what it loads.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.runtime import tvm_runtime, weights

_CPU, _VULKAN, _POOLED = 1, 7, 2  # DLPack's devices; TVM's allocator
_PAGE = 16


def run(runtime: Path, library: Path, folder: Path, ids: npt.NDArray[np.int32], chunks: list[int]) -> Any:
    """float32 [len(ids), vocab_size]."""
    import tvm_ffi

    tvm_runtime.start()
    ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    device = tvm_ffi.device("vulkan", 0)
    module = tvm_ffi.load_module(str(library.absolute()))["vm_load_executable"]()
    module["vm_initialization"](_VULKAN, 0, _POOLED, _CPU, 0, _POOLED)

    def function(name: str) -> Any:
        return module.get_function(name, query_imports=True)

    def there(array: npt.NDArray[Any]) -> Any:
        allocate = tvm_runtime.function("runtime.TVMTensorAllocWithScope")
        made = allocate(tvm_ffi.Shape(array.shape), tvm_ffi.dtype(str(array.dtype)), device, None)
        content = np.ascontiguousarray(array)
        tvm_runtime.function("runtime.TVMTensorCopyFromBytes")(
            made, content.ctypes.data_as(ctypes.c_void_p), content.nbytes
        )
        return made

    def here(tensor: Any) -> Any:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        copy = tvm_runtime.function("runtime.TVMTensorCopyToBytes")
        copy(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return array

    metadata = json.loads(str(function("_metadata")()))
    arrays = {record.name: weights.array(record) for record in weights.read_index(folder)}
    parameters = tvm_ffi.Array([there(arrays[each["name"]]) for each in metadata["params"]])
    room = -(-len(ids) // _PAGE) * _PAGE
    sizes = (1, room, metadata["prefill_chunk_size"], _PAGE, 0)
    cache = function("create_tir_paged_kv_cache")(*(tvm_runtime.shape(size) for size in sizes))
    state = {name: tvm_runtime.function(f"vm.builtin.kv_state_{name}") for name in ("begin_forward", "end_forward")}
    tvm_runtime.function("vm.builtin.kv_state_add_sequence")(cache, 0)
    results, at = [], 0
    for count in chunks:
        hidden = function("embed")(there(ids[at : at + count]), parameters)
        hidden = tvm_runtime.view(hidden, (1, *hidden.shape), str(hidden.dtype))
        state["begin_forward"](cache, tvm_runtime.shape(0), tvm_runtime.shape(count))
        name = "decode" if count == 1 else "batch_verify"  # which gives every position
        logits = here(function(name)(hidden, cache, parameters)[0])
        state["end_forward"](cache)
        results.append(logits.reshape(count, -1))
        at += count
    return np.concatenate(results)


def main() -> None:
    runtime, library, folder, path = map(Path, sys.argv[1:])
    with np.load(path) as given:
        ids, chunks = given["ids"], [int(each) for each in given["chunks"]]
    np.savez(path, logits=run(runtime, library, folder, ids, chunks))


if __name__ == "__main__":
    main()
