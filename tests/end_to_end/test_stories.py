"""The shipped model: its package passes its own check, writes legible English, and agrees with transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mlcbuild
from mlcbuild.runtime import load
from tests.end_to_end.workspace import BIN, Workspace, make_workspace
from tests.support.llama import reference_logits
from tests.support.terminal import Terminal

pytestmark = pytest.mark.slow

PROJECT = Path(mlcbuild.__file__).parents[1]
STORIES = PROJECT / "recipes" / "models" / "stories"
GRAMMAR = PROJECT / "scripts" / "stories"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, tiny_checkpoint: Path) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("stories"), shared_cache, tiny_checkpoint)
    (workspace.root / "recipes/tiny-cpu.yaml").unlink()
    for quantization in ("q0f32", "q4f16_1"):
        workspace.recipe(f"stories-{quantization}", quantization, model="stories")
    workspace.doit("build")
    return workspace


def test_the_package_passes_with_room_to_spare(stories: Workspace) -> None:
    quality = json.loads((stories.root / "dist/stories-q4f16_1/quality.json").read_text())
    assert quality["status"] == "passed" and quality["gate"] == "fail" and quality["library_executed"]
    assert 0.001 < quality["kl"] < 0.05
    assert quality["tokens"] > 8000
    # What the model's card says it was measured to be, by torch.
    card = re.search(r"perplexity, each document by itself \| ([\d.]+)", (STORIES / "README.md").read_text())
    assert card is not None
    assert quality["reference_perplexity"] == pytest.approx(float(card.group(1)), rel=0.005)


def test_it_tells_a_story_and_answers(stories: Workspace) -> None:
    package = "dist/stories-q4f16_1"
    said = stories.run("mlcbuild", "generate", package, "--prompt", "Once upon a time", "--max-tokens", "120").stdout
    assert len(said.split()) > 60
    # The words of the grammar that wrote the training text: letters strung together would not be among them.
    grammar = "".join(path.read_text().lower() for path in sorted(GRAMMAR.rglob("*.*")) if path.suffix != ".pyc")
    vocabulary = set(re.findall(r"[a-z]+", grammar))
    words = re.findall(r"[a-z]+", said.lower())
    assert sum(word in vocabulary for word in words) / len(words) > 0.9, said
    chat = stories.run("mlcbuild", "generate", package, "--chat", "--prompt", "What do rabbits eat?").stdout
    assert "carrots" in chat


def test_a_conversation_on_a_terminal(stories: Workspace) -> None:
    """Typed into a terminal, with Ctrl-C while it writes or after it, an earlier line fetched back, and Ctrl-D."""
    environment = stories.environment({"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"})
    command = [str(BIN / "mlcbuild"), "chat", "dist/stories-q4f16_1", "--temperature", "0"]
    with Terminal(command, stories.root, environment) as terminal:
        terminal.expect("/help shows the commands(.|\n)*\n>")
        for typed, answered in (
            ("What do rabbits eat?\r", r"carrots(.|\n)*\[prompt: .* tokens/s\](.|\n)*\n>"),
            ("Tell me a story.\r", r"story\.\s+\w"),
            ("\x03", r"(stopped; |tokens/s\](.|\n)*Ctrl-D or /exit ends)(.|\n)*\n>"),
            ("\x1b[A\x1b[A\r", r"carrots(.|\n)*tokens/s\](.|\n)*\n>"),  # two lines up in what was typed
            ("/stats\r", "3 questions; (.|\n)*\n>"),  # what is typed before the prompt is there is the terminal's own
        ):
            terminal.type(typed)
            terminal.expect(answered)
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_texts_computed_together_are_those_computed_alone(stories: Workspace) -> None:
    """Up to rounding: kernels for several rows add in another order, and the KV cache is float16."""
    stories.recipe(
        "exact", "q4f16_1", "stories", "cpu-exact"
    )  # rounding activations would make small differences larger
    stories.doit("build", "recipe=exact")
    model = load(stories.root / "dist/exact")
    prompts = [model.tokenizer.encode(text) for text in ("Once upon a time", "One day, the king", "The dog", "Nina")]
    session = model.session(len(prompts))
    alone = []
    for ids in prompts:
        sequence = session.add()
        rows = [session.prefill(sequence, ids)]
        for _ in range(20):
            rows.append(session.decode(sequence, int(rows[-1].argmax())))
        alone.append(rows)
        session.remove(sequence)
    sequences = [session.add() for _ in prompts]
    together = [session.batch_prefill(sequences, prompts)]
    for step in range(20):
        together.append(session.batch_decode(sequences, [int(rows[step].argmax()) for rows in alone]))
    expected = np.stack(alone, 1)
    assert np.abs(np.stack(together) - expected).max() / expected.std() < 5e-3


def test_logits_are_those_of_transformers(stories: Workspace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    model = load(stories.root / "dist" / "stories-q0f32")
    ids = model.tokenizer.encode((STORIES / "evaluation.txt").read_text())[:300]
    expected = reference_logits(reference, ids)
    assert np.abs(model.logits(ids) - expected).max() / expected.std() < 1e-4
