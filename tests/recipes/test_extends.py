"""`extends`: a model that is another one but for a few lines."""

from __future__ import annotations

import pytest

from mlcbuild.recipes.types import Source
from tests.recipes.conftest import Workspace

BASE = """\
source: {hf: owner/base, revision: v1}
template: chatml
architecture: llama
overrides: {context_window_size: 512, max_batch_size: 4}
verify: {kl: 0.1, gate: report}
"""


def test_what_a_model_does_not_say_is_inherited_key_by_key(workspace: Workspace) -> None:
    workspace.write("models/base.yaml", BASE)
    workspace.write("models/short.yaml", "extends: base\noverrides: {context_window_size: 64}\nverify: {gate: fail}\n")
    workspace.write("models/shorter.yaml", "extends: short\noverrides: {prefill_chunk_size: 32}\n")
    model = workspace.load().models["shorter"]
    assert model.source == Source(hf="owner/base", revision="v1")
    assert (model.template, model.architecture) == ("chatml", "llama")
    assert model.overrides == {"context_window_size": 64, "max_batch_size": 4, "prefill_chunk_size": 32}
    assert (model.verify.kl, model.verify.gate) == (0.1, "fail")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{revision: v2}", Source(hf="owner/base", revision="v2")),
        ("{hf: owner/other}", Source(hf="owner/other")),  # the base's revision is not one of this repository
    ],
)
def test_a_source_is_another_one_or_another_revision(workspace: Workspace, source: str, expected: Source) -> None:
    workspace.write("models/base.yaml", BASE)
    workspace.write("models/other.yaml", f"extends: base\nsource: {source}\n")
    assert workspace.load().models["other"].source == expected


def test_an_inherited_path_stays_relative_to_the_file_that_says_it(workspace: Workspace) -> None:
    workspace.write("models/mine.yaml", "extends: tiny\n")
    path = workspace.load().models["mine"].source.path
    assert path is not None and path.is_dir() and path.name == "tiny"


def test_a_recipe_is_laid_over_its_model(workspace: Workspace) -> None:
    workspace.write("models/base.yaml", BASE)
    workspace.write("templates/plain.yaml", "roles: {user: U, assistant: A}\nseps: ['']\n")
    workspace.write(
        "r.yaml",
        "model: base\nquantization: q0f32\ntarget: cpu\n"
        "template: plain\noverrides: {max_batch_size: 1}\nverify: {kl: 0.2}\n",
    )
    recipe = workspace.load().recipes["r"]
    assert recipe.overrides == {"context_window_size": 512, "max_batch_size": 1}
    assert (recipe.verify.kl, recipe.verify.gate) == (0.2, "report")
    assert recipe.template.name == "plain"
    assert recipe.model.overrides == {"context_window_size": 512, "max_batch_size": 4}


def test_a_circle(workspace: Workspace) -> None:
    for name, base in (("b", "c"), ("c", "a"), ("a", "b"), ("outside", "b")):
        workspace.write(f"models/{name}.yaml", f"extends: {base}\n")
    assert workspace.problems() == ["recipes/models/a.yaml:1:10: `extends` goes in a circle: a → b → c → a"]


def test_a_model_that_extends_itself(workspace: Workspace) -> None:
    assert workspace.problem("models/a.yaml", "extends: a\n") == "1:10: `extends` goes in a circle: a → a"


def test_a_revision_of_a_folder(workspace: Workspace) -> None:
    assert workspace.problem("models/a.yaml", "extends: tiny\nsource: {revision: v1}\n") == (
        "2:10: `source.revision` needs a repository, and the inherited source is a folder; "
        "add `hf` or remove `revision`"
    )


def test_a_mistake_in_the_base_is_reported_once(workspace: Workspace) -> None:
    workspace.write("models/base.yaml", "source: {path: nowhere}\ntemplate: chatlm\n")
    workspace.write("models/a.yaml", "extends: base\n")
    workspace.write("r.yaml", "model: a\nquantization: q0f32\ntarget: cpu\n")
    assert [problem.split(": ")[0] for problem in workspace.problems()] == [
        "recipes/models/base.yaml:1:16",
        "recipes/models/base.yaml:2:11",
    ]
