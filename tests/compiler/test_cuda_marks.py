"""What the machine code of CUDA's products is measured by, without a device: instructions, loads, registers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import shape_1b
from mlcbuild.compiler.gpu import cuda, cuda_many, cuda_rows, sources
from mlcbuild.compiler.gpu.lower import lower
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.load import load
from tests.support import device_code, sass
from tests.support.cuda_products import source, source_of_experts, source_of_many

ROOT = Path(__file__).parents[2]
FORM = "4, 32, false of float16"  # q4f16_1
# [rows, columns] of the matrices of 1B, 7B, 8B and 70B models (Llama 3.2 1B, Vicuna 7B, Llama 3.1 8B and 70B).
SHAPES = {
    "1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)],
    "7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)],
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (128256, 8192)],
    "8960": [(1536, 8960)],  # the columns of Qwen2 1.5B's widest
}
MARKED = (4096, 8960, 11008, 14336)
LOAD, SCALE, WEIGHTS_OF_A_LOAD = "LDG.E.EF.128", "LDG.E.U16.CONSTANT", 32
MULTIPROCESSORS = 132  # of an H100; smaller devices have more blocks to each
WARPS, REGISTERS = 48, 65536  # of a multiprocessor of sm_89; those of sm_80 and sm_90 have 64 warps
IN_FLIGHT = 16 * 1024
BOTH = ("false", "true")


def test_rows_of_numbers_that_loads_of_16_bytes_do_not_meet_are_left_to_others() -> None:
    """Packed rows are filled up to whole groups, plain ones are not: one of 1028 numbers begins in mid-load."""
    assert [cuda_rows.instance("16, 0, false of float16", 256, columns, 8) is None for columns in (1028, 1032)] == [
        True,
        False,
    ]


@pytest.mark.slow
def test_no_format_spills_registers_or_converts_from_integer(tmp_path: Path) -> None:
    names = ("q4f16_0", "q4bf16_1", "q4f32_1", "q3f16_1", "q3f16_0", "q8f16_1", "q8f32_1", "q0f16", "q0bf16")
    instances = {}
    for name in names:
        quantization = load(ROOT).quantizations[name]
        form = cuda_rows.format_of(quantization.weights, quantization.model_dtype)[cuda_rows.FORMAT]
        for most in cuda_rows.COUNTS:
            for columns in (1000, 4096):
                one = cuda_rows.instance(form, 1024, columns, most)
                if one is None:
                    assert most > 8 and "f32" in name, (name, columns)
                    continue
                instances[f"{name}_{most}_{columns}"] = one
                around = most == 1, "true" not in form  # a norm, and a gate, whose rows lie apart in KN
                fused = cuda_rows.fused(form, 1024, columns, most, *around) if columns == 4096 and any(around) else None
                instances |= {f"{name}_{most}_fused": fused} if fused is not None else {}
    assert sum("fused" in name for name in instances) == 17
    found = sass.kernels(source(instances), "sm_80", tmp_path)
    assert {name for name, kernel in found.items() if kernel.spilled or kernel.counted()["I2F"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90"])
def test_products_of_few_rows(architecture: str, tmp_path: Path) -> None:
    """And those with a gate behind them and, of one row, a norm before, which hidden sizes have."""
    shapes = sorted({shape for group in SHAPES.values() for shape in group})
    chosen = {(*shape, most, "plain"): cuda_rows.instance(FORM, *shape, most) for shape in shapes for most in (1, 8)}
    for shape in shapes:
        chosen[*shape, 8, "gate"] = cuda_rows.fused(FORM, *shape, 8, False, True)
        if shape[1] <= 8192:
            chosen |= {(*shape, 1, f"norm, {of}"): cuda_rows.fused(FORM, *shape, 1, True, of) for of in (False, True)}
    names = {one: f"k{number}" for number, one in enumerate(dict.fromkeys(filter(None, chosen.values())))}
    found = sass.kernels(source({name: one for one, name in names.items()}), architecture, tmp_path)
    for where, one in chosen.items():
        assert one is not None
        kernel, (rows, columns) = found[names[one]], where[:2]
        warps, ahead, loads = one.threads // 32, one.ahead, one.rows // 8  # a lane's loads in each step
        steps = math.ceil(columns / WEIGHTS_OF_A_LOAD / 4 / warps)  # of a warp
        assert kernel.spilled == 0 and kernel.counted()["I2F"] == 0, where
        if columns in MARKED:
            weights = steps * loads * WEIGHTS_OF_A_LOAD
            assert kernel.executed(max(1, steps / ahead)) / weights <= 3.3, where
        # A step's loads are there before anything is computed, and are repeated by nothing but the loop: once each.
        assert kernel.before("HMMA", LOAD) == ahead * loads, where
        assert sum(name == LOAD for name in kernel.instructions) == (ahead + min(ahead, steps - ahead)) * loads, where
        blocks = math.ceil(rows / one.rows)
        fit = min(WARPS // warps, REGISTERS // (one.threads * math.ceil(kernel.registers / 8) * 8))
        in_flight = min(blocks / MULTIPROCESSORS, fit) * warps * ahead * loads * 32 * 16
        assert in_flight >= min(IN_FLIGHT, rows * columns / 2 / MULTIPROCESSORS), where


TOUCHING = ("LD.", "LDG", "ST.", "STG", "ATOM", "RED", "SUATOM", "UBLKCP", "CCTL")  # memory of the device


@pytest.mark.slow
def test_kernels_that_begin_early_touch_nothing_but_weights_before_those_before_have_ended(tmp_path: Path) -> None:
    """Every kernel of a library is launched so and waits once, before it touches memory; a product of few rows then has
    its first words and scales on their way. What kernels write is not read by way of the cache of constants."""
    target = load(ROOT).targets["cuda-sm_90"]
    lowered = lower(shape_1b.structure(), shape_1b.quantization("q4f16_1"), "q4f16_1", target.device)
    launched = {gv.name_hint for gv, f in lowered.functions_items() if "tirx.kernel_launch_params" in (f.attrs or {})}
    code = sources.complete(device_code.library_source(lowered, target.device), early=True)
    with pytest.raises(MlcBuildError, match="architectures: sm_80, sm_89 cannot begin a kernel before"):
        cuda.compile_source(code, cuda.toolkit(), ("sm_80", "sm_89", "sm_90"), tmp_path)
    found, early = sass.kernels(code, "sm_90", tmp_path), 0
    for name, kernel in found.items():
        assert name.rpartition("_kernel")[0] in launched, name
        counted = kernel.counted()
        assert counted["ACQBULK"] == counted["PREEXIT"] == 1, name
        place = kernel.instructions.index("ACQBULK")
        before = {each for each in kernel.instructions[:place] if each.startswith(TOUCHING)}
        assert before in ({LOAD, SCALE}, set()), (name, before)
        assert {each for each in kernel.instructions if "CONSTANT" in each} <= {SCALE}, name
        early += bool(before)
    assert len(found) > 60 and early > 15


# Cycles that a quarter of a multiprocessor's tensor cores takes for mma.m16n8k16, 2,048 products: 256 products a cycle
# by NVIDIA's A100 whitepaper (peak rates), half as many on Ada by its whitepaper, a quarter on its GeForce cards.
CYCLES = {"sm_80": 8, "sm_89": 16}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CYCLES)
def test_products_of_many_rows(architecture: str, tmp_path: Path) -> None:
    """In the loop, tensor cores are busy for twice as long as all instructions take to be issued."""
    forms = {"q4f16_1": FORM, "q4f16_0": "4, 32, true of float16", "q8f16_1": "8, 32, false of float16"}
    forms["q0f16"] = "16, 0, false of float16"
    shapes = {"q4f16_1": [(22016, 4096), (4096, 11008), (1536, 8960)]}
    chosen = {
        f"{name}_{columns}": cuda_many.instance(form, rows, columns, narrow=False)
        for name, form in forms.items()
        for rows, columns in shapes.get(name, [(22016, 4096)])
    }
    small = cuda_many.instance(FORM, 4096, 4096, narrow=True)
    assert small is not None and small.height == small.width == 64 and small.along == 2
    found = sass.kernels(source_of_many({name: one for name, one in chosen.items() if one}), architecture, tmp_path)
    assert len(found) == len(chosen)
    for name, kernel in found.items():
        begin, end = kernel.loop
        loop = kernel.instructions[begin:end]
        products = sum(each.startswith("HMMA.16816.F32") for each in loop)
        assert products == 64 and any(each.startswith("LDGSTS") for each in loop), name
        assert not any(each.startswith("I2F") for each in loop) and kernel.spilled == 0, name
        assert len(loop) <= 0.5 * products * CYCLES[architecture], (name, len(loop))
        assert 2 * math.ceil(kernel.registers / 8) * 8 * 128 <= REGISTERS, name  # two blocks to a multiprocessor


@pytest.mark.slow
def test_products_of_many_rows_spill_nothing_in_any_format(tmp_path: Path) -> None:
    columns = {f"{bits}, {group}, {across}": 1000 for bits, group in ((4, 32), (3, 40), (8, 32)) for across in BOTH}
    columns |= {"16, 0, false": 1032, "4, 48, false": 1056}
    instances = {}
    for number, (form, width) in enumerate(columns.items()):
        for narrow in (True, False):
            one = cuda_many.instance(f"{form} of float16", 1024, width, narrow)
            assert one is not None
            instances[f"k{number}_{narrow}"] = one
    found = sass.kernels(source_of_many(instances), "sm_80", tmp_path)
    assert {name for name, kernel in found.items() if kernel.spilled or kernel.counted()["I2F"]} == set()


@pytest.mark.slow
def test_products_with_experts_are_those_of_many_rows(tmp_path: Path) -> None:
    """Rows of activations that lie where a list says cost the loop nothing: sums stay in registers."""
    shapes = {
        "gate_up": ("q4f16_1", 1536, 2048, False),
        "down": ("q4f16_1", 2048, 768, True),
        "odd": ("q4f16_1", 72, 1000, False),
        **{name: (name, 1536, 2048, False) for name in ("q3f16_1", "q8f16_1", "q0f16")},
    }
    found = sass.kernels(source_of_experts(shapes), "sm_80", tmp_path)
    assert len(found) == 2 * len(shapes) - 1  # 3 bits have one size of blocks
    for name, kernel in found.items():
        begin, end = kernel.loop
        loop = kernel.instructions[begin:end]
        products = sum(each.startswith("HMMA.16816.F32") for each in loop)
        assert products >= 32 and any(each.startswith("LDGSTS") for each in loop), name
        assert kernel.spilled == 0 and not kernel.counted().keys() & {"I2F", "LDL", "STL"}, name
        assert len(loop) <= (0.5 if products == 64 else 0.8) * products * CYCLES["sm_80"], (name, len(loop))
        assert 2 * math.ceil(kernel.registers / 8) * 8 * 128 <= REGISTERS, name
