"""A GGUF file becomes a step that makes a checkpoint of it; nothing else is planned otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.cli.main import main
from mlcbuild.errors import MlcBuildError, RecipeError
from mlcbuild.recipes.load import load
from tests.engine.workspace import make_workspace
from tests.gguf import files
from tests.planning.test_merged_models import planned


def test_a_file_and_anothers_tokenizer(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    (workspace.root / "big").mkdir()
    files.write(workspace.root / "big" / "a[b].gguf", kinds=files.KINDS[:1], split=20)
    source = 'source: {path: "../../big/a[b]-00001-of-00002.gguf"}'
    found = planned(workspace, f"{source}\ntokenizer_from: {{hf: owner/c}}")
    assert list(found.goals["tiny-q4f16_1-cpu"].steps)[:3] == ["download", "unpack", "convert"]
    parts = [f"a[b]-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert [(each.name, each.path) for each in found.steps["download:tiny"].inputs] == [
        (name, workspace.root / "big" / name) for name in parts
    ]
    unpack = found.steps["unpack:tiny"]
    assert [(each.name, each.step) for each in unpack.inputs] == [
        ("files", "download:tiny"),
        ("tokenizer", "download:tiny-tokenizer"),
    ]
    assert found.steps["download:tiny-tokenizer"].fields["files"] == {}, "that repository has no tokenizer"
    takers = {name for name, step in found.steps.items() if "unpack:tiny" in step.producers}
    assert {name.partition(":")[0] for name in takers} == {"convert", "quantize", "package", "measure"}
    assert found.steps["convert:tiny"].fields["structure"]["hidden_size"] == files.HIDDEN
    assert [item.step for item in planned(workspace, source).steps["unpack:tiny"].inputs] == ["download:tiny"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    workspace.write("recipes/models/x.yaml", "source: {path: a.gguf}\ntemplate: chatml\n")
    with pytest.raises(RecipeError, match=r"`source.path` is `a.gguf`, expected a file; .*a.gguf is not there"):
        load(workspace.root)
    workspace.write("recipes/models/x.yaml", "source: {hf: a/b}\nlora: {hf: a/b, file: Q8_0}\ntemplate: chatml\n")
    with pytest.raises(MlcBuildError, match="no `file`: only `source` may be a GGUF file"):
        load(workspace.root)


def test_new_and_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = make_workspace(tmp_path)
    monkeypatch.chdir(workspace.root)
    files.write(Path("Tale-Q4_0.gguf"), kinds=files.KINDS[4:5])
    assert main(["new", "Tale-Q4_0.gguf"]) == 0
    assert "wrote      recipes/models/tale-q4_0.yaml" in capsys.readouterr().out
    text = (workspace.root / "recipes" / "models" / "tale-q4_0.yaml").read_text()
    assert 'source: {path: "../../Tale-Q4_0.gguf"}\n' in text
    assert load(workspace.root).models["tale-q4_0"].source.gguf
    assert main(["inspect", "tale-q4_0"]) == 0
    said = capsys.readouterr().out
    assert "tensors       30: 7 F32, 23 Q4_0\n" in said and "what the architecture needs, and nothing else" in said
    assert "a text ends at </s>, <|end|>" in said
    files.write(Path("broken.gguf"), kinds=files.KINDS[4:5], without="blk.1.ffn_up.weight")
    assert main(["inspect", "broken.gguf"]) == 1
    assert "PROBLEM: tensor model.layers.1.mlp.up_proj.weight is missing" in capsys.readouterr().out
