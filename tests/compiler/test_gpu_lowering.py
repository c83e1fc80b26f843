"""Lowering for GPUs: what is refused, and that every kernel of a whole model is valid WGSL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tvm import relax, target, tirx

from mlcbuild.compiler import assemble
from mlcbuild.compiler.gpu import lower, tiles
from mlcbuild.compiler.gpu.build import wide_wgsl
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.structure import Structure
from tests.architectures import family_cases, hybrid_cases, indexer_cases
from tests.architectures.agreement import config_of
from tests.support import llama, wgsl

CONFIG = Path(__file__).parents[2] / "recipes" / "models" / "stories" / "config.json"
CUDA = {
    **{"kind": "cuda", "arch": "sm_80", "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152},
    **{"thread_warp_size": 32, "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}},
}
Q4F16_1, CAPTURED = llama.QUANTIZATIONS["q4f16_1"], "batch_decode_cuda_graph_capture"
METAL = {"kind": "metal", "max_threads_per_block": 256, "max_shared_memory_per_block": 32768, "thread_warp_size": 1}


@pytest.fixture(scope="module")
def stories() -> Structure:
    return replace(resolve(llama.architecture(), json.loads(CONFIG.read_text()), {}), vocab_size=1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"head_dim": 16}, "head_dim is 16: GPU attention takes multiples of 4 from 32 to 512"),
        ({"state_size": 257}, "a channel's state has 257 values: the GPU kernels keep up to 256"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4: GPU attention needs a whole number of query heads"),
    ],
)
def test_what_the_kernels_lack_is_named(stories: Structure, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(MlcBuildError, match=problem):
        lower.lower(replace(stories, **changes), llama.QUANTIZATIONS["q4f16_1"], "q4f16_1", METAL)


def test_tiles_of_attention_fit_into_shared_memory(stories: Structure) -> None:
    """Of OpenCL, for which TVM by itself chooses larger ones, or none, in each of these."""
    opencl, small = (
        target.Target({**METAL, "kind": "opencl", "max_shared_memory_per_block": n}) for n in (32768, 2048)
    )
    for head_dim, dtype in ((36, "float32"), (192, "float16"), (256, "float32"), (336, "float32"), (512, "float16")):
        assert tiles.fitting(replace(stories, head_dim=head_dim), dtype, opencl)[1], head_dim
    wide = replace(stories, head_dim=512)
    assert not tiles.fitting(wide, "float32", opencl)[1]  # without a tile of values
    with pytest.raises(
        MlcBuildError, match="512: no tile of attention in float16 fits into 2048 bytes of shared memory"
    ):
        tiles.fitting(wide, "float16", small)
    with pytest.raises(
        MlcBuildError, match=r"508: no tile .* in float32 fits into 32768 bytes .*; use a float16 format"
    ):
        tiles.fitting(replace(stories, head_dim=508), "float32", opencl)


@pytest.mark.parametrize(("mixer", "threads"), [("rglru", 256), ("delta", 160), ("kda", 160), ("lightning", 160)])
def test_blocks_that_a_device_does_not_take_are_named(stories: Structure, mixer: str, threads: int) -> None:
    small = {**METAL, "max_threads_per_block": 128}
    with pytest.raises(MlcBuildError) as error:
        lower.lower(replace(stories, mixer=mixer, state_size=129), Q4F16_1, "q4f16_1", small)
    assert str(error.value) == (
        f"mixer is {mixer}: its kernel has blocks of {threads} threads, and the device takes 128"
    )


@pytest.mark.parametrize(
    ("target", "quantization", "problem"),
    [
        (METAL, "q4bf16_1", "its model dtype is bfloat16, which metal does not have"),
        (wgsl.TARGET, "q8f16_0", "is uint8, which WGSL does not have; use a format with storage_dtype uint32"),
    ],
)
def test_formats_that_a_device_cannot_read(
    stories: Structure, target: dict[str, Any], quantization: str, problem: str
) -> None:
    with pytest.raises(MlcBuildError, match=problem):
        lower.lower(stories, llama.QUANTIZATIONS[quantization], quantization, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "glm4_moe",
        "deepseek_v2",
        "xglm",
        "apertus",
        "ministral3",
        "diffllama",
        "beam",
        "longcat_flash",
        "jetmoe",
        "doge",
        "hrm_text",
        "dory",
        "minimax_m3_vl_text",
        "axk2",
        "dots3_note_text",
        "hy_v4",
        "qwen4_exp_text",
        "zaya",
    ],
)
def test_what_one_architecture_has_lowers_for_cuda(name: str) -> None:
    """What no other test lowers: every kernel is shared out among threads."""
    from tvm import tirx

    case = (family_cases.CASES | indexer_cases.CASES | hybrid_cases.CASES)[name]
    sizes = {"xglm": {"attention_heads": 2}, "jetmoe": {"kv_channels": 32}}.get(name, {"head_dim": 32})
    structure = resolve(llama.architecture(name), {**config_of(case), **sizes}, {})
    module = lower.lower(structure, llama.QUANTIZATIONS["q4f16_1"], "q4f16_1", CUDA)
    functions = [str(f) for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    kernels = [text for text in functions if "tirx.is_host_func" not in text]  # those compute shapes
    assert kernels and all("blockIdx" in text or "thread_binding" in text for text in kernels)


@pytest.mark.slow
def test_what_a_7b_library_is_made_of_does_not_grow_with_layers_times_parameters(tmp_path: Path) -> None:
    """Each captured piece takes all parameters; it once had a check, and a sentence, for each of them: 392 MB."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {**json.loads(CONFIG.read_text()), **sizes, "num_key_value_heads": 32, "head_dim": 128}
    structure = replace(resolve(llama.architecture(), config, {}), vocab_size=1)
    module = lower.lower(structure, llama.QUANTIZATIONS["q4f16_1"], "q4f16_1", CUDA, tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20e6
    assemble.save(module, tmp_path / "module.json")
    assert (tmp_path / "module.json").stat().st_size < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f16_1"])
def test_every_kernel_of_a_model_is_valid_wgsl(stories: Structure, quantization: str) -> None:
    import tvm
    from tvm import relax, target, transform

    wide_wgsl()
    module = lower.lower(stories, llama.QUANTIZATIONS[quantization], quantization, wgsl.TARGET)
    both = target.Target(wgsl.TARGET, host={"kind": "llvm", "mtriple": "x86_64-linux-gnu"})
    with both, transform.PassContext(config={"tirx.disable_cse_tir": True}):
        built = relax.build(module, target=both, relax_pipeline=None)
    names = []
    waiting: list[tvm.runtime.Module] = [built.mod]
    while waiting:
        each = waiting.pop()
        waiting += list(each.imports)
        if each.kind == "webgpu":
            for kernel in wgsl.split(each.inspect_source()):
                kernel.validate()
                names.append(kernel.name)
    assert {"attention_prefill_kernel", "attention_decode_kernel", "linear_kernel_2"} <= set(names)


@pytest.mark.slow
def test_a_layer_launches_four_kernels_of_the_librarys_own_at_decode(stories: Structure) -> None:
    """Beside what the KV cache calls: products, with the norms before and the gate or the residual behind them."""
    counted = []
    for layers in (2, 3):
        module = lower.lower(replace(stories, num_hidden_layers=layers), Q4F16_1, "q4f16_1", CUDA)
        functions = dict(module.functions_items())
        kernels = [gv for gv, function in functions.items() if isinstance(function, tirx.PrimFunc)]
        pieces = [gv for gv in functions if gv.name_hint == "batch_decode" or gv.name_hint.startswith(CAPTURED)]
        bindings = [one for gv in pieces for block in functions[gv].body.blocks for one in block.bindings]
        called = [one.value.op for one in bindings if isinstance(one.value, relax.Call)]
        counted.append(sum(any(op.same_as(gv) for gv in kernels) and "shape_func" not in str(op) for op in called))
    assert counted[1] - counted[0] == 4, counted
