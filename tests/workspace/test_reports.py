"""What a build writes besides the screen: the matrix, reasons, figures; and what it must not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.reporting.history import read_logs
from tests.engine.workspace import Workspace

F16, F32 = "tiny-q4f16_1-cpu", "tiny-q4f32_1-cpu"


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in path.read_text().splitlines()]
    return [event for event in every if event["event"] == kind]


def test_a_build_writes_a_page_and_a_summary(workspace: Workspace) -> None:
    workspace.doit("build", "report=out.html", "summary=out.md")
    page = (workspace.root / "out.html").read_text()
    assert page.count('<td class="built"') == 2
    assert "no lower step was ever run with this cache" in page
    assert f"| `{F16}` | ✅ built |" in (workspace.root / "out.md").read_text()


@pytest.mark.parametrize("remembered", [True, False])
def test_a_build_with_nothing_to_do_has_a_report_too(built: Workspace, remembered: bool) -> None:
    built.doit()
    if not remembered:
        for file in (built.cache / "unchanged").iterdir():
            file.unlink()
    log = built.root / "log.jsonl"
    built.doit("build", f"log_json={log}", "summary=out.md")
    (run,) = read_logs([log])
    assert [(cell.recipe, cell.model, cell.target, cell.status) for cell in run.cells] == [
        (F16, "tiny", "cpu", "hit"),
        (F32, "tiny", "cpu", "hit"),
    ]
    assert all(cell.size > 1000 and cell.kl == 0.0 for cell in run.cells)
    assert f"| `{F32}` | ☑️ hit |" in (built.root / "out.md").read_text()
    assert {len(event["steps"]) for event in events(log, "recipe_planned")} == {10}


def test_the_page_shows_earlier_runs_of_the_same_log(built: Workspace) -> None:
    for _ in range(3):
        built.doit("build", "log_json=log.jsonl", "report=out.html")
    assert "The last 3 runs" in (built.root / "out.html").read_text()


def test_the_log_says_why_a_step_ran_and_how_it_failed(built: Workspace) -> None:
    path = built.root / "recipes/matrix/tiny.yaml"
    path.write_text(path.read_text() + "adjust: [{when: {quantization: q4f16_1}, template: llama-2}]\n")
    built.trick("package.crash")
    log = built.root / "log.jsonl"
    built.doit("--continue", "build", f"log_json={log}", status=2)
    (failed,) = [event for event in events(log, "step_finished") if event["outcome"] == "failed"]
    assert failed["step"] == f"package:{F16}"
    assert "template.name" in failed["why"] and "llama-2" in failed["why"]
    assert "ZeroDivisionError" in failed["log"]
    (run,) = read_logs([log])
    assert {cell.recipe: cell.status for cell in run.cells} == {F16: "failed", F32: "hit"}


def test_a_token_appears_in_no_log_and_no_report(workspace: Workspace) -> None:
    secret = "hf_thisIsVerySecret"
    path = workspace.root / "recipes/models/tiny.yaml"
    path.write_text(f"source: {{path: {secret}}}\ntemplate: chatml\n")
    (workspace.root / "recipes/models/tiny").rename(workspace.root / "recipes/models" / secret)
    workspace.trick("convert.touch", str(workspace.root / "recipes/models" / secret / "model.safetensors"))
    workspace.doit("build", "log_json=l.jsonl", "report=r.html", "summary=s.md", status=1, HF_TOKEN=secret)
    for name in ("l.jsonl", "r.html", "s.md"):
        text = (workspace.root / name).read_text()
        assert "[hidden]" in text and secret not in text


def test_a_report_that_cannot_be_written_does_not_undo_the_build(built: Workspace) -> None:
    output = built.doit("build", "report=/proc/none/r.html", status=1)
    assert "/proc/none/r.html: the report cannot be written: " in output
    assert "Traceback" not in output
    assert "r.txt: expected a name that ends in .html or .md" in built.doit("build", "report=r.txt", status=1)
