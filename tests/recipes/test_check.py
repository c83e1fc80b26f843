"""`mlcbuild check`: the report as data and as text."""

from __future__ import annotations

from mlcbuild.recipes.load import check, render
from tests.recipes.conftest import RECIPE, Workspace


def test_a_problem_is_shown_with_its_line_and_carets(workspace: Workspace) -> None:
    workspace.write("bad.yaml", RECIPE.replace("cpu", "gpu") + "overrides:\n\n\n\n\n\n  max_batch: {a: 1}\n")
    report = check(workspace.root)
    assert not report.ok
    assert (
        render(report)
        == f"""\
recipes/bad.yaml:10:3: unknown key `max_batch` in `overrides`; did you mean `max_batch_size`?
    |
 10 |   max_batch: {{a: 1}}
    |   ^^^^^^^^^
1 problem in 1 file of {sum(report.counts.values())}
"""
    )


def test_carets_stand_under_the_text_behind_a_tab(workspace: Workspace) -> None:
    workspace.write("bad.yaml", RECIPE.replace("target: cpu", "target:\tgpu"))
    assert render(check(workspace.root)).splitlines()[1:4] == ["   |", " 3 | target:\tgpu", "   |        \t^^^"]


def test_a_workspace_without_problems(workspace: Workspace) -> None:
    workspace.write("r.yaml", RECIPE)
    workspace.write("matrix/m.yaml", "matrix: {model: [tiny], quantization: [q0f32, q0f16], target: [cpu]}\n")
    report = check(workspace.root)
    assert report.ok and report.catalog is not None and len(report.catalog.recipes) == 3
    stock = {
        kind: report.counts[kind] for kind in ("architecture", "quantization", "target", "template")
    }  # the real ones: there will be more
    assert render(report) == (
        f"{3 + sum(stock.values())} files valid: 3 recipes, 1 model, {stock['architecture']} architectures, "
        f"{stock['quantization']} quantizations, {stock['target']} targets, {stock['template']} templates\n"
    )


def test_a_warning_is_not_a_problem(workspace: Workspace) -> None:
    workspace.write("templates/chatml.yaml", "roles: {user: U, assistant: A}\nseps: [x]\n")
    report = check(workspace.root)
    assert report.ok
    assert render(report).splitlines()[0] == (
        "recipes/templates/chatml.yaml: warning: takes the place of the stock template `chatml`"
    )


def test_the_lock_file_is_checked_too(workspace: Workspace) -> None:
    workspace.write("recipes.lock", "{")
    report = check(workspace.root)
    assert [str(problem).split(";")[0] for problem in report.problems] == [
        "recipes/recipes.lock:1:2: not valid JSON: Expecting property name enclosed in double quotes"
    ]


def test_a_value_never_brings_control_characters_to_the_terminal(workspace: Workspace) -> None:
    workspace.write("bad.yaml", RECIPE.replace("cpu", '"\\e[31mred"'))
    assert "\x1b" not in render(check(workspace.root))
