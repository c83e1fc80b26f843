"""WGSL kernels as TVM generates them, checked by naga and run on a software Vulkan device (lavapipe) through wgpu."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support import device_code
from tests.support.tools import missing

Array = npt.NDArray[Any]

TARGET = {"kind": "webgpu", "max_num_threads": 256, "max_shared_memory_per_block": 32768}
MOST_BUFFERS = 10  # of a kernel: what TVM's runtime asks a browser for (tvmjs, requiredMaxStorageBuffersPerShaderStage)
_LAVAPIPE = Path("/usr/share/vulkan/icd.d")
_BINDING = re.compile(
    r"@group\(0\) @binding\((\d+)\) var<(storage, read_write|storage, read|uniform)> (\w+) : ([^;]+);"
)
_DTYPES = {"i32": np.int32, "u32": np.uint32, "f32": np.float32, "f16": np.float16}


@functools.cache
def device() -> Any:
    """A software device; the test ends here where there is none."""
    for path in sorted(_LAVAPIPE.glob("lvp_icd*.json")):
        os.environ["VK_ICD_FILENAMES"] = str(path)
    try:
        import wgpu
    except ImportError:
        missing("wgpu (pip install wgpu)")
    adapters = [each for each in wgpu.gpu.enumerate_adapters_sync() if each.info["adapter_type"] == "CPU"]
    if not adapters:
        missing("a software Vulkan device (apt install mesa-vulkan-drivers)")
    return adapters[0].request_device_sync(required_features=["shader-f16"])


@dataclass(frozen=True)
class Kernel:
    name: str
    source: str

    @property
    def bindings(self) -> list[tuple[int, str, str, str]]:
        """(number, kind, name, type) of everything that the kernel is given."""
        return [(int(number), kind, name, of) for number, kind, name, of in _BINDING.findall(self.source)]

    def validate(self) -> Any:
        """The shader module. Raises where naga does not accept the source."""
        assert sum(kind.startswith("storage") for _, kind, _, _ in self.bindings) <= MOST_BUFFERS, self.name
        return device().create_shader_module(code=self.source)

    def run(self, grid: Sequence[int], arrays: Mapping[str, Array], scalars: Mapping[str, int]) -> dict[str, Array]:
        """What the kernel makes of `arrays`, by their names in the script; `grid` is its blocks along x, y."""
        import wgpu

        gpu, buffers, written = device(), [], {}
        for number, kind, name, _ in self.bindings:
            if kind == "uniform":
                data = self._scalars(scalars, grid[0])
                buffers.append((number, gpu.create_buffer_with_data(data=data, usage=wgpu.BufferUsage.UNIFORM)))
                continue
            array = np.ascontiguousarray(arrays[name.removesuffix("_ptr")])
            content = array.tobytes() + bytes(-array.nbytes % 4)
            usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
            buffer = gpu.create_buffer_with_data(data=content, usage=usage)
            buffers.append((number, buffer))
            if kind == "storage, read_write":
                written[name.removesuffix("_ptr")] = (buffer, array)
        pipeline = gpu.create_compute_pipeline(
            layout="auto", compute={"module": self.validate(), "entry_point": self.name}
        )
        entries = [
            {"binding": number, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
            for number, buffer in buffers
        ]
        encoder = gpu.create_command_encoder()
        step = encoder.begin_compute_pass()
        step.set_pipeline(pipeline)
        step.set_bind_group(0, gpu.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries))
        step.dispatch_workgroups(*grid)
        step.end()
        gpu.queue.submit([encoder.finish()])
        return {
            name: np.frombuffer(gpu.queue.read_buffer(buffer), np.uint8)[: array.nbytes]
            .view(array.dtype)
            .reshape(array.shape)
            for name, (buffer, array) in written.items()
        }

    def _scalars(self, scalars: Mapping[str, int], blocks: int) -> bytes:
        (struct,) = re.findall(r"struct PODArgs \{(.*?)\}", self.source, re.DOTALL)
        fields = re.findall(r"(\w+): (\w+)", struct)
        known = {**scalars, "packGridDimX": blocks}
        content = b"".join(np.array(known[name], _DTYPES[of]).tobytes() for name, of in fields)
        return content + bytes(-len(content) % 16)


def kernels(function: Any) -> list[Kernel]:
    """The kernels of one scheduled TIR function, in the order in which they stand in it."""
    code, blocks = device_code.source(function, TARGET)
    found = {kernel.name: kernel for kernel in split(code)}
    return [found[name] for name in blocks]


def split(source: str) -> list[Kernel]:
    """One kernel after the other, as the text of a whole module has them."""
    parts = re.split(r"^//-+\n// Function: (\w+)\n//-+\n", source, flags=re.MULTILINE)
    head = "enable f16;\n" if "enable f16;" in source else ""
    bodies = zip(parts[1::2], parts[2::2], strict=True)
    clean = [(name, re.sub(r"^// Function: \w+\n", "", body, flags=re.MULTILINE)) for name, body in bodies]
    return [Kernel(name, body if "enable f16;" in body else head + body) for name, body in clean]
