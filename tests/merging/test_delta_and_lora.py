"""Sums of two checkpoints, tensor by tensor: a delta and its base, a base and its LoRA adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.checkpoints import computed, mapped
from mlcbuild.checkpoints.header import TensorRef, read_header
from mlcbuild.errors import CheckpointError
from mlcbuild.merging import adapter, delta, lora
from mlcbuild.models.parameters import Parameter
from tests.checkpoints.files import write

Arrays = Mapping[str, npt.NDArray[Any]]
RANDOM = np.random.default_rng(0)
PARAMETERS = (
    Parameter("embed.weight", (10, 4), "embedding", ("embed.weight",)),
    Parameter("qkv.weight", (12, 4), "qkv_proj", ("q.weight", "k.weight", "v.weight")),
    Parameter("norm.weight", (4,), "norm", ("norm.weight",)),
    Parameter("lm_head.weight", (10, 4), "lm_head", ("lm_head.weight",)),
)
SHAPES = {"embed.weight": (10, 4), "lm_head.weight": (10, 4), "norm.weight": (4,)} | {
    f"{name}.weight": (4, 4) for name in "qkv"
}


def random(dtype: Any = np.float16, **shapes: Any) -> dict[str, npt.NDArray[Any]]:
    return {name: np.asarray(RANDOM.normal(size=shape), dtype) for name, shape in (SHAPES | shapes).items()}


def table(root: Path, name: str, tensors: Arrays) -> dict[str, TensorRef]:
    return {ref.name: ref for ref in read_header(write(root / name, tensors), name, name)}


def written(root: Path, merged: list[computed.Computed]) -> dict[str, npt.NDArray[Any]]:
    (root / "out").mkdir(exist_ok=True)
    return {
        name: np.array(mapped.view(ref)) for name, ref in computed.write(computed.place(merged), root / "out").items()
    }


def sum_problem(root: Path, difference: Arrays, base: Arrays) -> str:
    with pytest.raises(CheckpointError) as error:
        delta.merged(PARAMETERS, table(root, "delta", difference), table(root, "base", base), ["rotary"])
    return str(error.value)


def test_a_delta_is_added_as_the_public_scripts_do(tmp_path: Path) -> None:
    """float16 + float16: one rounding, wherever it is done."""
    difference, base = random(), random()
    merged = delta.merged(PARAMETERS, table(tmp_path, "delta", difference), table(tmp_path, "base", base), [])
    found = written(tmp_path, merged)
    assert found.keys() == SHAPES.keys()
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], difference[name] + base[name], strict=True)


def test_a_sum_has_the_deltas_dtype(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = random(np.float32)
    difference = {name: torch.from_numpy(value).bfloat16() for name, value in random(np.float32).items()}
    stored = {name: value.view(torch.int16).numpy().view(np.uint16) for name, value in difference.items()}
    merged = delta.merged(PARAMETERS, table(tmp_path, "delta", stored), table(tmp_path, "base", base), [])
    for name, value in written(tmp_path, merged).items():
        expected = (difference[name].float() + torch.from_numpy(base[name])).bfloat16()
        np.testing.assert_array_equal(value, expected.view(torch.int16).numpy().view(np.uint16))


def test_tokens_that_the_base_lacks_are_the_deltas(tmp_path: Path) -> None:
    difference = random()
    base = random(**{"embed.weight": (8, 4), "lm_head.weight": (8, 4)}) | {"rotary": np.ones(2, np.float32)}
    merged = delta.merged(PARAMETERS, table(tmp_path, "delta", difference), table(tmp_path, "base", base), ["rotary"])
    found = written(tmp_path, merged)
    for name in ("embed.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found[name][:8], difference[name][:8] + base[name])
        np.testing.assert_array_equal(found[name][8:], difference[name][8:])


def test_sums_are_made_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed, "PIECE", 12)
    monkeypatch.setattr(computed, "FILE_BYTES", 100)
    test_tokens_that_the_base_lacks_are_the_deltas(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"tensors-{i}.bin" for i in range(3)]


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    base = random()
    assert sum_problem(tmp_path, random(), base | {"embed.weight": np.zeros((11, 4), np.float16)}) == (
        "delta_of: base: tensor embed.weight: 11 tokens, but the delta has 10: it was made from another base"
    )
    assert sum_problem(tmp_path, random(), base | {"q.weight": np.zeros((4, 6), np.float16)}).startswith(
        "delta_of: base: q.weight [4, 6], k.weight [4, 4], v.weight [4, 4]: joined by rows they are not the [12, 4] "
    )
    missing = {name: value for name, value in base.items() if name != "k.weight"}
    assert sum_problem(tmp_path, random(), missing | {"extra": base["norm.weight"]}) == (
        "delta_of: tensor k.weight is missing from the checkpoint\n"
        "delta_of: the checkpoint has a tensor extra that belongs to no parameter: the architecture has no use for it"
    )


CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "fan_in_fan_out": False, "use_dora": False}
P = "base_model.model."


def factors(module: str, out: int = 4, into: int = 4, rank: int = 2) -> dict[str, npt.NDArray[Any]]:
    """With small whole numbers, so that sums are exact."""
    return {
        f"{P}{module}.lora_A.weight": RANDOM.integers(-4, 4, (rank, into)).astype(np.float32),
        f"{P}{module}.lora_B.weight": RANDOM.integers(-4, 4, (out, rank)).astype(np.float32),
    }


def adapted(root: Path, tensors: Arrays, base: Arrays, **config: Any) -> dict[str, npt.NDArray[Any]]:
    folder = root / "adapter"
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    read = adapter.read({path.name: path for path in folder.iterdir()}, {})
    return written(root, lora.merged(read, table(root, "base", base), set(base)))


def adapter_problem(root: Path, tensors: Arrays, **config: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        adapted(root, tensors, random(), **config)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True, "lora_alpha": 6}, 6 / np.sqrt(2)),
        ({"alpha_pattern": {"q": 2}}, 1.0),
        ({"alpha_pattern": {"k": 2}}, 3.0),
        ({"r": 8, "rank_pattern": {"q": 2}}, 3.0),
    ],
)
def test_factors_are_multiplied_scaled_and_added(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    base, tensors = random(np.float32), factors("q")
    found = adapted(tmp_path, tensors, base, **config)
    a, b = (tensors[f"{P}q.lora_{side}.weight"] for side in "AB")
    assert found.keys() == {"q.weight"}
    np.testing.assert_array_equal(found["q.weight"], base["q.weight"] + (b @ a) * np.float32(scale), strict=True)


def test_the_other_orientation(tmp_path: Path) -> None:
    """`fan_in_fan_out`: W is stored [in, out]; embeddings are [tokens, dim] and have factors of other names."""
    base = random(np.float32, **{"q.weight": (4, 6)})
    tensors = factors("q", out=6, into=4)
    found = adapted(tmp_path, tensors, base, fan_in_fan_out=True)
    a, b = (tensors[f"{P}q.lora_{side}.weight"] for side in "AB")
    np.testing.assert_array_equal(found["q.weight"], base["q.weight"] + 3 * (b @ a).T)
    embedding = {
        f"{P}embed.lora_embedding_A": RANDOM.integers(-4, 4, (2, 10)).astype(np.float32),
        f"{P}embed.lora_embedding_B": RANDOM.integers(-4, 4, (4, 2)).astype(np.float32),
    }
    a, b = embedding.values()
    found = adapted(tmp_path, embedding, base)
    np.testing.assert_array_equal(found["embed.weight"], base["embed.weight"] + 3 * (b @ a).T)


def test_a_module_that_was_trained_as_a_whole(tmp_path: Path) -> None:
    base = random(np.float16)
    head = RANDOM.integers(-4, 4, (10, 4)).astype(np.float32)
    for name in ("lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.modules_to_save.default.weight"):
        found = adapted(tmp_path, factors("q") | {P + name: head}, base, modules_to_save=["lm_head"])
        assert found.keys() == {"q.weight", "lm_head.weight"}
        np.testing.assert_array_equal(found["lm_head.weight"], head.astype(np.float16), strict=True)


def test_names_with_and_without_the_familys_prefix(tmp_path: Path) -> None:
    base = random(np.float32)
    assert adapted(tmp_path, factors("transformer.q"), base).keys() == {"q.weight"}
    longer = {f"model.{name}": value for name, value in base.items()}
    assert adapted(tmp_path, factors("q"), longer).keys() == {"model.q.weight"}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"peft_type": "IA3"},
            "peft_type is 'IA3': only LORA adapters are merged; merge it with PEFT and save the whole model",
        ),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a number above 0"),
        ({"r": 0}, "r is 0, expected a whole number above 0"),
        ({"rank_pattern": {"q": 2.5}}, "rank_pattern: q is 2.5, expected a whole number above 0"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], expected an object of modules and numbers"),
        ({"alpha_pattern": {"q(": 2}}, "alpha_pattern: 'q(' is no pattern of a module's name"),
        ({"use_dora": True}, "use_dora is True, which is not merged here: merge with PEFT and save the model"),
        ({"bias": "all"}, "bias is 'all', which is not merged here: merge with PEFT and save the model"),
        (
            {"target_parameters": ["experts"]},
            "target_parameters is ['experts'], which is not merged here: merge with PEFT and save the model",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is 'pissa_niter_16', so the adapter belongs to changed base weights: "
            "merge with PEFT and save the model",
        ),
    ],
)
def test_adapters_that_are_not_merged(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    assert adapter_problem(tmp_path, factors("q"), **config) == f"lora: adapter_config.json: {text}"


def test_a_rank_that_the_configuration_does_not_say(tmp_path: Path) -> None:
    """PEFT does not load such an adapter; by which rank it was scaled in training is not known."""
    assert adapter_problem(tmp_path, factors("q", rank=3)) == (
        f"lora: adapter_model.safetensors: tensor {P}q.lora_A.weight has rank 3, but adapter_config.json says 2 (r, or "
        "rank_pattern), and what is added is scaled by it"
    )


def test_adapters_of_another_model(tmp_path: Path) -> None:
    assert adapter_problem(tmp_path, factors("qq")) == (
        "lora: the adapter changes qq.weight, which is no tensor of the base that the model uses; "
        "the model has q.weight"
    )
    file = "adapter_model.safetensors"
    assert adapter_problem(tmp_path, factors("q", out=5)) == (
        f"lora: {file}: {P}q.lora_A.weight [2, 4], {P}q.lora_B.weight [5, 2] do not fit q.weight [4, 4] of the base"
    )
    half = {name: value for name, value in factors("q").items() if "lora_A" in name}
    assert adapter_problem(tmp_path, half) == "lora: the adapter has no lora_B of q"
    assert adapter_problem(tmp_path, {P + "embed.weight": np.zeros((12, 4), np.float32)}) == (
        f"lora: {file}: tensor {P}embed.weight: shape [12, 4], the base's embed.weight is [10, 4]; "
        "the vocabulary was resized: merge with PEFT and save the whole model"
    )
    both = factors("q") | {P + "q.weight": np.zeros((4, 4), np.float32)}
    assert adapter_problem(tmp_path, both) == (
        f"lora: {file}: tensor {P}q.weight: the module is both trained as a whole and by factors"
    )
    magnitude = factors("q") | {P + "q.lora_magnitude_vector": np.zeros(4, np.float32)}
    assert adapter_problem(tmp_path, magnitude) == (
        f"lora: {file}: tensor {P}q.lora_magnitude_vector is no factor A or B of a matrix, and only those are merged"
    )
    whole = {P + "q.lora_A.weight": np.zeros((2, 4), np.int64)}
    assert adapter_problem(tmp_path, whole).startswith(
        f"lora: {file}: tensor {P}q.lora_A.weight: dtype I64, expected one of F16, BF16, F32"
    )
    assert adapter_problem(tmp_path, {}) == "lora: the adapter has no tensors"


def test_an_adapter_without_its_files(tmp_path: Path) -> None:
    def problem() -> str:
        with pytest.raises(CheckpointError) as error:
            adapter.read({path.name: path for path in tmp_path.iterdir()}, {})
        return str(error.value)

    assert problem() == "lora: adapter_config.json is missing: an adapter in PEFT's format has one"
    (tmp_path / "adapter_config.json").write_text("{")
    assert problem().startswith("lora: adapter_config.json: not valid JSON: ")
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    assert problem().startswith("lora: adapter_config.json: not valid JSON: ")
    (tmp_path / "adapter_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert problem().startswith("lora: adapter_config.json: a Git LFS pointer and not the file itself: ")
    (tmp_path / "adapter_config.json").write_text("[]")
    assert problem() == "lora: adapter_config.json: expected a mapping"
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert problem() == "lora: no adapter_model.safetensors and no adapter_model.bin"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert problem() == "lora: adapter_model.safetensors: truncated: 0 bytes, too short for a safetensors header"
