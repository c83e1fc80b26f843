"""Products on the emulated CUDA device: the functions of our own (compiler/gpu/kernels), against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.emulation.worker import Worker

pytestmark = pytest.mark.slow
# Largest error over the deviation of a row's sums: weights rounded to the model dtype, as MLC's kernels have them.
BOUNDS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
CASES = [
    {"quantization": "q4f16_1", "rows": 50, "columns": 4096},
    {"quantization": "q4f16_1", "rows": 37, "columns": 11008},  # steps that warps do not share out evenly
    {"quantization": "q4f16_1", "rows": 32, "columns": 96, "symbolic": True},
    {"quantization": "q4f16_1", "rows": 16, "columns": 1000},  # a partial last group
    {"quantization": "q4f16_1", "rows": 17, "columns": 640, "changes": {"group_size": 16}},
    {"quantization": "q4f16_1", "rows": 17, "columns": 640, "changes": {"group_size": 128}},
    {"quantization": "q4f16_1", "rows": 131, "columns": 480, "changes": {"group_size": 48}},  # in mid-step
    {"quantization": "q4f16_1", "rows": 17000, "columns": 40},
    {"quantization": "q8f16_1", "rows": 140, "columns": 96, "changes": {"group_size": 4}},
    {"quantization": "q4bf16_1", "rows": 33, "columns": 2080},
    {"quantization": "q4f32_1", "rows": 33, "columns": 2080},
    {"quantization": "q4f32_1", "rows": 16, "columns": 1000},
    {"quantization": "q4f16_0", "rows": 76, "columns": 1056},
    {"quantization": "q3f16_1", "rows": 20, "columns": 1024},
    {"quantization": "q3f16_0", "rows": 20, "columns": 1024},
    {"quantization": "q8f16_1", "rows": 20, "columns": 1056},
    {"quantization": "q8f16_1", "rows": 9000, "columns": 64},  # two tiles of eight rows of x
    {"quantization": "q8f32_1", "rows": 20, "columns": 1056},
    {"quantization": "q0f16", "rows": 20, "columns": 1032},
    {"quantization": "q0bf16", "rows": 20, "columns": 1032},
]
FUSED = [
    {"quantization": "q4f16_1", "rows": 50, "columns": 4096, "around": ["norm", "gate"]},
    {"quantization": "q4f16_1", "rows": 36, "columns": 1000, "around": ["norm", "gate"]},  # a partial last group
    {"quantization": "q4f16_1", "rows": 24, "columns": 96, "around": ["gate"]},
    {"quantization": "q4bf16_1", "rows": 34, "columns": 2080, "around": ["norm", "gate"]},
    {"quantization": "q4f16_0", "rows": 76, "columns": 1056, "around": ["norm"]},
    {"quantization": "q3f16_1", "rows": 20, "columns": 1024, "around": ["norm", "gate"]},
    {"quantization": "q8f16_1", "rows": 9000, "columns": 64, "around": ["norm", "gate"]},  # two tiles of eight rows
    {"quantization": "q0f16", "rows": 20, "columns": 1032, "around": ["norm", "gate"]},
]

# By the kernels: those of the plan, of a few tokens, of small blocks and of large ones.
EXPERTS = [("q4f16_1", 200, 96, 5), ("q8f16_1", 50, 1000, 5), ("q3f16_1", 50, 80, 4), ("q4f32_1", 70, 96, 4)]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("products"))
    yield worker
    worker.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_products(case: dict[str, Any], worker: Worker) -> None:
    answer = worker.ask({"product": case})
    name = case["quantization"]
    bound = BOUNDS["bfloat16" if "bf16" in name else "float32" if "f32" in name else "float16"]
    assert answer["notes"] == {}
    assert {n: error for n, error in answer["errors"].items() if not error < bound} == {}
    # 3 bits have one kernel for more than 32 rows of x; of a large matrix, the small blocks end at 64.
    assert answer["kernels"] == (2 if "f32" in name else 4 if "q3" in name else 5)


@pytest.mark.parametrize(("name", "rows", "columns", "kernels"), EXPERTS)
def test_products_with_experts(name: str, rows: int, columns: int, kernels: int, worker: Worker) -> None:
    """How many tokens there are decides at run time which kernel runs."""
    answer = worker.ask({"experts": {"quantization": name, "rows": rows, "columns": columns}})
    assert answer["notes"] == {}
    bound = 2 * BOUNDS["float32" if "f32" in name else "float16"]  # results are rounded, too
    assert {n: error for n, error in answer["errors"].items() if not error < bound} == {}
    assert answer["kernels"] == kernels


@pytest.mark.parametrize("case", FUSED, ids=lambda case: "-".join(map(str, case.values())))
def test_products_with_norms_and_gates(case: dict[str, Any], worker: Worker) -> None:
    answer = worker.ask({"product": case})
    bound = BOUNDS["bfloat16" if "bf16" in case["quantization"] else "float16"]
    assert answer["notes"] == {}
    assert {n: error for n, error in answer["errors"].items() if not error < bound} == {}
    # A norm has a kernel of its own for more than one row, a gate for more than 32.
    assert answer["kernels"] == 5 - ("q3" in case["quantization"]) + len(case["around"])
