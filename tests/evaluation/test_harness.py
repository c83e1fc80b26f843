"""Tasks of lm-evaluation-harness: ours, and one from a YAML file with each kind of request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.api.instance import Instance

from mlcbuild.errors import MlcBuildError
from mlcbuild.evaluation.commands import evaluate
from mlcbuild.evaluation.harness import Harness
from mlcbuild.evaluation.likelihood import continuations, of_text
from mlcbuild.runtime import Model

QUESTIONS = Path(__file__).parents[2] / "mlcbuild/evaluation/questions.yaml"


def test_the_likeliest_answer_counts(tiny: Model, tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(tiny_package, tasks="basic_opposites,basic_order", limit=12, json=True)
    scores = {(s["task"], s["metric"]): s for s in json.loads(capsys.readouterr().out)["scores"]}
    assert {metric for _, metric in scores} == {"acc", "acc_norm"}
    for task in ("basic_opposites", "basic_order"):
        right = 0
        for question, *answers in yaml.safe_load(QUESTIONS.read_text())[task][:12]:
            before = tiny.tokenizer.encode(question)
            wholes = [tiny.tokenizer.encode(f"{question} {answer}") for answer in answers]
            found = continuations(tiny, [(before, whole[len(before) :]) for whole in wholes])
            right += max(range(len(answers)), key=lambda i: found[i].log_probability) == 0
        assert scores[task, "acc"]["value"] == pytest.approx(right / 12) and scores[task, "acc"]["questions"] == 12


def test_questions_have_one_right_answer_among_others() -> None:
    for task, rows in yaml.safe_load(QUESTIONS.read_text()).items():
        assert len(rows) >= 30, task
        assert all(4 <= len(row) == len(set(row)) and all(isinstance(text, str) for text in row) for row in rows)
    for question, *answers in yaml.safe_load(QUESTIONS.read_text())["basic_arithmetic"]:
        assert eval(question.removesuffix("=")) == int(answers[0])


def test_tasks_of_ones_own(tiny: Model, tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers that are written, and a text whose likelihood is told."""
    prompt, text = "The sea was", "The sky was grey."
    answer = tiny.generate(prompt, max_tokens=4)
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": prompt, "answer": answer, "text": text}))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    writing = {
        **data,
        "task": "writing",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_new_tokens": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    reading = {
        **data,
        "task": "reading",
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for task in (writing, reading):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    evaluate(tiny_package, tasks="writing,reading", include=tmp_path)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["TASK"] == ["TASK", "METRIC", "VALUE", "ERROR", "QUESTIONS"]
    assert rows["writing"][1:3] == ["exact_match", "1"]
    assert float(rows["reading"][2]) == pytest.approx(of_text(tiny, text).bits_per_byte, rel=1e-3)


def test_answers_that_are_sampled_differ_and_stop_where_the_task_says(tiny: Model) -> None:
    harness = Harness(tiny)

    def written(count: int, **settings: Any) -> list[str]:
        request = Instance("generate_until", {}, ("The sea was", settings), 0)
        return harness.generate_until([request] * count)

    sampled = written(3, do_sample=True, max_gen_toks=8, until=["zzz"])
    assert len(set(sampled)) == 3
    assert written(2, max_tokens=8) == [tiny.generate("The sea was", max_tokens=8)] * 2
    first = tiny.generate("The sea was", max_tokens=8)[:3]
    assert written(1, max_gen_toks=8, until=[first[1:]]) == [first[0]]


def test_a_task_asked_in_conversations(
    tiny: Model, tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the package's template: examples are turns, and an answer may have been begun."""
    rows = [{"q": "Hi", "a": tiny.chat("Hi", max_tokens=4)}, {"q": "b", "a": "c"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: dict[str, Any] = {
        "task": "asking",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "asking.yaml").write_text(yaml.safe_dump(task))
    for chat, right in ((True, 1), (False, 0)):
        evaluate(tiny_package, tasks="asking", include=tmp_path, limit=1, apply_chat_template=chat, json=True)
        (score,) = json.loads(capsys.readouterr().out)["scores"]
        assert score["value"] == right
    harness = Harness(tiny, chat=True)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert harness.tok_encode(harness.apply_chat_template(turns)) == tiny.chat_prompt(turns)
    begun = harness.apply_chat_template([*turns, {"role": "assistant", "content": "It"}], add_generation_prompt=False)
    assert begun == harness.apply_chat_template(turns) + "It"


@pytest.mark.slow
def test_what_the_harness_prints_is_not_in_the_json(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its errors of a perplexity are found by drawing again, and it says so."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"a": "The", "b": f" sea {n}"}) + "\n" for n in range(4)))
    task = {
        "task": "last",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{a}}",
        "doc_to_target": "{{b}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (tmp_path / "last.yaml").write_text(yaml.safe_dump(task))
    evaluate(tiny_package, tasks="last", include=tmp_path, json=True)
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert score["metric"] == "perplexity" and score["error"] > 0
    for name, said in (
        ("perplexty", r"^last: there is no metric perplexty: look at metric_list in the task's file"),
        (
            "acc_norm",
            r"^last: acc_norm: lm-evaluation-harness does not compute it for this kind of task: correct metric_list",
        ),
    ):
        metrics = [*task["metric_list"], {"metric": name, "aggregation": "mean", "higher_is_better": True}]
        (tmp_path / "last.yaml").write_text(yaml.safe_dump({**task, "metric_list": metrics}))
        with pytest.raises(MlcBuildError, match=said):
            evaluate(tiny_package, tasks="last", include=tmp_path, json=True)
    assert json.loads(capsys.readouterr().out)["scores"]
    (tmp_path / "last.yaml").write_text(yaml.safe_dump({**task, "output_type": "guess"}))
    with pytest.raises(MlcBuildError, match=r"^lm-evaluation-harness: ValueError: .*guess"):
        evaluate(tiny_package, tasks="last", include=tmp_path)


@pytest.mark.slow  # the harness reads all that it has
def test_a_task_that_there_is_none_of(tiny_package: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"^no task is called hellasvag: `lm_eval ls tasks` lists .* basic_facts, "):
        evaluate(tiny_package, tasks="hellasvag")
