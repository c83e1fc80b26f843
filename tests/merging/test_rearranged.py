"""Parameters that are not a checkpoint's tensors as they are, made by the step convert, against NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from mlcbuild.checkpoints import computed
from mlcbuild.engine.job import local_job
from mlcbuild.errors import CheckpointError
from mlcbuild.merging.rearranged import ungrouped
from mlcbuild.models.architecture import resolve
from mlcbuild.models.parameters import parameters
from mlcbuild.models.structure import Structure
from mlcbuild.steps import convert
from tests.architectures import family_cases
from tests.architectures.agreement import config_of, save
from tests.architectures.cases import CASES as OWN
from tests.support import llama

Array = npt.NDArray[Any]
CASES = {**OWN, **family_cases.CASES}


def checkpoint(name: str, folder: Path) -> tuple[Structure, dict[str, Array]]:
    """A case's checkpoint in `folder` and its tensors."""
    from safetensors.numpy import load_file

    save(CASES[name], folder)
    config = json.loads((folder / "config.json").read_text())
    return resolve(llama.architecture(CASES[name].architecture), config, {}), load_file(folder / "model.safetensors")


def converted(model: Structure, folder: Path, work: Path, **inputs: Path) -> dict[str, Array]:
    """Every parameter as parameters.json describes it."""
    fields = {"structure": model.to_json()}
    job = local_job({"checkpoint": folder, **inputs}, fields, work)
    convert.run(job)
    files = {path.name: path for path in job.output.iterdir()}
    known = {entry.digest: entry.path for tree in job.inputs.values() for entry in tree.files.values()}
    found = {}
    for entry in json.loads(files["parameters.json"].read_text())["parameters"]:
        parts = []
        for part in entry["parts"]:
            path = files.get(part["file"]) or known[part["blob"]]
            count = part["nbytes"] // 4
            parts.append(np.fromfile(path, np.float32, count, offset=part["offset"]).reshape(part["shape"]))
        found[entry["name"]] = np.concatenate(parts).reshape(entry["shape"])
    return found


def test_matrices_are_transposed_and_biases_are_not(tmp_path: Path) -> None:
    model, tensors = checkpoint("gpt2", tmp_path / "checkpoint")
    found = converted(model, tmp_path / "checkpoint", tmp_path / "job")
    for name in ("attn.c_attn", "mlp.c_proj"):
        name = f"transformer.h.1.{name}"
        np.testing.assert_array_equal(found[f"{name}.weight"], tensors[f"{name}.weight"].T)
        np.testing.assert_array_equal(found[f"{name}.bias"], tensors[f"{name}.bias"])


def test_a_large_matrix_is_transposed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed, "PIECE", 100)
    test_matrices_are_transposed_and_biases_are_not(tmp_path)


def test_parts_of_one_matrix_and_these_one_by_one_become_the_same(tmp_path: Path) -> None:
    """HRM-Text's checkpoints have a layer's gate, queries, keys and values joined, or apart."""
    model, tensors = checkpoint("hrm_text-tied", tmp_path / "joined")
    found = converted(model, tmp_path / "joined", tmp_path / "job")
    whole = tensors["model.H_module.layers.0.attn.gqkv_proj.weight"]
    at = "model.H_module.layers.0.self_attn"
    np.testing.assert_array_equal(found[f"{at}.gate_proj.weight"], whole[:64])
    np.testing.assert_array_equal(found[f"{at}.qkv_proj.weight"], whole[64:])
    apart = {name: values for name, values in tensors.items() if "gqkv" not in name}
    for name in (name for name in tensors if "gqkv" in name):
        for part, values in zip(["gate", "q", "k", "v"], np.split(tensors[name], 4), strict=True):
            apart[name.replace("attn.gqkv", f"self_attn.{part}")] = np.ascontiguousarray(values)
    same_under_other_names(model, apart, found, tmp_path)


def test_attention_and_mlp_as_layers_apart_become_the_same(tmp_path: Path) -> None:
    """Dory's names on the hub, and those that transformers writes; its vectors are trained as parts of what is used."""
    model, tensors = checkpoint("dory", tmp_path / "one")
    found = converted(model, tmp_path / "one", tmp_path / "job")
    at = "backbone.layers.1"
    factors = tensors[f"{at}.self_attn.sqk"] * 24**0.5 / 0.5
    np.testing.assert_allclose(found[f"{at}.self_attn.sqk"], factors**2, rtol=1e-6)
    np.testing.assert_allclose(found[f"{at}.lambda_2"], np.abs(tensors[f"{at}.lambda_2"]) * 0.05 / 0.5, rtol=1e-6)
    apart = {}
    for name, values in tensors.items():
        start, _, rest = name.partition("layers.")
        number, _, part = rest.partition(".")
        second = part.startswith("mlp.") or part == "lambda_2"
        part = {"lambda_1": "attn_alpha", "lambda_2": "mlp_alpha"}.get(part, f"mixer.{part.partition('.')[2]}")
        apart[f"{start}layers.{2 * int(number) + second}.{part}" if rest else name] = values
    same_under_other_names(model, apart, found, tmp_path)


def same_under_other_names(model: Structure, apart: dict[str, Array], found: dict[str, Array], folder: Path) -> None:
    (folder / "apart").mkdir()
    save_file(apart, folder / "apart" / "model.safetensors")
    again = converted(model, folder / "apart", folder / "again")
    assert found.keys() == again.keys() and all((found[name] == again[name]).all() for name in found)


def test_rows_of_head_groups_are_put_in_order(tmp_path: Path) -> None:
    model, tensors = checkpoint("internlm2", tmp_path / "checkpoint")
    found = converted(model, tmp_path / "checkpoint", tmp_path / "job")
    name = "model.layers.0.attention.wqkv.weight"
    groups = tensors[name].reshape(2, 4, 16, 64)  # two key-value heads, each with two queries, a key, a value
    expected = np.concatenate(
        [groups[:, :2].reshape(-1, 64), groups[:, 2].reshape(-1, 64), groups[:, 3].reshape(-1, 64)]
    )
    np.testing.assert_array_equal(found[name], expected)
    assert ungrouped((2, 2, 1, 1)).tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


def test_norms_become_one_plus_what_is_stored(tmp_path: Path) -> None:
    model, tensors = checkpoint("gemma", tmp_path / "checkpoint")
    found = converted(model, tmp_path / "checkpoint", tmp_path / "job")
    np.testing.assert_array_equal(found["model.norm.weight"], tensors["model.norm.weight"] + np.float32(1))


def test_rows_of_a_normed_head_have_length_one(tmp_path: Path) -> None:
    model, tensors = checkpoint("baichuan2", tmp_path / "checkpoint")
    found = converted(model, tmp_path / "checkpoint", tmp_path / "job")["lm_head.weight"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found[:5] * np.linalg.norm(tensors["lm_head.weight"][:5], axis=1)[:, None],
                               tensors["lm_head.weight"][:5], rtol=1e-5)  # fmt: skip


def test_a_delta_is_added_before_it_is_rearranged(tmp_path: Path) -> None:
    model, tensors = checkpoint("gpt2", tmp_path / "base")
    delta = {name: np.ascontiguousarray(values[::-1]) for name, values in tensors.items()}
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    save_file(delta, tmp_path / "delta" / "model.safetensors")
    found = converted(model, tmp_path / "delta", tmp_path / "job", base=tmp_path / "base")
    name = "transformer.h.2.mlp.c_fc.weight"
    np.testing.assert_array_equal(found[name], (tensors[name] + delta[name]).T)
    name = "transformer.ln_f.bias"
    np.testing.assert_array_equal(found[name], tensors[name] + delta[name])


def test_names_without_their_prefix(tmp_path: Path) -> None:
    """The first GPT-2 on the hub has `h.0.ln_1.weight`, later ones `transformer.h.0.ln_1.weight`."""
    model, tensors = checkpoint("gpt2", tmp_path / "long")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text((tmp_path / "long" / "config.json").read_text())
    short = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    short["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)  # a causal mask, which older files have
    save_file(short, tmp_path / "short" / "model.safetensors")
    one, other = (converted(model, tmp_path / name, tmp_path / f"job-{name}") for name in ("long", "short"))
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_a_shape_is_judged_as_it_will_be(tmp_path: Path) -> None:
    model, tensors = checkpoint("gpt2", tmp_path / "checkpoint")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"c_fc\.weight: shape \[64, 96\] once transposed, but config\.json makes it \[96, 64\]"
    ):
        converted(model, tmp_path / "checkpoint", tmp_path / "job")


def test_biases_stay_float32_where_mlc_has_them_so() -> None:
    model = resolve(llama.architecture("gpt_neox"), config_of(CASES["gpt_neox"]), {})
    dtypes = {each.name: each.dtype for each in parameters(model)}
    assert dtypes["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"] == "float32"
    assert dtypes["gpt_neox.layers.0.attention.dense.bias"] is None
