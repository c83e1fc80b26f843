"""Every architecture against an independent model, on every position: prefill in chunks, then token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlcbuild.models.architecture import choose, model_config, resolve
from tests.architectures import attention_cases, cases, family_cases, hybrid_cases, indexer_cases, sink_cases
from tests.architectures.agreement import ARCHITECTURES, IDS, Agreement, config_of, error, known_architectures
from tests.support import llama

CASES = {**cases.CASES, **attention_cases.CASES, **family_cases.CASES, **hybrid_cases.CASES, **sink_cases.CASES}
CASES |= indexer_cases.CASES
QUICK = {("llama", "q0f32"), ("gemma", "q4f32_1")}  # the others take minutes together
# Compiled as the product does, which takes four times as long: what LLVM has to do differs by kind of layer only.
OPTIMISED = {
    *("llama", "gemma2", "gpt2", "bloom", "mixtral", "deepseek_v3", "gpt_oss", "gemma3n_text", "llama4_text", "lfm2"),
    *("rwkv", "rwkv6", "mamba", "mamba2", "xlstm", "jamba", "qwen3_next", "kimi_linear", "recurrent_gemma", "minimax"),
}


def _cases() -> list[object]:
    every = [(name, quantization) for name, case in CASES.items() for quantization in case.quantizations]
    return [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow, id="-".join(each)) for each in every]


@pytest.mark.parametrize(("name", "quantization"), _cases())
def test_logits_agree(name: str, quantization: str, tmp_path: Path) -> None:
    optimised = name in OPTIMISED and quantization == CASES[name].quantizations[-1]
    build = llama.build_optimised if optimised else llama.build_library
    agreement = Agreement(CASES[name], quantization, tmp_path, build)
    expected = agreement.expected(IDS)
    bound = (2e-5 if quantization == "q0f32" else 1e-4) * CASES[name].noise
    session = agreement.session()
    for length in (1, 7, 33, len(IDS)):  # the last two are longer than a chunk
        sequence = session.add()
        prefilled = np.concatenate(list(session.all_logits(sequence, IDS[:length])))
        assert error(prefilled, expected[:length]) < bound
        session.remove(sequence)
    sequence = session.add()
    decoded = [session.prefill(sequence, IDS[:7]), *(session.decode(sequence, token) for token in IDS[7:])]
    assert error(np.stack(decoded), expected[6:]) < bound


def test_every_architecture_has_a_case() -> None:
    """Encoders, and decoders that give vectors, have theirs in test_encoder.py."""
    known = {name: each.data for name, each in known_architectures().items() if "embedding" not in each.data}
    decoders = {name for name, data in known.items() if data.get("kind", "decoder") in ("decoder", "hybrid")}
    assert {case.architecture for case in CASES.values()} >= decoders | {
        "rwkv",
        "rwkv5",
        "rwkv6",
        "mamba",
        "falcon_mamba",
        "mamba2",
        "xlstm",
    }


@pytest.mark.parametrize("name", CASES)
def test_a_config_of_transformers_4_means_the_same(name: str, tmp_path: Path) -> None:
    """The case says `rope_theta`; transformers 5 writes `rope_parameters`, and everything that was left out."""
    case = CASES[name]
    chosen = choose(known_architectures(), config_of(case), None if "text_config" in case.config else case.architecture)
    whole = resolve(chosen, config_of(case), {})
    short = {key: value for key, value in config_of(case).items() if key != "rope_parameters"}
    older = {"rope_theta": whole.rope_theta, "torch_dtype": "float16", **short, **case.config}
    if "text_config" in case.config:
        older["text_config"] = {**short["text_config"], **case.config["text_config"]}
    assert resolve(chosen, older, {}) == whole
    assert set(model_config(chosen, whole, older)) >= {"vocab_size", "context_window_size", "prefill_chunk_size"}


def test_a_file_is_short() -> None:
    assert {path.name for path in ARCHITECTURES.glob("*.yaml") if len(path.read_text().splitlines()) >= 60} == set()
