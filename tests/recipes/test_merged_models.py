"""`delta_of` and `lora`: what a model's checkpoint is merged with."""

from __future__ import annotations

import pytest

from mlcbuild.recipes.types import Source
from tests.recipes.conftest import Workspace

DELTA = "source: {hf: owner/delta}\ndelta_of: {hf: owner/base, revision: v1}\ntemplate: chatml\n"


def test_they_are_sources_like_the_checkpoint(workspace: Workspace) -> None:
    adapter = workspace.write("models/adapter/adapter_config.json").parent
    workspace.write("models/summed.yaml", DELTA)
    workspace.write("models/adapted.yaml", "extends: tiny\nlora: {path: adapter}\n")
    models = workspace.load().models
    assert models["summed"].delta_of == Source(hf="owner/base", revision="v1") and models["summed"].lora is None
    assert models["adapted"].lora == Source(path=adapter) and models["adapted"].source == models["tiny"].source
    assert models["tiny"].lora is None


def test_they_are_inherited_like_the_checkpoint(workspace: Workspace) -> None:
    workspace.write("models/summed.yaml", DELTA)
    workspace.write("models/newer.yaml", "extends: summed\ndelta_of: {revision: v2}\n")
    workspace.write("models/other.yaml", "extends: summed\ndelta_of: {hf: owner/other}\n")
    models = workspace.load().models
    assert models["newer"].delta_of == Source(hf="owner/base", revision="v2")
    assert models["other"].delta_of == Source(hf="owner/other")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lora: {path: nowhere}", "1:14: `lora.path` is `nowhere`, expected a folder; "),
        ("delta_of: {path: nowhere}", "1:18: `delta_of.path` is `nowhere`, expected a folder; "),
        ("delta_of: {path: ., hf: a/b}", "1:11: `delta_of`: expected one of `path` and `hf`, not both"),
        ("lora: {repo: a/b}", "1:8: unknown key `repo` in `lora`; "),
        ("lora: {hf: a/b/c}", "1:12: `lora.hf` is `a/b/c`, expected a repository: `owner/name`"),
        ("lora: {revision: v1}", "1:7: `lora`: expected `path` or `hf`"),
        ("lora: {hf: a/b}\ndelta_of: {hf: a/b}", "1:1: expected one of `delta_of` and `lora`, not both"),
    ],
)
def test_mistakes(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("models/wrong.yaml", f"{text}\nextends: tiny\n").startswith(problem)


def test_mistakes_with_what_is_inherited(workspace: Workspace) -> None:
    workspace.write("models/summed.yaml", DELTA)
    assert workspace.problem("models/wrong.yaml", "extends: summed\nlora: {hf: owner/adapter}\n").startswith(
        "2:1: `lora`: the model that it extends has a `delta_of`; one of the two"
    )
    workspace.write("models/wrong.yaml", "extends: tiny\nlora: {path: .}\n")
    assert workspace.problem("models/wronger.yaml", "extends: wrong\nlora: {revision: v1}\n").startswith(
        "2:8: `lora.revision` needs a repository, and the inherited lora is a folder; add `hf` or remove `revision`"
    )
