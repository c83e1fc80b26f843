"""A recurrent state: sequences side by side and one after the other, and what the contract says of its libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.compiler.assemble import declare
from mlcbuild.compiler.cpu.lower import lower
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.runtime.model import Model
from tests.architectures.agreement import (
    CHUNK,
    IDS,
    Agreement,
    config_of,
    error,
    known_architectures,
    save,
    structure_of,
)
from tests.architectures.cases import CASES
from tests.support import llama
from tests.support.llama import Array

OTHER = IDS[5:20]


@pytest.fixture(scope="module", params=["rwkv5", "mamba2"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Agreement, Array, Array]:
    """A library for two sequences, and what its reference says of two texts."""
    agreement = Agreement(CASES[request.param], "q0f32", tmp_path_factory.mktemp("recurrent"))
    return agreement, agreement.expected(IDS), agreement.expected(OTHER)


def test_sequences_do_not_mix(built: tuple[Agreement, Array, Array]) -> None:
    agreement, one, other = built
    session = agreement.session(2)
    a, b = session.add(), session.add()
    # One is longer than a chunk: it goes in as several, and neither shares a call with the other.
    logits = session.batch_prefill([a, b], [IDS[: CHUNK + 5], OTHER[:4]])
    assert error(logits, np.stack([one[CHUNK + 4], other[3]])) < 1e-4
    for i in range(6):
        logits = session.batch_decode([b, a], [OTHER[4 + i], IDS[CHUNK + 5 + i]])
        assert error(logits, np.stack([other[4 + i], one[CHUNK + 5 + i]])) < 1e-4


def test_a_new_sequence_begins_with_nothing(built: tuple[Agreement, Array, Array]) -> None:
    agreement, _, other = built
    session = agreement.session(1)
    first = session.add()
    session.prefill(first, IDS)
    session.remove(first)
    assert error(session.prefill(session.add(), OTHER), other[-1]) < 1e-4


def test_steps_are_taken_back_and_sequences_fork(
    built: tuple[Agreement, Array, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a longer history than our sessions ask for, as MLC's engine does."""
    agreement, one, _ = built
    monkeypatch.setattr("mlcbuild.runtime.session._HISTORY", 4)
    session = agreement.session(2)
    first = session.add()
    session.prefill(first, IDS[:30])
    for token in OTHER[:3]:
        session.decode(first, token)
    session._state("popn", first, 3)
    assert error(session.decode(first, IDS[30]), one[30]) < 1e-4
    session._state("fork_sequence", first, 7, -1)
    session.lengths[7] = session.lengths[first]
    session.decode(first, OTHER[0])
    assert error(session.decode(7, IDS[31]), one[31]) < 1e-4


def test_a_text_may_be_longer_than_any_window(built: tuple[Agreement, Array, Array]) -> None:
    agreement = built[0]
    model = Model(agreement.network, {})
    ids = [int(i) for i in np.random.default_rng(2).integers(3, 90, 150)]
    assert error(model.logits(ids), agreement.expected(ids)) < 1e-4
    assert agreement.session().limit == -1


def test_the_contract_is_mlcs(built: tuple[Agreement, Array, Array]) -> None:
    library = built[0].network.library
    metadata = json.loads(str(library["_metadata"]()))
    assert metadata["model_type"] == built[0].case.architecture and metadata["kv_state_kind"] == "rnn_state"
    assert metadata["context_window_size"] == -1 and "kv_cache" not in metadata
    for name in ("embed", "prefill", "decode", "batch_prefill", "batch_decode", "batch_verify", "create_rnn_state"):
        assert library.has(name), name
    assert library.has("softmax_with_temperature") and not library.has("create_tir_paged_kv_cache")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"state_size": 257}, "state_size is 257: the CPU kernels keep up to 256 values"),
        ({"conv_kernel": 33}, "conv_kernel is 33: the CPU kernels take up to 32 tokens"),
    ],
)
def test_what_the_kernels_cannot_keep_is_refused(changes: dict[str, int], problem: str) -> None:
    structure = resolve(known_architectures()["mamba2"], {**config_of(CASES["mamba2"]), **changes}, {})
    with pytest.raises(MlcBuildError, match=problem):
        lower(structure, llama.QUANTIZATIONS["q0f32"], "mamba2", llama.CPU.device)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("rwkv", ["time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance",
                  "key.weight", "value.weight", "receptance.weight", "output.weight"]),
        ("rwkv5", ["time_decay", "time_faaaa", "time_mix_gate", "time_mix_key", "time_mix_value", "time_mix_receptance",
                   "key.weight", "value.weight", "receptance.weight", "gate.weight", "output.weight",
                   "ln_x.weight", "ln_x.bias"]),
        ("rwkv6", ["time_maa_x", "time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g", "time_maa_w1",
                   "time_maa_w2", "time_decay_w1", "time_decay_w2", "time_decay", "time_faaaa", "key.weight",
                   "value.weight", "receptance.weight", "gate.weight", "output.weight", "ln_x.weight", "ln_x.bias"]),
    ],
)  # fmt: skip
def test_parameters_have_mlcs_names_order_and_dtypes(name: str, attention: list[str], tmp_path: Path) -> None:
    """As rwkv5_model.py and rwkv6_model.py of MLC LLM declare them; what they keep in float32 is float32 in 16 bits."""
    save(CASES[name], tmp_path)
    structure = structure_of(CASES[name], tmp_path)
    names = [parameter.name for parameter in parameters(structure)]
    assert names[:3] == ["model.embeddings.weight", "model.blocks.0.pre_ln.weight", "model.blocks.0.pre_ln.bias"]
    assert names[-3:] == ["model.ln_out.weight", "model.ln_out.bias", "head.weight"]
    second = [name.removeprefix("model.blocks.1.") for name in names if name.startswith("model.blocks.1.")]
    assert second[:4] == ["ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"]
    assert [each.removeprefix("attention.") for each in second if each.startswith("attention.")] == attention
    dtypes = {
        p.name.removeprefix("model.blocks.1."): p.dtype for p in declare(structure, llama.QUANTIZATIONS["q4f16_1"])
    }
    kept = {"time_decay", "time_first", "time_faaaa", "ln_x.weight", "ln_x.bias"}
    assert {each for each in attention if dtypes.get(f"attention.{each}") == "float32"} == kept & set(attention)
    assert dtypes["attention.key.q_weight"] == "uint32" and dtypes["head.q_scale"] == "float16"


@pytest.mark.parametrize(
    ("name", "step_bias"), [("mamba", "dt_proj.bias"), ("falcon_mamba", "dt_proj.bias"), ("mamba2", "dt_bias")]
)
def test_what_a_scan_computes_with_is_float32_in_16_bits(name: str, step_bias: str) -> None:
    structure = resolve(known_architectures()[name], config_of(CASES[name]), {})
    declared = declare(structure, llama.QUANTIZATIONS["q4f16_1"])
    kept = {p.name.removeprefix("backbone.layers.0.mixer.") for p in declared if p.layer == 0 and p.dtype == "float32"}
    assert kept == {"conv1d.weight", "conv1d.bias", "A_log", "D", step_bias}
    packed = {p.name.split(".")[-2] for p in declared if p.layer == 0 and p.part == "q_weight"}
    assert packed == {"in_proj", "out_proj", *({"x_proj", "dt_proj"} if name != "mamba2" else ())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("rwkv5", {"rescale_every": 0}),
        ("rwkv5", {"group_norm_eps": 1e-5}),
        ("rwkv6", {"norm_eps": 1e-2}),
        ("rwkv", {"rescale_every": 1}),
    ],
    ids=str,
)
def test_without_it_they_do_not_agree(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    agreement = Agreement(CASES[name], "q0f32", tmp_path, **changes)
    found = np.concatenate(list((session := agreement.session()).all_logits(session.add(), IDS)))
    assert error(found, agreement.expected(IDS)) > 1e-3
