"""SPIR-V kernels as mlcbuild makes them, on a software Vulkan device (lavapipe), with the interface of wgsl.py."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.compiler.vulkan import kernel as generator
from mlcbuild.compiler.vulkan import packing
from tests.support import device_code
from tests.support.tools import missing

Array = npt.NDArray[Any]

FEATURES = ("float16", "int8", "int16", "int64", "8bit_buffer", "16bit_buffer", "storage_buffer_storage_class")
TARGET: Mapping[str, Any] = {
    "kind": "vulkan",
    "max_threads_per_block": 256,
    "max_shared_memory_per_block": 32768,
    **{f"supports_{feature}": True for feature in FEATURES},
}
_LAVAPIPE = Path("/usr/share/vulkan/icd.d")
_VULKAN_1_2 = 1 << 22 | 2 << 12


@dataclass(frozen=True)
class _Machine:
    device: Any
    queue: Any
    pool: Any
    memory: int  # the kind of memory that the host sees


def lavapipe() -> dict[str, str]:
    """The environment in which Vulkan's loader finds the software device and nothing else; empty where it is not."""
    found = sorted(_LAVAPIPE.glob("lvp_icd*.json"))
    return {"VK_ICD_FILENAMES": str(found[-1])} if found else {}


@functools.cache
def _machine() -> _Machine:
    """A software device; the test ends here where there is none."""
    os.environ.update(lavapipe())
    try:
        import vulkan as vk
    except (ImportError, OSError):
        missing("Vulkan's loader and its Python binding (apt install libvulkan1, pip install vulkan)")
    about = vk.VkApplicationInfo(pApplicationName="tests", apiVersion=_VULKAN_1_2)
    try:
        instance = vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=about), None)
        found = vk.vkEnumeratePhysicalDevices(instance)
    except vk.VkError:
        found = []
    software = [
        each for each in found if vk.vkGetPhysicalDeviceProperties(each).deviceType == vk.VK_PHYSICAL_DEVICE_TYPE_CPU
    ]
    if not software:
        missing("a software Vulkan device (apt install mesa-vulkan-drivers)")
    newer = vk.VkPhysicalDeviceVulkan12Features(shaderFloat16=1, shaderInt8=1, storageBuffer8BitAccess=1)
    more = vk.VkPhysicalDeviceVulkan11Features(pNext=newer, storageBuffer16BitAccess=1)
    wanted = vk.VkPhysicalDeviceFeatures(shaderInt64=1, shaderInt16=1)
    queue = vk.VkDeviceQueueCreateInfo(queueFamilyIndex=0, pQueuePriorities=[1.0])
    device = vk.vkCreateDevice(
        software[0], vk.VkDeviceCreateInfo(pNext=more, pQueueCreateInfos=[queue], pEnabledFeatures=wanted), None
    )
    seen = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
    kinds = vk.vkGetPhysicalDeviceMemoryProperties(software[0]).memoryTypes
    memory = next(i for i, kind in enumerate(kinds) if kind.propertyFlags & seen == seen)
    pool = vk.vkCreateCommandPool(device, vk.VkCommandPoolCreateInfo(queueFamilyIndex=0), None)
    return _Machine(device, vk.vkGetDeviceQueue(device, 0, 0), pool, memory)


class _Buffer:
    """`content`, where a kernel and the host see it."""

    def __init__(self, content: bytes) -> None:
        import vulkan as vk

        at = _machine()
        self.size = max(len(content), 16)
        usage = vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | vk.VK_BUFFER_USAGE_UNIFORM_BUFFER_BIT
        self.handle = vk.vkCreateBuffer(at.device, vk.VkBufferCreateInfo(size=self.size, usage=usage), None)
        room = vk.vkGetBufferMemoryRequirements(at.device, self.handle).size
        wanted = vk.VkMemoryAllocateInfo(allocationSize=room, memoryTypeIndex=at.memory)
        self.memory = vk.vkAllocateMemory(at.device, wanted, None)
        vk.vkBindBufferMemory(at.device, self.handle, self.memory, 0)
        self.mapped = vk.vkMapMemory(at.device, self.memory, 0, self.size, 0)
        self.mapped[0 : len(content)] = content

    def read(self, size: int) -> bytes:
        return bytes(self.mapped[0:size])

    def free(self) -> None:
        import vulkan as vk

        vk.vkFreeMemory(_machine().device, self.memory, None)
        vk.vkDestroyBuffer(_machine().device, self.handle, None)


@dataclass(frozen=True)
class Kernel:
    """A kernel and the names of its parameters in the script."""

    made: generator.Kernel
    names: Sequence[str]

    def run(self, grid: Sequence[int], arrays: Mapping[str, Array], scalars: Mapping[str, float]) -> dict[str, Array]:
        """What the kernel makes of `arrays`, by their names in the script; `grid` is its blocks along x, y, z."""
        import vulkan as vk

        at = _machine()
        count = self.made.parameters.count("handle")
        given = [np.ascontiguousarray(arrays[name]) for name in self.names[:count]]
        buffers = [_Buffer(each.tobytes()) for each in given]
        numbers = zip(self.names[count:], self.made.parameters[count:], strict=True)
        slots = b"".join(np.array(scalars[name], dtype).tobytes().ljust(8, b"\0") for name, dtype in numbers)
        kinds = [vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER] * count
        if self.made.flag:
            buffers, kinds = [*buffers, _Buffer(slots)], [*kinds, vk.VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER]
        stage = vk.VK_SHADER_STAGE_COMPUTE_BIT
        bindings = [
            vk.VkDescriptorSetLayoutBinding(binding=i, descriptorType=kind, descriptorCount=1, stageFlags=stage)
            for i, kind in enumerate(kinds)
        ]
        layout = vk.vkCreateDescriptorSetLayout(at.device, vk.VkDescriptorSetLayoutCreateInfo(pBindings=bindings), None)
        sizes = [vk.VkDescriptorPoolSize(type=kind, descriptorCount=1) for kind in kinds]
        pool = vk.vkCreateDescriptorPool(at.device, vk.VkDescriptorPoolCreateInfo(maxSets=1, pPoolSizes=sizes), None)
        sets = vk.vkAllocateDescriptorSets(
            at.device, vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=[layout])
        )
        writes = [
            vk.VkWriteDescriptorSet(
                dstSet=sets[0],
                dstBinding=i,
                descriptorType=kind,
                pBufferInfo=[vk.VkDescriptorBufferInfo(buffer=buffer.handle, offset=0, range=buffer.size)],
            )
            for i, (buffer, kind) in enumerate(zip(buffers, kinds, strict=True))
        ]
        vk.vkUpdateDescriptorSets(at.device, len(writes), writes, 0, None)
        pushed = slots and not self.made.flag
        ranges = [vk.VkPushConstantRange(stageFlags=stage, offset=0, size=len(slots))] if pushed else []
        whole = vk.vkCreatePipelineLayout(
            at.device, vk.VkPipelineLayoutCreateInfo(pSetLayouts=[layout], pPushConstantRanges=ranges), None
        )
        code = packing.binary(self.made)
        shader = vk.vkCreateShaderModule(at.device, vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=code), None)
        entry = vk.VkPipelineShaderStageCreateInfo(stage=stage, module=shader, pName=self.made.name)
        (pipeline,) = vk.vkCreateComputePipelines(
            at.device, None, 1, [vk.VkComputePipelineCreateInfo(stage=entry, layout=whole)], None
        )
        (commands,) = vk.vkAllocateCommandBuffers(
            at.device,
            vk.VkCommandBufferAllocateInfo(
                commandPool=at.pool, level=vk.VK_COMMAND_BUFFER_LEVEL_PRIMARY, commandBufferCount=1
            ),
        )
        vk.vkBeginCommandBuffer(commands, vk.VkCommandBufferBeginInfo())
        point = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        vk.vkCmdBindPipeline(commands, point, pipeline)
        vk.vkCmdBindDescriptorSets(commands, point, whole, 0, 1, sets, 0, None)
        if pushed:
            vk.vkCmdPushConstants(commands, whole, stage, 0, len(slots), vk.ffi.from_buffer(slots))
        vk.vkCmdDispatch(commands, *grid)
        vk.vkEndCommandBuffer(commands)
        vk.vkQueueSubmit(at.queue, 1, [vk.VkSubmitInfo(pCommandBuffers=[commands])], vk.VK_NULL_HANDLE)
        vk.vkQueueWaitIdle(at.queue)
        results = {
            name: np.frombuffer(buffer.read(array.nbytes), array.dtype).reshape(array.shape)
            for name, buffer, array in zip(self.names, buffers, given, strict=False)
        }
        vk.vkDestroyPipeline(at.device, pipeline, None)
        vk.vkDestroyShaderModule(at.device, shader, None)
        vk.vkDestroyDescriptorPool(at.device, pool, None)
        for buffer in buffers:
            buffer.free()
        return results


def kernels(function: Any) -> list[Kernel]:
    """The kernels of one scheduled TIR function, in the order in which they stand in it."""
    shared = TARGET["max_shared_memory_per_block"]
    return [
        Kernel(generator.translate(each, shared), [p.name.removesuffix("_ptr") for p in each.params])
        for each in device_code.device_functions(function, TARGET)
    ]
