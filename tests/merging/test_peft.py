"""Adapters that PEFT itself saves, merged here and by `merge_and_unload`, saved and reloaded: the same."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import read
from mlcbuild.engine.job import local_job
from mlcbuild.errors import CheckpointError
from mlcbuild.merging import adapter
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import from_json
from mlcbuild.planning.shapes import adapter_of, read_config, shape_of
from mlcbuild.recipes.types import Catalog, Locked, Model, Source
from mlcbuild.steps import convert
from tests.architectures.agreement import known_architectures
from tests.checkpoints.files import write
from tests.checkpoints.test_convert_and_quantize import save

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT says that tied weights are difficult
    pytest.mark.skipif(find_spec("peft") is None, reason="needs peft"),  # which takes seconds to import
]

EMBEDDING, HEAD = "embed_tokens", "lm_head"
# Targets and saved modules beside q_proj, and whether PEFT is to keep them tied.
CASES: dict[str, tuple[list[str], list[str], bool]] = {
    "nothing of them": ([], [], False),
    "embedding": ([EMBEDDING], [], False),
    "head": ([HEAD], [], False),
    "both": ([EMBEDDING, HEAD], [], False),
    "both, tied": ([EMBEDDING, HEAD], [], True),
    "saved embedding": ([], [EMBEDDING], False),
    "saved head": ([], [HEAD], False),
    "saved both": ([], [EMBEDDING, HEAD], False),
    "saved both, tied": ([], [EMBEDDING, HEAD], True),
    "saved embedding, tied": ([], [EMBEDDING], True),
    "embedding, saved head": ([EMBEDDING], [HEAD], False),
    "head, saved embedding": ([HEAD], [EMBEDDING], False),
}


def train(folder: Path, tied: bool, targets: list[str], saved: list[str], keep: bool) -> None:
    """A base in `folder/base`, and in `folder/adapter` what PEFT saves of it with random weights."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    save(folder / "base", tied=tied, dtype="float32")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", *targets],
        modules_to_save=saved or None,
        init_lora_weights=False,
        ensure_weight_tying=keep,
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    done = set()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and parameter.data_ptr() not in done:
            parameter.data += torch.randn_like(parameter)
            done.add(parameter.data_ptr())
    model.save_pretrained(str(folder / "adapter"))


def merged_by_peft(folder: Path) -> dict[str, Any]:
    """The weights of the adapter merged into the base, saved, and read again."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(str(folder / "merged"))
    state = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}


def merged_here(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What convert makes of the same as planning sees it, by checkpoint tensor, and its notes."""
    catalog = Catalog(folder, {}, {}, known_architectures(), {}, {}, {})
    lora = Model("tiny", Source(path=folder / "base"), "", lora=Source(path=folder / "adapter"))
    shape = shape_of(
        catalog,
        lora,
        read_config(folder / "base" / "config.json"),
        {},
        adapter_of(lora, lambda source: Locked("", {}, {})),
    )
    model = from_json(shape.fields)
    inputs = {"checkpoint": folder / "base", "lora": folder / "adapter"}
    job = local_job(inputs, {"structure": shape.fields, **({"untied": True} if shape.untied else {})}, folder / "job")
    convert.run(job)
    found = {}
    document = json.loads((job.output / "parameters.json").read_text())
    for entry in document["parameters"]:
        for part in entry["parts"]:
            path = next(path for path in (job.output / part["file"], folder / "base" / part["file"]) if path.exists())
            facts = (part["offset"], part["nbytes"], "F32", tuple(part["shape"]))
            found[part["tensor"]] = read(TensorRef(part["tensor"], "", "", path, *facts))
    assert found.keys() == {source for parameter in parameters(model) for source in parameter.sources}
    return found, document.get("notes", [])


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        merged_here(folder)
    return str(error.value)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_merged_as_peft_does(tmp_path: Path, case: str, tied: bool) -> None:
    """FAULTS A6 (tied, saved embedding: 2 sigma from PEFT) and B (copies in `base_layer`, heads saved twice).

    With factors alone what PEFT merges is not what it trained, and that is noted.
    """
    targets, saved, keep = CASES[case]
    train(tmp_path, tied, targets, saved, keep)
    expected = merged_by_peft(tmp_path)
    found, notes = merged_here(tmp_path)
    assert (HEAD + ".weight" in found) == (not tied or (bool(saved) and not keep))
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=2e-6, err_msg=name)
    ends = " and ".join(sorted(HEAD if target == HEAD else f"model.{target}" for target in targets))
    noted = f"the adapter has factors of {ends}, and the base's output matrix is its embedding (tie_word_embeddings): "
    assert len(notes) == (tied and bool(targets) and not saved) and all(note.startswith(noted) for note in notes)


def test_trained_apart_though_the_configuration_does_not_say_so(tmp_path: Path) -> None:
    """FAULTS A6, a sibling: what planning reads, and what the weights hold."""
    train(tmp_path, True, [], [HEAD], False)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    assert refusal(tmp_path) == (
        "lora: the weights hold lm_head with other values than the base's embedding, which is its output matrix too "
        "(tie_word_embeddings), and adapter_config.json does not say that they are trained apart (modules_to_save "
        "without ensure_weight_tying): merge with PEFT and save the whole model"
    )


def change(file: Path, name: str) -> None:
    """Add 1 to a value of the tensor whose name ends so."""
    from safetensors.numpy import load_file

    tensors = load_file(file)
    (full,) = (each for each in tensors if each.endswith(name))
    tensors[full][1, 1] += 1
    write(file, tensors)


def test_a_copy_of_the_base_is_compared_with_it(tmp_path: Path) -> None:
    """FAULTS A4, a sibling: the adapter and the base both hold the embedding."""
    train(tmp_path, False, [EMBEDDING], [], False)
    change(tmp_path / "adapter" / "adapter_model.safetensors", "embed_tokens.base_layer.weight")
    assert refusal(tmp_path) == (
        "lora: adapter_model.safetensors: tensor base_model.model.model.embed_tokens.base_layer.weight: differs from "
        "the base's model.embed_tokens.weight, which it is a copy of: the adapter was trained on another base; name "
        "that one as `source`"
    )


@pytest.mark.parametrize(
    ("key", "targets", "saved", "lost", "text"),
    [
        ("modules_to_save", [], [HEAD], "lm_head.weight", "names lm_head, but the weights hold nothing of lm_head: "),
        (
            "target_modules",
            ["k_proj"],
            [],
            "layers.1.self_attn.k_proj.lora_",
            "names k_proj, but the weights hold nothing of model.layers.1.self_attn.k_proj: ",
        ),
    ],
)
def test_the_configuration_and_the_weights_name_the_same_modules(
    tmp_path: Path, key: str, targets: list[str], saved: list[str], lost: str, text: str
) -> None:
    """FAULTS A4, a sibling: PEFT warns of it and merges what is there."""
    from safetensors.numpy import load_file

    train(tmp_path, False, targets, saved, False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    write(file, {name: value for name, value in load_file(file).items() if lost not in name})
    assert refusal(tmp_path) == (
        f"lora: adapter_config.json: {key} {text}the file is cut short, or belongs to another configuration"
    )


def test_an_adapter_of_another_base_is_noted(tmp_path: Path) -> None:
    """FAULTS A4, a sibling: a copy of a repository has another name, so this is said and not refused."""
    train(tmp_path, False, [], [], False)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for named, noted in (("owner/a", False), ("Owner/A", False), (str(tmp_path / "base"), False), ("owner/b", True)):
        path.write_text(json.dumps(config | {"base_model_name_or_path": named}))
        read = adapter.read({each.name: each for each in path.parent.iterdir()}, {})
        text = "adapter_config.json says that the adapter was trained on owner/b, and it is laid over owner/a: "
        assert adapter.other_base(read, "owner/a") == (f"{text}are they the same?" if noted else None)
