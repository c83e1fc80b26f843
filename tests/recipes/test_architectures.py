"""`extends` of architectures, and the short forms: what a file means is what the whole one would mean."""

from __future__ import annotations

import pytest

from mlcbuild.recipes.files import stock
from tests.recipes.conftest import Workspace


def test_what_an_architecture_does_not_say_is_inherited_key_by_key(workspace: Workspace) -> None:
    workspace.write(
        "architectures/mine.yaml",
        "extends: llama\nconfig: {head_dim: {value: 32}, _x: {value: 1}}\ndecoder: {rope_scaling: [yarn]}\n"
        "model_config: {sliding_window_size: -1}\n",
    )
    known = workspace.load().architectures
    llama, mine = known["llama"], known["mine"]
    assert mine.data["config"] == {**llama.data["config"], "head_dim": {"value": 32}, "_x": {"value": 1}}
    assert list(mine.data["config"])[-1] == "_x"
    assert mine.data["decoder"] == {**llama.data["decoder"], "rope_scaling": ["yarn"]}
    assert mine.data["parameters"] == llama.data["parameters"]
    assert list(mine.data["model_config"]) == [*llama.data["model_config"], "sliding_window_size"]


def test_a_file_is_for_the_model_type_of_its_name_unless_it_says_otherwise(workspace: Workspace) -> None:
    workspace.write("architectures/mine.yaml", "extends: stablelm\n")
    known = workspace.load().architectures
    assert (known["mine"].model_type, known["mine"].match) == ("mine", {"model_type": ("mine",)})
    assert known["stablelm"].match == {"model_type": ("stablelm", "stablelm_epoch")}
    assert "tested_against" not in known["mine"].data


def test_what_is_left_out(workspace: Workspace) -> None:
    places = "harmless, require.rope_interleaved, parameters.lm_head"
    workspace.write("architectures/mine.yaml", f"extends: llama\nwithout: [{places}]\n")
    known = workspace.load().architectures
    llama, mine = known["llama"].data, known["mine"].data
    assert "harmless" in llama and "harmless" not in mine
    assert llama["require"] == {**mine["require"], "rope_interleaved": [False]}
    assert [line["role"] for line in mine["parameters"]] == [line["role"] for line in llama["parameters"]][:-1]


def test_lines_of_parameters(workspace: Workspace) -> None:
    norm = "{role: q_norm, name: 'model.layers.{i}.q_norm.weight'}"
    workspace.write("architectures/map.yaml", "extends: llama\nparameters: {qkv_proj: {bias: true}}\n")
    workspace.write(
        "architectures/list.yaml",
        f"extends: llama\nparameters: [embedding, {{role: qkv_proj, bias: true}}, {norm}, o_proj, gate_up_proj]\n",
    )
    known = workspace.load().architectures
    embedding, qkv, o, gate_up, *rest = known["llama"].data["parameters"]
    assert known["map"].data["parameters"] == [embedding, {**qkv, "bias": True}, o, gate_up, *rest]
    made = {"role": "q_norm", "name": "model.layers.{i}.q_norm.weight"}
    assert known["list"].data["parameters"] == [embedding, {**qkv, "bias": True}, made, o, gate_up]


def test_a_list_of_model_config_says_all_of_it_in_order(workspace: Workspace) -> None:
    workspace.write(
        "architectures/mine.yaml",
        "extends: llama\nmodel_config: [vocab_size, rms_norm_eps: norm_eps, bias: {key: bias, default: false}]\n",
    )
    found = workspace.load().architectures["mine"].data["model_config"]
    expected = {"vocab_size": "vocab_size", "rms_norm_eps": "norm_eps", "bias": {"key": "bias", "default": False}}
    assert list(found.items()) == list(expected.items())


def test_a_stock_architecture_extends_the_stock_one(workspace: Workspace) -> None:
    before = workspace.load().architectures
    text = (stock().recipes / "architectures" / "llama.yaml").read_text()
    workspace.write("architectures/llama.yaml", text.replace("role: o_proj", "role: down_proj"))
    after = workspace.load().architectures
    assert after["llama"].data != before["llama"].data
    assert after["mistral"] == before["mistral"] and after["qwen3"] == before["qwen3"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("extends: lama", "1:10: `extends` is `lama`, expected a name of recipes/architectures/; did you mean `ll"),
        ("extends: mine", "1:10: `extends` goes in a circle: mine → mine"),
        (
            "extends: llama\nwithout: [decoder.nrm]",
            "2:11: `without[0]` is `decoder.nrm`, which the architecture that it extends does not have; "
            "did you mean `decoder.norm`?",
        ),
        ("extends: llama\nwithout: [config.vocab_size]", "2:10: `config.vocab_size` is missing"),
        ("extends: llama\nwithout: [config]", "2:10: `without` leaves no `config`: name what is in it"),
        ("extends: llama\nwithout: [parameters]", "2:10: `without` leaves no `parameters`: name what is in it"),
        (
            "extends: llama\nparameters: {o_prj: {bias: true}}",
            "2:21: `parameters.o_prj`: the architecture that it extends has no line of the role `o_prj`; "
            "did you mean `o_proj`?",
        ),
        (
            "extends: llama\nparameters: [embedding, router]",
            "2:25: `parameters[1]`: the architecture that it extends has no line of the role `router`",
        ),
        ("extends: llama\nparameters: [{name: x}]", "2:14: `parameters[0].role` is missing: what the decoder uses"),
        ("extends: llama\nmodel_config: [{hidden_size: [1]}]", "2:30: `model_config[0].hidden_size`: expected text"),
    ],
)
def test_what_is_wrong_with_such_a_file(workspace: Workspace, text: str, problem: str) -> None:
    assert workspace.problem("architectures/mine.yaml", f"{text}\n").startswith(problem)


def test_a_file_that_extends_nothing_is_whole(workspace: Workspace) -> None:
    workspace.write("architectures/a.yaml", "match: {model_type: []}\n")
    assert [problem.split(": ")[1] for problem in workspace.problems()] == [
        f"`{key}` is missing" for key in ("config", "model_config", "parameters")
    ]
    text = (stock().recipes / "architectures" / "llama.yaml").read_text()
    first = "  - {role: embedding, name: model.embed_tokens.weight}\n"
    workspace.write("architectures/a.yaml", text.replace(first, "  - embedding\n"))
    workspace.write("architectures/b.yaml", text.replace(first, "  - {role: embedding}\n"))
    one, other = (problem.split(": ", 1)[1] for problem in workspace.problems())
    assert one == "`parameters[0]` is `embedding`, expected a mapping of keys to values"
    assert other == "`parameters[0].name` is missing: mLC's name of the parameter"
