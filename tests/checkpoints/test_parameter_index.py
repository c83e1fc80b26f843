"""parameters.json: where each parameter's bytes are, and what a checkpoint must not lack or have too much of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.index import _natural, index, with_prefix
from mlcbuild.checkpoints.table import read_table
from mlcbuild.errors import CheckpointError
from mlcbuild.models.parameters import Parameter
from tests.checkpoints.files import folder, write


def model(layers: int, tied: bool = False) -> list[Parameter]:
    made = [Parameter("embed.weight", (9, 4), "embedding", ("embed.weight",))]
    for i in range(layers):
        parts = tuple(f"layers.{i}.{name}_proj.weight" for name in "qkv")
        made.append(Parameter(f"layers.{i}.qkv_proj.weight", (8, 4), "qkv_proj", parts))
        made.append(Parameter(f"layers.{i}.norm.weight", (4,), "attention_norm", (f"layers.{i}.norm.weight",)))
    return made if tied else [*made, Parameter("lm_head.weight", (9, 4), "lm_head", ("lm_head.weight",))]


def tensors(layers: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (9, 4), "lm_head.weight": (9, 4)}
    for i in range(layers):
        shapes |= {f"layers.{i}.q_proj.weight": (4, 4), f"layers.{i}.k_proj.weight": (2, 4)}
        shapes |= {f"layers.{i}.v_proj.weight": (2, 4), f"layers.{i}.norm.weight": (4,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def table(root: Path, values: dict[str, Any]) -> dict[str, TensorRef]:
    path = write(root / "model.safetensors", values)
    return read_table({path.name: path}, {path.name: "digest"})


def problems(parameters: list[Parameter], refs: dict[str, TensorRef], ignored: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        index(parameters, refs, ignored)
    return str(error.value).splitlines()


def test_parts_are_the_parameter(tmp_path: Path) -> None:
    values = tensors(2)
    document = index(model(2), table(tmp_path, values))
    assert document["version"] == 1
    assert [entry["name"] for entry in document["parameters"]] == [parameter.name for parameter in model(2)]
    qkv = document["parameters"][1]
    assert qkv["shape"] == [8, 4] and qkv["dtype"] == "float32"
    assert [(part["tensor"], part["file"], part["blob"], part["shape"]) for part in qkv["parts"]] == [
        ("layers.0.q_proj.weight", "model.safetensors", "digest", [4, 4]),
        ("layers.0.k_proj.weight", "model.safetensors", "digest", [2, 4]),
        ("layers.0.v_proj.weight", "model.safetensors", "digest", [2, 4]),
    ]
    data = (tmp_path / "model.safetensors").read_bytes()
    joined = b"".join(data[part["offset"] : part["offset"] + part["nbytes"]] for part in qkv["parts"])
    assert joined == b"".join(values[f"layers.0.{name}_proj.weight"].tobytes() for name in "qkv")


def test_fewer_layers_in_the_config(tmp_path: Path) -> None:
    assert problems(model(2), table(tmp_path, tensors(4))) == [
        "config.json says num_hidden_layers 2, but the checkpoint has tensors of layers 2, 3: "
        "layers.2.k_proj.weight, layers.2.norm.weight, layers.2.q_proj.weight and 5 more"
    ]


def test_more_layers_in_the_config(tmp_path: Path) -> None:
    assert problems(model(12), table(tmp_path, tensors(3))) == [
        "config.json says num_hidden_layers 12, but the checkpoint has tensors of 3 layers only (0 to 2): missing are "
        "layers.3.k_proj.weight, layers.3.norm.weight, layers.3.q_proj.weight and 33 more"
    ]


def test_missing_and_misspelt(tmp_path: Path) -> None:
    values = tensors(1)
    values["layers.0.nrom.weight"] = values.pop("layers.0.norm.weight")
    del values["embed.weight"]
    assert problems(model(1), table(tmp_path, values)) == [
        "tensor embed.weight is missing from the checkpoint",
        "tensor layers.0.norm.weight is missing from the checkpoint; it has layers.0.nrom.weight",
        "the checkpoint has a tensor layers.0.nrom.weight that belongs to no parameter; "
        "did it mean layers.0.norm.weight?",
    ]


def test_unexpected(tmp_path: Path) -> None:
    values = tensors(1) | {"layers.0.q_proj.bias": np.zeros(4, np.float32), "visual.x": np.zeros(1, np.float32)}
    refs = table(tmp_path, values)
    assert problems(model(1), refs) == [
        "the checkpoint has a tensor layers.0.q_proj.bias that belongs to no parameter: the architecture has no use "
        "for it",
        "the checkpoint has a tensor visual.x that belongs to no parameter: the architecture has no use for it",
    ]
    index(model(1), refs, ("layers.0.q_proj.bias", "visual.x"))


def test_long_lists_are_cut(tmp_path: Path) -> None:
    values = tensors(1) | {f"extra.{chr(97 + i)}": np.zeros(1, np.float32) for i in range(20)}
    found = problems(model(1), table(tmp_path, values))
    assert len(found) == 13 and found[-1] == "and 8 more tensors belong to no parameter, all under `extra.`"


def test_wrong_shapes(tmp_path: Path) -> None:
    values = tensors(1)
    values["embed.weight"] = np.zeros((10, 4), np.float32)
    values["layers.0.v_proj.weight"] = np.zeros((3, 4), np.float32)
    values["layers.0.norm.weight"] = np.zeros((4, 1), np.float32)
    assert problems(model(1), table(tmp_path, values)) == [
        "model.safetensors: tensor embed.weight: shape [10, 4], but config.json makes it [9, 4]",
        "model.safetensors: layers.0.q_proj.weight [4, 4], layers.0.k_proj.weight [2, 4], layers.0.v_proj.weight "
        "[3, 4]: joined by rows they are not the [8, 4] that config.json makes of layers.0.qkv_proj.weight",
        "model.safetensors: tensor layers.0.norm.weight: shape [4, 1], but config.json makes it [4]",
    ]


def test_wrong_dtypes(tmp_path: Path) -> None:
    values = tensors(1)
    values["embed.weight"] = values["embed.weight"].astype(np.float64)
    values["layers.0.k_proj.weight"] = values["layers.0.k_proj.weight"].astype(np.float16)
    assert problems(model(1), table(tmp_path, values)) == [
        "model.safetensors: tensor embed.weight: dtype F64, expected one of F16, BF16, F32",
        "model.safetensors: the parts of layers.0.qkv_proj.weight have different dtypes: layers.0.q_proj.weight F32, "
        "layers.0.k_proj.weight F16, layers.0.v_proj.weight F32",
    ]


def test_tied_embeddings_stored_twice(tmp_path: Path) -> None:
    values = tensors(1)
    values["lm_head.weight"] = values["embed.weight"].copy()
    notes: list[str] = []
    document = index(model(1, tied=True), table(tmp_path, values), (), notes.append)
    assert "lm_head.weight" not in str(document)
    assert notes == ["lm_head.weight repeats embed.weight (tie_word_embeddings is true) and is left out"]


def test_tied_embeddings_that_differ(tmp_path: Path) -> None:
    assert problems(model(1, tied=True), table(tmp_path, tensors(1))) == [
        "model.safetensors: tensor lm_head.weight differs from embed.weight, although config.json says "
        "tie_word_embeddings: true; set it to false in config.json if the model has an output matrix of its own"
    ]


def test_untied_without_an_output_matrix(tmp_path: Path) -> None:
    values = tensors(1)
    del values["lm_head.weight"]
    assert problems(model(1), table(tmp_path, values)) == ["tensor lm_head.weight is missing from the checkpoint"]


def test_all_problems_at_once(tmp_path: Path) -> None:
    values = tensors(3) | {"odd": np.zeros(1, np.float32)}
    values["embed.weight"] = np.zeros((1, 4), np.float32)
    del values["lm_head.weight"]
    assert len(problems(model(2), table(tmp_path, values))) == 4


def test_files_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", tensors(1))
    assert len(index(model(1), read_table(folder(tmp_path)))["parameters"]) == 4


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ("model.{}", []),
        ("_orig_mod.model.{}", ["all tensors begin with `_orig_mod.`, which is left out"]),
        ("module._orig_mod.model.{}", ["all tensors begin with `module._orig_mod.`, which is left out"]),
        ("{}", ["the tensors lack `model.` before their names, as AutoModel saves them; it is put there"]),
        ("encoder.{}", []),
    ],
)
def test_a_prefix_that_all_tensors_have_or_lack(tmp_path: Path, saved: str, said: list[str]) -> None:
    """FAULTS B: what torch.compile, DataParallel and AutoModel make of names, which transformers loads too."""
    values = {name: value for name, value in tensors(2).items() if name != "lm_head.weight"}
    refs = table(tmp_path, {saved.format(name): value for name, value in values.items()})
    notes: list[str] = []
    found = with_prefix(refs, "", [f"model.{name}" for name in values] + ["model.rotary.inv_freq"], notes.append)
    assert notes == said
    wanted = {f"model.{name}" for name in values}
    assert set(found) == (wanted if saved != "encoder.{}" else set(refs))
    assert {ref.name for ref in found.values()} == set(refs), "for messages, a tensor keeps the name that the file has"


def test_digits_that_are_no_numbers() -> None:
    """`²` is a digit to str.isdigit and not to int."""
    assert sorted(["layers.10.x", "layers.²", "layers.9.x"], key=_natural) == ["layers.9.x", "layers.10.x", "layers.²"]
