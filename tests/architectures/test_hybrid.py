"""A hybrid's two states: sequences side by side, forked and taken back together, and what the contract says of them."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import pytest

from mlcbuild.compiler.assemble import declare
from mlcbuild.errors import MlcBuildError
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import count, parameters
from mlcbuild.models.structure import from_json
from tests.architectures.agreement import CHUNK, IDS, Agreement, config_of, error, known_architectures
from tests.architectures.hybrid_cases import CASES
from tests.support import llama

OTHER = IDS[5:20]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    """A library for two sequences; the second of four layers has keys and values in the cache."""
    return Agreement(CASES["lfm2"], "q0f32", tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def convolved(tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    """One whose layers all have both, keys and values in the cache and a state."""
    return Agreement(CASES["zaya-sliding"], "q0f32", tmp_path_factory.mktemp("convolved"))


@pytest.mark.parametrize("library", ["built", "convolved"])
@pytest.mark.slow
def test_sequences_do_not_mix_and_are_forked_and_taken_back(
    library: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a longer history than our sessions ask for, as MLC's engine does."""
    built: Agreement = request.getfixturevalue(library)
    monkeypatch.setattr("mlcbuild.runtime.session._HISTORY", 4)
    one, other = built.expected(IDS), built.expected(OTHER)
    session = built.session(2)
    a, b = session.add(), session.add()
    logits = session.batch_prefill([a, b], [IDS[: CHUNK + 5], OTHER[:4]])
    assert error(logits, np.stack([one[CHUNK + 4], other[3]])) < 2e-5
    for i in range(4):
        logits = session.batch_decode([b, a], [OTHER[4 + i], IDS[CHUNK + 5 + i]])
        assert error(logits, np.stack([other[4 + i], one[CHUNK + 5 + i]])) < 2e-5
    session.remove(b)
    at = session.lengths[a]
    for token in OTHER[:3]:
        session.decode(a, token)
    session._state("popn", a, 3)
    session.lengths[a] = at
    session._state("fork_sequence", a, 7, -1)
    session.lengths[7] = at
    assert error(session.decode(7, OTHER[0]), built.expected([*IDS[:at], OTHER[0]])[-1]) < 2e-5
    assert error(session.decode(a, IDS[at]), one[at]) < 2e-5
    assert session.truncate(a, at) == 0  # its beginning does not come back: the caller reads it again
    assert error(session.prefill(a, OTHER), other[-1]) < 2e-5


def test_layers_share_matrices() -> None:
    """Three layers with attention, two blocks: the first and the third have one, with differences of their own."""
    structure = resolve(known_architectures()["zamba2"], config_of(CASES["zamba2"]), {})
    wanted = parameters(structure)
    users = {each.name: (each.layer, *each.users) for each in wanted if each.role in ("q_proj", "q_adapter_a_proj")}
    assert [*users.values()] == [(1, 3), (1,), (2,), (2,), (3,)] and len({each.name for each in wanted}) == len(wanted)
    assert count(structure) == sum(prod(each.shape) for each in wanted)
    assert count(from_json(json.loads(json.dumps(structure.to_json())))) == count(structure)


@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "granitemoehybrid", "jamba", "nemotron_h", "zamba", "zamba2"])
def test_what_a_scan_computes_with_is_float32_in_16_bits(name: str) -> None:
    declared = declare(resolve(known_architectures()[name], config_of(CASES[name]), {}), llama.QUANTIZATIONS["q4f16_1"])
    of_scans = ("convolution", "convolution_bias", "step_bias", "state_rate", "state_skip")
    assert {each.dtype for each in declared if each.role in of_scans} == {"float32"}


def test_the_contract_is_mlcs(built: Agreement) -> None:
    """As its qwen35_model.py has it: the cache counts layers with attention only."""
    library = built.network.library
    metadata = json.loads(str(library["_metadata"]()))
    assert metadata["kv_state_kind"] == "hybrid" and metadata["kv_cache"]["num_hidden_layers"] == 1
    for name in ("embed", "batch_prefill", "batch_decode", "batch_verify", "create_tir_paged_kv_cache"):
        assert library.has(name), name
    assert library.has("create_rnn_state")


def test_a_session_does_not_fork_its_state(built: Agreement) -> None:
    session = built.session(2)
    a = session.add()
    session.prefill(a, OTHER)
    with pytest.raises(MlcBuildError, match="sequences do not fork here: a recurrent state has no beginning; read the"):
        session.fork(a, 3)
