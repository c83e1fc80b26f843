"""Text from a package: greedy as transformers writes it, repeatable draws, stops, chat, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cli.main import main
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import Model


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    import torch

    out = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=[0, 2],
        pad_token_id=0,
    )
    new: list[int] = out[0, len(ids) :].tolist()
    return new


@pytest.mark.parametrize("prompt", ["The sea was", "Zoë and", "5 € a"])
def test_greedy_text_is_transformers_text(tiny: Model, reference: Any, tokenizer: Any, prompt: str) -> None:
    theirs = greedy(reference, tokenizer.encode(prompt).ids, 30)
    assert tiny.generate(prompt, max_tokens=30) == tokenizer.decode(theirs)


def test_pieces_make_up_the_text(tiny: Model) -> None:
    pieces = list(tiny.stream("The sea", max_tokens=20))
    assert len(pieces) > 5 and "".join(pieces) == tiny.generate("The sea", max_tokens=20)


def test_two_streams_at_once(tiny: Model) -> None:
    """Each has its own cache."""
    prompts = ["The sea was", "Zoë and"]
    pairs = list(zip(*(tiny.stream(prompt, max_tokens=12) for prompt in prompts), strict=False))
    for side, prompt in enumerate(prompts):
        assert tiny.generate(prompt, max_tokens=12).startswith("".join(pair[side] for pair in pairs))


def test_a_seed_repeats_the_draws(tiny: Model) -> None:
    texts = [tiny.generate("The", max_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_token_ends_the_text(tiny: Model, reference: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode("The sea was").ids
    written = greedy(reference, ids, 10)
    at = next(i for i in range(1, 10) if written[i] not in written[:i])
    stopping = Model(tiny.network, {**tiny.config, "eos_token_id": [written[at]]}, tiny._tokenizer_folder)
    assert stopping.generate(ids, max_tokens=10) == tokenizer.decode(written[:at])


def test_a_stop_string_ends_the_text(tiny: Model) -> None:
    text = tiny.generate("The sea was", max_tokens=20)
    middle = text[6:9]
    assert tiny.generate("The sea was", max_tokens=20, stop=[middle]) == text[: text.index(middle)]


def test_the_context_ends_the_text(tiny: Model) -> None:
    """96 tokens at most; asking for more is no error, a longer prompt is."""
    prompt = [5] * 90
    assert tiny.generate(prompt, max_tokens=500) == tiny.generate(prompt, max_tokens=6)
    assert tiny.generate([5] * 96, max_tokens=5) == ""
    with pytest.raises(MlcBuildError, match="97 tokens do not fit into this library's context of 96"):
        tiny.generate([5] * 97)


def test_no_tokens_and_an_empty_prompt(tiny: Model) -> None:
    assert tiny.generate("The", max_tokens=0) == ""
    assert tiny.generate("", max_tokens=5) == tiny.generate([0], max_tokens=5)  # bos_token_id


def test_chat_renders_the_template(tiny: Model, tokenizer: Any) -> None:
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.chat_prompt("Hi") == tokenizer.encode(text).ids
    assert tiny.chat("Hi", max_tokens=8) == tiny.generate(text, max_tokens=8)


COMMAND = "import sys; from pathlib import Path; from mlcbuild.runtime.commands import generate; "


def test_the_command_writes_to_standard_output(tiny: Model, tiny_package: Path) -> None:
    """FAULTS G: and the speed, which it did not say, to the other one."""
    code = COMMAND + f"generate(Path({str(tiny_package)!r}), 'The sea was', max_tokens=12)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.decode() == tiny.generate("The sea was", max_tokens=12) + "\n"
    speed = r"prompt: \d+ tokens, \d+ tokens/s; text: 12 tokens, [\d.]+ tokens/s\n"
    assert re.fullmatch(speed, done.stderr.decode())


def test_the_command_samples_and_prints_json(
    tiny: Model, tiny_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--temperature", "1.5", "--top-k", "40", "--min-p", "0.01", "--presence-penalty", "0.5", "--seed", "3"]
    words = [str(tiny_package), "--prompt", "The sea", "--max-tokens", "9", *settings]
    assert main(["generate", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    sampling = {"temperature": 1.5, "top_k": 40, "min_p": 0.01, "presence_penalty": 0.5, "seed": 3}
    text = tiny.generate("The sea", max_tokens=9, **sampling)
    assert (said["text"], said["finish_reason"], said["completion_tokens"]) == (text, "length", 9)
    assert said["decode_tokens_per_second"] > 0 and said["prefill_tokens_per_second"] > 0
    assert main(["generate", *words, "--stop", text[3:6], "--stop", "never"]) == 0
    assert capsys.readouterr().out == text[: text.index(text[3:6])] + "\n"
    assert main(["generate", *words, "--top-p", "2"]) == 1
    assert "mlcbuild generate: top_p is 2.0: expected a number above 0" in capsys.readouterr().err


def test_the_command_ends_quietly_when_nobody_reads(tiny_package: Path) -> None:
    """`mlcbuild generate ... | head -1`"""
    code = COMMAND + f"generate(Path({str(tiny_package)!r}), 'The sea was', max_tokens=40)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
