"""`mlcbuild inspect` and what it is made of: structure, sizes, tokens, template, libraries that could be used again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.chat.checkpoint import CheckpointChat, read_checkpoint_chat
from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.cli.main import main
from mlcbuild.inspect.template import differences, guess
from mlcbuild.recipes.files import stock
from mlcbuild.recipes.load import load
from tests.docs.pages import ROOT
from tests.engine.workspace import CONFIG, Workspace, make_workspace

STORIES = ROOT / "recipes" / "models" / "stories"
TEMPLATES = load(ROOT).templates


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = make_workspace(tmp_path)
    monkeypatch.chdir(made.root)
    return made


def inspected(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What is said of a checkpoint; the exit code says whether a problem is."""
    code = main(["inspect", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    embedding = found["choices"].get("embedding") or {}
    assert code == int("problem" in embedding or bool(found["tensors"] and found["tensors"]["problem"]))
    return found


def test_a_local_checkpoint(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, str(STORIES))
    weights = stock().recipes / "models/stories/model.safetensors"
    assert found["architecture"] == "llama" and found["choices"]["num_hidden_layers"] == 6
    assert found["tensors"] == {"count": 56, "dtypes": {"BF16": 56}, "problem": None, "notes": []}
    # Every number of the checkpoint is a parameter; in q0bf16 it takes two bytes, as it does there.
    assert found["quantizations"]["q0bf16"]["weights"] == 2 * found["parameters"]
    assert 0 < weights.stat().st_size - 2 * found["parameters"] < 10_000, "the header"
    assert found["tokenizer"]["tokens"] == 2048 and "<|im_end|>" in found["tokenizer"]["ends"]
    assert found["template"]["name"] == "chatml" and found["template"]["exact"]
    assert found["libraries"] == {}
    # Two of keys and values, 6 layers, 2 heads of 32 float16 numbers, 512 tokens.
    assert found["quantizations"]["q4f16_1"]["cache"] == 2 * 6 * 2 * 32 * 2 * 512


def test_sizes_are_those_of_the_built_weights(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from mlcbuild.inspect.sizes import size
    from mlcbuild.models import architecture as architectures

    catalog = load(ROOT)
    config = json.loads((STORIES / "config.json").read_text())
    structure = architectures.resolve(architectures.choose(catalog.architectures, config), config, {})
    found = inspected(capsys, str(STORIES))["quantizations"]["q4f16_1"]["weights"]
    assert found == size(structure, catalog.quantizations["q4f16_1"]).weights
    # 4 bits and a float16 scale for every 32, and norms: within a percent of 4.5 bits each.
    assert found == pytest.approx(2_755_008 * 4.5 / 8, rel=0.01)
    # A budget takes what it has, and no more than the largest of its formats does.
    budget = catalog.quantizations["q5f16_auto"]
    largest = size(structure, catalog.quantizations["q8f16_1"]).weights
    for bits, expected in ((5, 2_755_008 * 5 // 8), (4, 2_755_008 * 4 // 8), (30, largest)):
        assert size(structure, dataclasses.replace(budget, bits_per_weight=bits)).weights == expected
    problem = size(structure, dataclasses.replace(budget, bits_per_weight=2)).problem
    assert problem is not None and problem.startswith("bits_per_weight 2: this model takes 3.")


def test_a_recurrent_model_keeps_no_keys_and_values(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "context_length": 64}
    workspace.write(
        "recurrent/config.json", json.dumps({**config, "intermediate_size": 128, "attention_hidden_size": 64})
    )
    found = inspected(capsys, "recurrent")
    assert found["choices"]["kind"] == "rwkv4"
    assert {size["cache"] for size in found["quantizations"].values() if "cache" in size} == {0}
    for name in ("q4f16_mixed", "q5f16_auto"):
        assert found["quantizations"][name] == {"problem": "for models that run layer by layer"}


BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize(
    ("modules", "embedding"),
    [
        (None, "cls"),
        (["Transformer", "Pooling"], "mean"),
        (["Transformer", "Pooling", "Dense"], "modules.json: the module Dense follows the transformer"),
    ],
)
def test_fault_C_a_model_of_texts(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], modules: list[str] | None, embedding: str
) -> None:
    """Its pooling is the checkpoint's own; it has no rotary base, and nobody wants advice on its template."""
    workspace.write("texts/config.json", json.dumps(BERT))
    workspace.write("texts/tokenizer.json", (STORIES / "tokenizer.json").read_text())
    if modules is not None:
        listed = [{"type": f"sentence_transformers.models.{name}", "path": f"1_{name}"} for name in modules]
        workspace.write("texts/modules.json", json.dumps(listed))
        workspace.write("texts/1_Pooling/config.json", json.dumps({"pooling_mode_mean_tokens": True}))
    found = inspected(capsys, "texts")
    told = found["choices"]["embedding"]
    assert told.get("pooling_strategy", told.get("problem", "")).startswith(embedding)
    assert found["choices"]["rope"] == "none" and "rope_theta" not in found["choices"]
    assert found["template"]["remarks"] == []
    assert found["quantizations"]["q5f16_auto"] == {"problem": "for models that predict tokens"}
    assert found["quantizations"]["q4f16_mixed"]["weights"] > found["quantizations"]["q4f16_1"]["weights"]
    main(["inspect", "texts"])
    assert "byte_fallback" not in capsys.readouterr().out, "which is of no use for WordPiece"


def test_a_problem_is_in_the_exit_code(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS C: 0 beside PROBLEM."""
    config = json.loads((STORIES / "config.json").read_text())
    shutil.copytree(STORIES, workspace.root / "large")
    (workspace.root / "large/config.json").write_text(json.dumps(config | {"vocab_size": 2000}))
    assert main(["inspect", "large"]) == 1
    said = capsys.readouterr().out
    assert said.count("PROBLEM: ") == 2 and "PROBLEM: the model has only 2,000 rows for them" in said


def test_weights_elsewhere_and_links_that_lead_nowhere(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAULTS C: shards in a subfolder were `no weights`. A sibling: a link without its file was no file at all."""
    folder = workspace.root / "large"
    shutil.copytree(STORIES, folder)
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards/model.safetensors")
    problem = inspected(capsys, "large")["tensors"]["problem"]
    assert "no weights beside config.json: they lie in the folder shards/: move them" in problem
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("../blobs/1")
    assert main(["inspect", "large"]) == 1
    said = f"{folder}/generation_config.json: cannot be read: it is a symbolic link to ../blobs/1: put that back, or "
    assert said in capsys.readouterr().err


def test_an_adapter_that_unties_what_the_base_ties(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """FAULTS A6, a sibling: what is shown is the structure that is built."""
    workspace.write("recipes/models/adapter/adapter_config.json", json.dumps({"modules_to_save": ["lm_head"]}))
    shutil.copytree(STORIES, workspace.root / "base")
    config = json.loads((STORIES / "config.json").read_text()) | {"tie_word_embeddings": True}
    (workspace.root / "base/config.json").write_text(json.dumps(config))
    for name, more in (("plain", ""), ("tuned", "lora: {path: adapter}\n")):
        workspace.write(f"recipes/models/{name}.yaml", f"source: {{path: ../../base}}\n{more}template: chatml\n")
    plain, tuned = (inspected(capsys, name) for name in ("plain", "tuned"))
    assert plain["choices"]["tie_word_embeddings"] and "tie_word_embeddings" not in tuned["choices"]
    assert tuned["parameters"] - plain["parameters"] == config["vocab_size"] * config["hidden_size"]
    assert tuned["structure"] != plain["structure"]


def test_which_libraries_it_would_use(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workspace.root / "recipes/models/tiny", workspace.root / "twin")
    config = {**CONFIG, "vocab_size": 64, "max_position_embeddings": 512}
    (workspace.root / "twin/config.json").write_text(json.dumps(config))
    (label,) = {name.split(":")[1] for name in inspected(capsys, "tiny")["libraries"] if name.endswith("q4f16_1-cpu")}
    assert inspected(capsys, "tiny")["model"] == "tiny"
    longer = inspected(capsys, "twin")
    limits = {"context_window_size": 256, "prefill_chunk_size": 256}
    assert longer["libraries"] == {} and longer["libraries_with_other_limits"][f"library:{label}"] == limits
    (workspace.root / "twin/config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    # Another model of the structure may choose otherwise where a quantization is a budget.
    workspace.write("recipes/budget.yaml", "model: tiny\nquantization: q5f16_auto\ntarget: cpu\n")
    twin = inspected(capsys, "twin")
    assert twin["libraries"][f"library:{label}"] == ["tiny-q4f16_1-cpu"]
    assert not [name for name in [*twin["libraries"], *twin["libraries_with_other_limits"]] if "q5f16_auto" in name]
    assert main(["inspect", "twin"]) == 1  # it has no weights
    text = capsys.readouterr().out
    assert f"{label}  tiny-q4f16_1-cpu" in text and "tensors       0" in text
    assert "PROBLEM: model.safetensors" in text, "the weights of toy models are none"


def test_outside_of_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert inspected(capsys, "stories")["architecture"] == "llama"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["tinny"], "tinny: no folder and no model of this name; did you mean `tiny`? (hf:tinny means the repository)"),
        (["./nowhere"], "./nowhere: no such folder; a checkpoint is a folder in Hugging Face's format, or owner/name"),
        (["a.gguf"], "a.gguf: no such file"),
        (["dodo.py"], "dodo.py: a file; a checkpoint is a folder in Hugging Face's format (config.json and safeten"),
        (["recipes"], "config.json: no such file: a checkpoint in Hugging Face format has one"),
        (["strange"], "model_type `lama` is an unknown architecture (did you mean `llama`?)"),
    ],
)
def test_mistakes(workspace: Workspace, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    workspace.write("strange/config.json", json.dumps({**CONFIG, "model_type": "lama"}))
    assert main(["inspect", *words]) == 1
    assert text in capsys.readouterr().err


@pytest.fixture
def chat() -> CheckpointChat:
    found = read_checkpoint_chat({path.name: path for path in STORIES.iterdir()})
    assert found is not None
    return found


def with_jinja(chat: CheckpointChat, jinja: str) -> CheckpointChat:
    return CheckpointChat(chat.tokenizer, ChatTemplate(jinja, "test"), chat.end_ids)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_named_template_that_writes_the_same_is_found(chat: CheckpointChat) -> None:
    found = guess(with_jinja(chat, CHATML), TEMPLATES, "my-chat")
    assert found.exact and found.name == "chatml"


def test_what_no_named_template_writes_is_the_checkpoints_own(chat: CheckpointChat) -> None:
    found = guess(with_jinja(chat, CHATML.replace("im_start|>'", "im_start|>~ '")), TEMPLATES, "my-chat")
    assert found.exact and found.name == "auto"
    assert found.remarks[0].startswith("no named template writes the same; the nearest is ")


def test_what_the_scheme_cannot_express_is_the_nearest_with_its_differences(chat: CheckpointChat) -> None:
    counted = CHATML.replace("m.role + '", "m.role + loop.index|string + '")
    found = guess(with_jinja(chat, counted), TEMPLATES, "my-chat")
    assert not found.exact and found.name in TEMPLATES
    assert any("it writes conversations otherwise:\n--- test: chat_template" in remark for remark in found.remarks)
    assert any("cannot be written as an MLC template" in remark for remark in found.remarks)


def test_without_a_chat_template_it_is_plain_text(chat: CheckpointChat) -> None:
    found = guess(CheckpointChat(chat.tokenizer, None, chat.end_ids), TEMPLATES, "my-base")
    assert (found.name, found.exact) == ("LM", False)
    assert "the checkpoint has no chat_template: LM (text as it is) is right for a base model" in found.remarks[0]
    assert guess(None, TEMPLATES, "my-base").remarks[0].startswith("the checkpoint has no tokenizer")


def test_a_template_that_was_chosen_by_hand_is_compared(chat: CheckpointChat) -> None:
    said = differences(TEMPLATES["llama-2"], with_jinja(chat, CHATML))
    assert any("it writes conversations otherwise" in remark for remark in said)
    by_default, stops = differences(TEMPLATES["chatml"], with_jinja(chat, CHATML))
    assert by_default.startswith("without a system message it writes otherwise:")
    assert stops == "it stops at ['<|im_end|>'], the checkpoint at ['<|im_end|>', '<|endoftext|>']"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "MLCBUILD_STEP_MEMORY",
            "1M",
            "it took more than 1.0 MB of memory and was stopped (MLCBUILD_STEP_MEMORY=24G allows more)\n",
        ),
        (
            "MLCBUILD_STEP_SILENCE",
            "0.001",
            "it took more than 0.1 s and was stopped (MLCBUILD_STEP_SILENCE=MINUTES allows more)\n",
        ),
        ("MLCBUILD_STEP_MEMORY", "much", "MLCBUILD_STEP_MEMORY=much: 'much' is not a size: expected a number with K"),
        ("MLCBUILD_STEP_SILENCE", "soon", "MLCBUILD_STEP_SILENCE=soon: expected a number of minutes"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "new"])
def test_what_is_looked_at_is_bounded_as_a_step_is(
    workspace: Workspace, command: str, variable: str, value: str, said: str
) -> None:
    """FAULTS D: `inspect` had no limit of time or memory."""
    words = [sys.executable, "-m", "mlcbuild.cli", command, str(STORIES)]
    done = subprocess.run(
        words, cwd=workspace.root, env={**os.environ, variable: value}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"mlcbuild {command}: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        ("RuntimeError('a bug')", 1, "RuntimeError: a bug\n"),
        ("SystemExit('not this one')", 1, "not this one\n"),
        ("SystemExit(3)", 3, ""),
    ],
)
def test_a_bug_in_what_is_watched_is_seen(raised: str, status: int, said: str) -> None:
    code = f"""
from mlcbuild.engine.watched import watched
def run(): raise {raised}
raise SystemExit(watched(run))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stderr.endswith(said)
    assert ("Traceback" in done.stderr) == ("RuntimeError" in raised) and bool(said) == bool(done.stderr)
