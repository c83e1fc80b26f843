"""Adapters that PEFT itself saves, merged here and by `merge_and_unload`, saved and reloaded: the same, or refused."""

from __future__ import annotations

import json
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
from mlcbuild.steps import convert
from tests.checkpoints.files import write
from tests.checkpoints.test_convert_and_quantize import save, structure

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT says that tied weights are difficult

EMBEDDING, HEAD = "embed_tokens", "lm_head"
UNTIES = "lora: the adapter unties what the base ties (tie_word_embeddings): with its "
FACTORS = "and the base's output matrix is its embedding (tie_word_embeddings): PEFT computes another model with the"
# Targets and saved modules beside q_proj, whether PEFT is to keep them tied; what is said for a base that ties them.
CASES: dict[str, tuple[list[str], list[str], bool, str | None]] = {
    "nothing of them": ([], [], False, None),
    "embedding": ([EMBEDDING], [], False, FACTORS),
    "head": ([HEAD], [], False, FACTORS),
    "both": ([EMBEDDING, HEAD], [], False, FACTORS),
    "both, tied": ([EMBEDDING, HEAD], [], True, FACTORS),
    "saved embedding": ([], [EMBEDDING], False, f"{UNTIES}model.embed_tokens the embedding and the output matrix"),
    "saved head": ([], [HEAD], False, f"{UNTIES}lm_head the embedding and the output matrix are two"),
    "saved both": ([], [EMBEDDING, HEAD], False, f"{UNTIES}lm_head and model.embed_tokens the embedding and the"),
    "saved both, tied": ([], [EMBEDDING, HEAD], True, None),
    "saved embedding, tied": ([], [EMBEDDING], True, None),
    "embedding, saved head": ([EMBEDDING], [HEAD], False, FACTORS),
    "head, saved embedding": ([HEAD], [EMBEDDING], False, FACTORS),
}


def train(folder: Path, tied: bool, targets: list[str], saved: list[str], keep: bool) -> None:
    """A base in `folder/base`, and in `folder/adapter` what PEFT saves of it with random weights."""
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
    model.save_pretrained(folder / "adapter")


def merged_by_peft(folder: Path) -> dict[str, Any]:
    """The weights of the adapter merged into the base, saved, and read again."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    state = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    return {name: tensor.numpy() for name, tensor in state.items()}


def merged_here(folder: Path) -> dict[str, Any]:
    """What convert makes of the same, by checkpoint tensor."""
    model = structure(folder / "base")
    inputs = {"checkpoint": folder / "base", "lora": folder / "adapter"}
    job = local_job(inputs, {"structure": model.to_json()}, folder / "job")
    convert.run(job)
    found = {}
    for entry in json.loads((job.output / "parameters.json").read_text())["parameters"]:
        for part in entry["parts"]:
            path = next(path for path in (job.output / part["file"], folder / "base" / part["file"]) if path.exists())
            facts = (part["offset"], part["nbytes"], "F32", tuple(part["shape"]))
            found[part["tensor"]] = read(TensorRef(part["tensor"], "", "", path, *facts))
    assert found.keys() == {source for parameter in parameters(model) for source in parameter.sources}
    return found


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        merged_here(folder)
    return str(error.value)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_merged_as_peft_does_or_refused(tmp_path: Path, case: str, tied: bool) -> None:
    """FAULTS A6 (tied, saved embedding: 2 sigma from PEFT) and B (copies in `base_layer`, heads saved twice)."""
    targets, saved, keep, refused = CASES[case]
    train(tmp_path, tied, targets, saved, keep)
    if tied and refused:
        assert refused in refusal(tmp_path)
        return
    expected = merged_by_peft(tmp_path)
    for name, value in merged_here(tmp_path).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6, err_msg=name)


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
