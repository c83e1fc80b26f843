"""A GGUF file becomes a step that makes a checkpoint of it; nothing else is planned otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlcbuild.checkpoints.locked import check_config
from mlcbuild.cli.main import main
from mlcbuild.engine.graph import Step
from mlcbuild.errors import MlcBuildError, RecipeError
from mlcbuild.inspect.checkpoint import open_checkpoint
from mlcbuild.publishing.origin import of_gguf
from mlcbuild.recipes.load import load
from mlcbuild.workspace.estimate import _stored_bits
from mlcbuild.workspace.manifest import _recipe
from tests.engine.workspace import make_workspace
from tests.gguf import files
from tests.planning.test_merged_models import planned


def test_a_file_and_anothers_tokenizer(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    (workspace.root / "big").mkdir()
    files.write(workspace.root / "big" / "a[b].gguf", kinds=files.KINDS[:1], split=20)
    source = 'source: {path: "../../big/a[b]-00001-of-00002.gguf"}'
    found = planned(workspace, f"{source}\ntokenizer_from: {{hf: owner/c}}")
    assert list(found.goals["tiny-q4f16_1-cpu"].steps)[:4] == ["download", "unpack", "tokenizer", "convert"]
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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("source: {hf: a/b}\ntokenizer_from: {hf: a/c}", "2:1: `tokenizer_from`: is for a GGUF file, and "
         "`source` is none: its own tokenizer is taken; remove it"),
        ("source: {hf: a/b, file: Q8_0}\nlora: {hf: a/c}", "2:1: `lora`: is merged with an unquantized checkpoint, and "
         "`source` is a GGUF file: name the checkpoint that it was made from"),
        ("source: {path: a.gguf}\ndelta_of: {hf: a/c}", "2:1: `delta_of`: is merged with an unquantized checkpoint"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it(tmp_path: Path, text: str, problem: str) -> None:
    workspace = make_workspace(tmp_path)
    (workspace.root / "recipes" / "models" / "a.gguf").touch()
    workspace.write("recipes/models/x.yaml", f"{text}\ntemplate: chatml\n")
    with pytest.raises(RecipeError) as error:
        load(workspace.root)
    assert f"x.yaml:{problem}" in str(error.value)


def test_what_a_manifest_says_of_it(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    source = "source: {hf: a/b, file: Q8_0, revision: v1}\ntokenizer_from: {hf: a/c}\ntemplate: chatml\n"
    workspace.write("recipes/models/tiny.yaml", source)
    said = _recipe(load(workspace.root).recipes["tiny-q4f16_1-cpu"])["model"]
    assert said == {
        "name": "tiny",
        "source": {"hf": "a/b", "revision": "v1", "file": "Q8_0"},
        "tokenizer_from": {"hf": "a/c", "revision": None},
    }
    facts = {"general.license": "mit", "general.license.link": "https://x", "general.languages": ["en"]}
    origin = of_gguf(facts)
    assert origin.licence == {"license": "mit", "license_link": "https://x"} and origin.carried == {"language": ["en"]}


def test_bits_of_a_number() -> None:
    names = {
        "m-Q4_K_M.gguf": 4.75,
        "m-IQ2_XXS-00001-of-00002.gguf": 2.75,
        "Q8_0.gguf": 8.75,
        "m-F16.gguf": 16,
        "m.bin": 16,
    }
    for name, bits in names.items():
        assert _stored_bits(Step("download", "download:m", "", {"files": {name: {}}})) == bits


def test_another_version_of_mlcbuild_made_the_config() -> None:
    made = {"hidden_size": 8, "quantization_config": {"quant_method": "gguf"}}
    with pytest.raises(MlcBuildError) as error:
        check_config(made, {**made, "model_type": "olmo3"}, "the model")
    assert str(error.value) == (
        "recipes.lock: another version of mlcbuild made the config of the model, a GGUF file's: `model_type` is "
        'absent, and "olmo3" in config.json; run `mlcbuild lock --update`'
    )


@pytest.mark.slow
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
    assert main(["inspect", "Tale-Q4_0.gguf", "--revision", "main"]) == 1
    assert "Tale-Q4_0.gguf: a file, and --revision is for a repository" in capsys.readouterr().err
    assert main(["new", "Tale-Q4_0.gguf", "--name", "other", "--lora", "owner/a"]) == 1
    assert "Tale-Q4_0.gguf: a GGUF file; deltas and adapters are merged with" in capsys.readouterr().err
    Path("own").mkdir()
    config = {"tokenizer.json": {}, "config.json": {}, "generation_config.json": {"eos_token_id": 7}}
    for name, content in config.items():
        Path("own", name).write_text(json.dumps(content))
    workspace.write("recipes/models/tale-q4_0.yaml", f"{text}\ntokenizer_from: {{path: ../../own}}\n")
    with open_checkpoint("tale-q4_0", load(workspace.root)) as found:
        assert found.files["generation_config.json"].parent.name == found.files["tokenizer.json"].parent.name == "own"
        assert "tokenizer_config.json" not in found.files and "quantization_config" in found.config
        assert json.loads(found.files["config.json"].read_text()) == found.config
    files.write(Path("broken.gguf"), kinds=files.KINDS[4:5], without="blk.1.ffn_up.weight")
    assert main(["inspect", "broken.gguf"]) == 1
    assert "PROBLEM: tensor model.layers.1.mlp.up_proj.weight is missing" in capsys.readouterr().out
