"""What engines ask a library for by name (engine_names.yaml): each kind of library has it, or need not have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlcbuild.compiler.cpu import lower as cpu
from mlcbuild.compiler.gpu import lower as gpu
from mlcbuild.models.architecture import resolve
from mlcbuild.models.structure import Structure
from mlcbuild.recipes.load import load
from tests.architectures import hybrid_cases
from tests.architectures.agreement import config_of
from tests.architectures.cases import CASES
from tests.docs.pages import DOCS, code, table
from tests.support import llama

ROOT = Path(__file__).parents[2]
DATA: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("engine_names.yaml").read_text())
LIBRARIES = (
    "decoder-cpu",
    "decoder-cuda",
    "decoder-webgpu",
    "recurrent-cpu",
    "hybrid-cpu",
    "hybrid-cuda",
    "embedding-cpu",
    "encoder-cpu",
)
ENCODER = {
    **{"model_type": "bert", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 2, "hidden_act": "gelu"},
    **{"layer_norm_eps": 1e-12, "position_embedding_type": "absolute"},
}


def structure_of(kind: str) -> Structure:
    if kind == "encoder":
        return resolve(llama.architecture("bert"), ENCODER, {})
    cases = {**CASES, **hybrid_cases.CASES}
    case = cases[{"decoder": "llama", "recurrent": "rwkv6", "hybrid": "lfm2", "embedding": "qwen3"}[kind]]
    sizes = {"decoder": {"head_dim": 32}, "hybrid": {"hidden_size": 128}}.get(kind, {})
    name = "qwen3-embedding" if kind == "embedding" else case.architecture
    return resolve(llama.architecture(name), {**config_of(case), **sizes}, {"context_window_size": 64})


def functions(library: str) -> set[str]:
    """The names under which a runtime finds the functions of a library."""
    kind, target = library.split("-")
    lower = cpu.lower if target == "cpu" else gpu.lower
    device = load(ROOT).targets[target].device
    module = lower(structure_of(kind), llama.QUANTIZATIONS["q4f16_1"], "q4f16_1", device)
    return {str(f.attrs["global_symbol"]) for f in module.functions.values() if f.attrs and "global_symbol" in f.attrs}


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_name_is_there_or_known_not_to_be_needed(library: str) -> None:
    asked = {name for names in DATA["names"].values() for name in names}
    if library in DATA["only"]:
        assert asked & functions(library) == set(DATA["only"][library]["names"])
        return
    absent = {name for each in DATA["absent"] if library in each["libraries"] for name in each["names"]}
    assert absent <= asked
    assert asked - functions(library) == absent


def test_the_page_has_the_reasons() -> None:
    described = {tuple(code(row[0])): row[1] for row in table((DOCS / "contract.md").read_text(), "name", "why not")}
    expected: dict[tuple[str, ...], str] = {}
    for each in DATA["absent"]:
        expected[tuple(each["names"])] = each["why"]
    assert described == expected
