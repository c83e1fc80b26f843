"""Drafted tokens checked on GPUs, against the algorithm written down in NumPy. WGSL does not have it."""

from __future__ import annotations

import numpy as np
import pytest

from mlcbuild.compiler.gpu import drafts
from tests.support.gpus import DEVICES, Gpu
from tests.support.llama import Array

pytestmark = pytest.mark.slow

NODES, WIDTH = 14, 700
ROOTS = np.array([0, 7], np.int32)
# Twice the same tree: the root's children are 1, 2 and 3, those of 1 are 4 and 5, that of 3 is 6.
FIRST_CHILD = np.array([1, 4, -1, 6, -1, -1, -1, 8, 11, -1, 13, -1, -1, -1], np.int32)
NEXT_SIBLING = np.array([-1, 2, 3, -1, 5, -1, -1, -1, 9, 10, -1, 12, -1, -1], np.int32)


def probabilities(random: np.random.Generator, rows: int) -> Array:
    p = np.exp(2 * random.standard_normal((rows, WIDTH)))
    normed: Array = (p / p.sum(1, keepdims=True)).astype(np.float32)
    return normed


def walk(root: int, drafted: Array, tokens: Array, model: Array, uniform: Array) -> int:
    """Leviathan et al.: the last accepted node; what the model has left of a refused one is in `model` afterwards."""
    at, child = root, int(FIRST_CHILD[root])
    while child >= 0:
        token = tokens[child]
        rest = np.maximum(model[at] - drafted[child], 0)
        if model[at, token] >= uniform[child] * drafted[child, token] or rest.sum() < 1e-7:
            at, child = child, int(FIRST_CHILD[child])
        else:
            model[at] = rest / rest.sum()
            child = int(NEXT_SIBLING[child])
    return at


@pytest.mark.parametrize("gpu", [gpu for gpu in DEVICES if gpu.name != "wgsl"], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("seed", range(6))
def test_the_last_accepted_node_and_what_is_left(gpu: Gpu, seed: int) -> None:
    random = np.random.default_rng(seed)
    drafted, model = probabilities(random, NODES), probabilities(random, NODES)
    tokens = random.integers(0, WIDTH, NODES).astype(np.int32)
    uniform = random.random(NODES).astype(np.float32)
    given = {
        **{"draft_probs": drafted, "draft_tokens": tokens, "model_probs": model, "first_child": FIRST_CHILD},
        **{"next_sibling": NEXT_SIBLING, "uniform": uniform, "parent": ROOTS},
    }
    (kernel,) = gpu.kernels(drafts.verify(256))
    got = kernel.run((len(ROOTS), 1, 1), given, {"nodes": NODES, "width": WIDTH, "trees": len(ROOTS)})
    left = model.astype(np.float64)
    expected = [walk(int(root), drafted, tokens, left, uniform) for root in ROOTS]
    assert got["parent"].tolist() == expected
    np.testing.assert_allclose(got["model_probs"], left, atol=1e-7, rtol=1e-4)
