"""Matrix files: cells, `exclude`, `adjust`."""

from __future__ import annotations

import pytest

from tests.recipes.conftest import Workspace

MATRIX = "matrix:\n  model: [tiny]\n  quantization: [q4f16_1, q4f32_1]\n  target: [cpu, cpu-x86_64]\n"


def test_cells_are_recipes_named_after_their_parts(workspace: Workspace) -> None:
    workspace.write("matrix/all.yaml", MATRIX)
    recipes = workspace.load().recipes
    assert list(recipes) == [
        "tiny-q4f16_1-cpu",
        "tiny-q4f16_1-cpu-x86_64",
        "tiny-q4f32_1-cpu",
        "tiny-q4f32_1-cpu-x86_64",
    ]
    recipe = recipes["tiny-q4f32_1-cpu-x86_64"]
    assert (recipe.model.name, recipe.quantization.name, recipe.target.name) == ("tiny", "q4f32_1", "cpu-x86_64")
    assert recipe.origin == "recipes/matrix/all.yaml"


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("{target: cpu, quantization: q4f32_1}", 3),
        ("{target: cpu}", 2),
        ("{quantization: [q4f16_1, q4f32_1], target: cpu}", 2),
        ("{target: cpu}, {target: cpu, quantization: q4f32_1}", 2),  # what one item excludes another may name too
    ],
)
def test_exclude(workspace: Workspace, exclude: str, left: int) -> None:
    workspace.write("matrix/all.yaml", MATRIX + f"exclude: [{exclude}]\n")
    assert len(workspace.load().recipes) == left


def test_adjust_lays_settings_over_the_models_and_later_items_over_earlier_ones(workspace: Workspace) -> None:
    workspace.write("matrix/text.txt", "evaluate this")
    workspace.write("templates/plain.yaml", "roles: {user: U, assistant: A}\nseps: ['']\n")
    workspace.write(
        "matrix/all.yaml",
        MATRIX
        + """\
adjust:
  - when: {model: tiny}
    overrides: {context_window_size: 64, max_batch_size: 2}
    verify: {gate: report, text: text.txt}
  - when: {target: [cpu], quantization: q4f32_1}
    overrides: {context_window_size: 32}
    verify: {kl: 0.5}
    template: plain
""",
    )
    recipes = workspace.load().recipes
    adjusted, other = recipes["tiny-q4f32_1-cpu"], recipes["tiny-q4f32_1-cpu-x86_64"]
    assert adjusted.overrides == {"context_window_size": 32, "max_batch_size": 2}
    assert (adjusted.verify.kl, adjusted.verify.gate, adjusted.template.name) == (0.5, "report", "plain")
    assert adjusted.verify.text == workspace.root / "recipes/matrix/text.txt"
    assert other.overrides == {"context_window_size": 64, "max_batch_size": 2}
    assert (other.verify.kl, other.template.name) == (None, "chatml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            MATRIX + "exclude: [{target: cpuu}]\n",
            "5:20: `exclude[0].target` is `cpuu`, which matches no cell: expected a target of this matrix; "
            "did you mean `cpu`?",
        ),
        (
            MATRIX + "exclude: [{quantization: [q4f16_1, q0f16]}]\n",
            "5:36: `exclude[0].quantization[1]` is `q0f16`, which matches no cell: expected a quantization of this "
            "matrix; there is `q4f16_1` or `q4f32_1`",
        ),
        (
            MATRIX + "adjust: [{when: {target: metal}, template: chatml}]\n",
            "5:26: `adjust[0].when.target` is `metal`, which matches no cell: expected a target of this matrix; "
            "there is `cpu` or `cpu-x86_64`",
        ),
        (
            MATRIX + "exclude: [{target: cpu}]\nadjust: [{when: {target: cpu}, template: chatml}]\n",
            "6:17: `when` matches no cell, `exclude` has removed them all",
        ),
        (MATRIX + "exclude: [{model: tiny}]\n", "5:1: `exclude` leaves no cell to build"),
        (MATRIX + "exclude: [{modl: tiny}]\n", "5:12: unknown key `modl` in `exclude[0]`; did you mean `model`?"),
        (MATRIX + "exclude: [{}]\n", "5:11: `exclude[0]`: expected something, not nothing"),
        (MATRIX + "exclude: [{target: []}]\n", "5:20: `exclude[0].target`: expected something, not nothing"),
        (
            MATRIX + "adjust: [{when: {target: cpu}}]\n",
            "5:10: `adjust[0]`: expected something to adjust: `template`, `overrides` or `verify`",
        ),
        (
            MATRIX + "adjust: [{template: chatml}]\n",
            "5:10: `adjust[0].when` is missing: the cells to adjust; at least one must be left by `exclude`",
        ),
        (
            MATRIX + "adjust: [{when: {target: cpu}, template: chatlm}]\n",
            "5:42: `adjust[0].template` is `chatlm`, expected a name of recipes/templates/; did you mean `chatml`?",
        ),
        (
            MATRIX.replace("[tiny]", "[tiny, tiny]"),
            "2:10: `matrix.model`: expected each entry once, `tiny` is repeated",
        ),
        (
            MATRIX.replace("[tiny]", "[tiny, tinny]"),
            "2:17: `matrix.model[1]` is `tinny`, expected a name of recipes/models/; did you mean `tiny`?",
        ),
        (MATRIX.replace("[tiny]", "[]"), "2:10: `matrix.model`: expected something, not nothing"),
        (MATRIX.replace("[tiny]", "tiny"), "2:10: `matrix.model` is `tiny`, expected a list"),
        (
            "matrix: {model: [tiny], target: [cpu]}\n",
            "1:9: `matrix.quantization` is missing: files of recipes/quantizations/",
        ),
    ],
)
def test_mistakes(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("matrix/bad.yaml", text) == problem


def test_two_cells_of_one_name(workspace: Workspace) -> None:
    quantization = "class: q0\nmodel_dtype: float32\n"
    model = "extends: tiny\n"
    for kind, name, text in (
        ("models", "a", model),
        ("models", "a-b", model),
        ("quantizations", "b-c", quantization),
        ("quantizations", "c", quantization),
    ):
        workspace.write(f"{kind}/{name}.yaml", text)
    problem = workspace.problem("matrix/bad.yaml", "matrix: {model: [a, a-b], quantization: [b-c, c], target: [cpu]}\n")
    assert problem == "1:1: two cells have the name `a-b-c-cpu`; exclude one of them"
