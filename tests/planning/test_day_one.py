"""The stock matrix: every recipe is well formed, none is built unasked, and what can share a library does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlcbuild.engine.graph import Graph
from mlcbuild.planning.planner import plan
from mlcbuild.recipes.load import load
from mlcbuild.recipes.types import Catalog, Locked, LockedFile, Model

ROOT = Path(__file__).parents[2]

# config.json of Llama 2 (7B), as its derivatives have it but for the vocabulary and the trained length.
LLAMA_2 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-chat-hf": {},
    "lmsys/vicuna-7b-v1.5": {},
    "georgesung/llama2_7b_chat_uncensored": {"max_position_embeddings": 2048},
    "WizardLM/WizardMath-7B-V1.0": {"vocab_size": 32001, "max_position_embeddings": 2048},
    "lmsys/vicuna-7b-delta-v1.1": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "gorilla-llm/gorilla-7b-hf-delta-v0": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "huggyllama/llama-7b": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load(ROOT)


@pytest.fixture(scope="module")
def graph(catalog: Catalog) -> Graph:
    files = {"config.json": LockedFile("0" * 64, 600), "model.safetensors": LockedFile("1" * 64, 13_000_000_000)}

    def lock(model: Model) -> Locked | None:
        assert model.source.hf is not None
        changes = CONFIGS.get(model.source.hf)
        return None if changes is None else Locked("c" * 40, {**LLAMA_2, **changes}, files)

    return plan(catalog, catalog.recipes.values(), lock)


def test_a_bare_build_downloads_nothing(catalog: Catalog) -> None:
    on_hubs = {name for name, recipe in catalog.recipes.items() if recipe.model.source.hf is not None}
    assert {name for name, recipe in catalog.recipes.items() if recipe.manual} == on_hubs
    assert {recipe.model.name for name, recipe in catalog.recipes.items() if name not in on_hubs} == {"stories"}


def test_every_stock_model_is_in_a_matrix(catalog: Catalog) -> None:
    built = {recipe.model.name for recipe in catalog.recipes.values()}
    assert built == set(catalog.models)


def test_every_model_is_built_for_the_cpu(catalog: Catalog) -> None:
    assert {r.model.name for r in catalog.recipes.values() if r.target.name == "cpu"} == set(catalog.models)


def test_without_a_lock_nothing_is_wrong_and_nothing_known(graph: Graph) -> None:
    assert graph.broken == {}
    assert len(graph.unlocked) > 50


def library(graph: Graph, model: str, quantization: str = "q4f16_1") -> str:
    return graph.goals[f"{model}-{quantization}-cpu"].steps["library"]


def test_what_was_made_of_llama_2_shares_its_library(graph: Graph) -> None:
    models = ("llama-2-7b-chat", "vicuna-7b", "llama2-7b-chat-uncensored", "wizardmath-7b-v1.0")
    assert len({library(graph, model) for model in models}) == 1
    assert len({graph.goals[f"{model}-q4f16_1-cpu"].steps["quantize"] for model in models}) == 4


def test_what_was_made_of_llama_shares_another(graph: Graph) -> None:
    assert library(graph, "vicuna-7b-v1.1-delta") == library(graph, "gorilla-7b-v0")
    assert library(graph, "vicuna-7b-v1.1-delta") != library(graph, "vicuna-7b")
    base = graph.goals["gorilla-7b-v0-q4f16_1-cpu"].steps["base"]
    assert graph.steps[base].fields["repo"] == "huggyllama/llama-7b"
