"""From parameters.json to a weights folder: values, errors, and what must not depend on threads or pieces."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.errors import CheckpointError, MlcBuildError
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization import floats, group, search, sources, stream
from mlcbuild.quantization.dequantize import dequantized
from mlcbuild.quantization.packing import Packed
from mlcbuild.quantization.schemes import quantized_parameters
from mlcbuild.quantization.tensor_cache import read_index, read_tensors
from mlcbuild.recipes.types import Quantization, Weights
from tests.checkpoints.files import write

NK = Weights(bits=4, group_size=32, storage_dtype="uint32", layout="NK", symmetric=True)
Q4F16 = Quantization("q4f16_1", "q4", "float16", NK, "quantized", "quantized")
Q4F32 = replace(Q4F16, name="q4f32_1", model_dtype="float32")
Q0F16 = Quantization("q0f16", "q0", "float16")
Q0F32 = Quantization("q0f32", "q0", "float32")


PARAMETERS = (
    Parameter("embed.weight", (50, 100), "embedding", ("embed.weight",)),
    Parameter("qkv_proj.weight", (48, 100), "qkv_proj", ("q.weight", "k.weight", "v.weight")),
    Parameter("norm.weight", (100,), "final_norm", ("norm.weight",)),
    Parameter("lm_head.weight", (50, 100), "lm_head", ("lm_head.weight",)),
)
SHAPES = {
    "embed.weight": (50, 100),
    "q.weight": (24, 100),
    "k.weight": (12, 100),
    "v.weight": (12, 100),
    "norm.weight": (100,),
    "lm_head.weight": (50, 100),
}


def tensors(dtype: str, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: floats.cast((rng.standard_normal(shape) * 0.02).astype(np.float32), "float32", dtype)
        for name, shape in SHAPES.items()
    }


def run(folder: Path, dtype: str, quantization: Quantization, **options: Any) -> dict[str, npt.NDArray[Any]]:
    values = options.pop("values", None) or tensors(dtype)
    path = write(folder / "model.safetensors", values)
    document = index(PARAMETERS, read_table({path.name: path}, {path.name: "digest"}))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    stream.quantize(document, {"digest": path}, PARAMETERS, quantization, out, **options)
    read = dict(read_tensors(out))
    declared = quantized_parameters(PARAMETERS, quantization)
    assert [(made.name, made.shape) for made in declared] == [(name, value.shape) for name, value in read.items()]
    return read


def joined(dtype: str) -> dict[str, npt.NDArray[np.float32]]:
    values = {name: floats.widen(value, dtype) for name, value in tensors(dtype).items()}
    return {each.name: np.concatenate([values[source] for source in each.sources]) for each in PARAMETERS}


@pytest.mark.parametrize("quantization", [Q4F16, Q4F32], ids=lambda q: str(q.name))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_packed_weights(tmp_path: Path, dtype: str, quantization: Quantization) -> None:
    read = run(tmp_path, dtype, quantization)
    model_dtype = quantization.model_dtype
    for name, expected in joined(dtype).items():
        if name == "norm.weight":
            assert np.array_equal(read[name], expected.astype(model_dtype))
            continue
        prefix = name.removesuffix("weight")
        packed = Packed(read[f"{prefix}q_weight"], read[f"{prefix}q_scale"])
        decoded = group.decode(packed, 100, NK, model_dtype)
        assert np.abs(decoded - expected).max() <= 0.51 * packed.scales.astype(np.float32).max()
        whole = group.encode(expected, "float32", NK, model_dtype)
        assert np.array_equal(packed.words, whole.words) and np.array_equal(packed.scales, whole.scales)


@pytest.mark.parametrize("quantization", [Q0F16, Q0F32], ids=lambda q: str(q.name))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_unquantized_weights(tmp_path: Path, dtype: str, quantization: Quantization) -> None:
    read = run(tmp_path, dtype, quantization)
    for name, expected in joined(dtype).items():
        assert np.array_equal(read[name], expected.astype(quantization.model_dtype))


def test_kn_is_the_transpose(tmp_path: Path) -> None:
    nk = run(tmp_path / "nk", "bfloat16", Q4F16)
    kn = run(tmp_path / "kn", "bfloat16", replace(Q4F16, weights=replace(NK, layout="KN")))
    for name, value in nk.items():
        same = name.startswith(("embed", "norm"))
        assert np.array_equal(kn[name], value if same else value.T), name


@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize("quantization", [Q4F16, Q4F32, Q0F16], ids=lambda q: str(q.name))
def test_dequantized_is_near_the_original(tmp_path: Path, quantization: Quantization, layout: Any) -> None:
    if quantization.weights is not None:
        quantization = replace(quantization, weights=replace(quantization.weights, layout=layout))
    run(tmp_path, "bfloat16", quantization)
    wanted = joined("bfloat16")
    read = dict(dequantized(tmp_path / "out", PARAMETERS, quantization))
    assert list(read) == list(wanted)
    for name, value in wanted.items():
        bound = 0.51 * np.abs(value).max() / 7 if value.ndim == 2 and quantization.weights else 1e-4
        assert read[name].dtype == np.float32 and np.abs(read[name] - value).max() <= bound
        assert np.abs(read[name] - value).mean() <= bound / 2


def test_dequantized_refuses_another_models_folder(tmp_path: Path) -> None:
    run(tmp_path, "bfloat16", Q4F16)
    with pytest.raises(MlcBuildError, match=r"tensor lm_head\.q_weight \[50, 16\]: q4f16_1 has no such tensor"):
        list(dequantized(tmp_path / "out", PARAMETERS[:-1], Q4F16))
    wider = replace(PARAMETERS[0], shape=(51, 100))
    with pytest.raises(MlcBuildError, match=r"tensor embed\.q_weight \[50, 16\]: expected \[51, 16\]"):
        list(dequantized(tmp_path / "out", (wider, *PARAMETERS[1:]), Q4F16))
    more = replace(PARAMETERS[2], name="other.weight")
    with pytest.raises(MlcBuildError, match=r"tensor other\.weight is missing \(1 in all\)"):
        list(dequantized(tmp_path / "out", (*PARAMETERS, more), Q4F16))


def test_float32_is_stored_short_only_where_nothing_is_lost(tmp_path: Path) -> None:
    def formats(folder: Path) -> dict[str, str]:
        shards = read_index(folder / "out")["records"]
        return {record["name"]: record["format"] for shard in shards for record in shard["records"]}

    run(tmp_path / "bfloat16", "bfloat16", Q0F32)
    assert set(formats(tmp_path / "bfloat16").values()) == {"f32-to-bf16"}
    values = tensors("float32")
    values["norm.weight"][:] = 1.5
    run(tmp_path / "float32", "float32", Q0F32, values=values)
    assert formats(tmp_path / "float32") == {each.name: "raw" for each in PARAMETERS} | {"norm.weight": "f32-to-bf16"}
    run(tmp_path / "packed", "bfloat16", Q4F32)
    assert formats(tmp_path / "packed")["embed.q_scale"] == "raw"


def test_bytes_do_not_depend_on_threads_or_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}

    run(tmp_path / "one", "bfloat16", Q4F16, threads=1)
    monkeypatch.setattr(sources, "PIECE", 700)
    run(tmp_path / "many", "bfloat16", Q4F16, threads=5)
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


def test_shards_are_split_and_sizes_recorded(tmp_path: Path) -> None:
    run(tmp_path, "bfloat16", Q4F16, shard_bytes=6000)
    document = read_index(tmp_path / "out")
    assert len(document["records"]) > 2
    assert document["metadata"]["ParamSize"] == 7
    bits = document["metadata"]["ParamBytes"] * 8 / (50 * 100 * 2 + 48 * 100 + 100)
    assert document["metadata"]["BitsPerParam"] == bits


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(tmp_path, "bfloat16", Q4F16, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (29800, 29800)
    assert seen == sorted(seen)


@pytest.mark.parametrize("quantization", [Q4F16, Q0F32], ids=lambda q: str(q.name))
@pytest.mark.parametrize(
    ("bad", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "-Inf")], ids=["nan", "inf", "-inf"]
)
def test_nan_and_inf_name_the_tensor(tmp_path: Path, bad: float, word: str, quantization: Quantization) -> None:
    values = tensors("float16")
    values["k.weight"][3, 17] = bad
    values["k.weight"][9, 1] = bad
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, "float16", quantization, values=values)
    assert str(error.value) == (
        f"model.safetensors: tensor k.weight (parameter qkv_proj.weight): {word} at [3, 17]; the checkpoint is damaged"
    )
    assert not (tmp_path / "out" / "tensor-cache.json").exists()


@pytest.mark.parametrize("name", ["norm.weight", "lm_head.weight"])
def test_overflow_to_float16_names_the_tensor(tmp_path: Path, name: str) -> None:
    values = tensors("float32")
    values[name].reshape(-1)[7] = -70000
    position = "[7]" if name == "norm.weight" else "[0, 7]"
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, "float32", Q4F16, values=values)
    assert str(error.value) == (
        f"model.safetensors: tensor {name} (parameter {name}): -70000 at {position} is too large for float16; "
        "use a quantization whose model_dtype is float32"
    )


def test_another_structure_or_a_lost_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", tensors("float32"))
    document = index(PARAMETERS, read_table({path.name: path}, {path.name: "0123"}))
    with pytest.raises(CheckpointError, match=r"lists other parameters than the structure has; run convert again"):
        stream.quantize(document, {"0123": path}, PARAMETERS[:-1], Q4F16, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the checkpoint's file is gone \(sha256 0123\)"):
        stream.quantize(document, {}, PARAMETERS, Q4F16, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated: it is shorter now than when its tensors were indexed"):
        stream.quantize(document, {"0123": path}, PARAMETERS, Q4F16, tmp_path)


def test_bytes_do_not_depend_on_the_compiled_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = run(tmp_path / "numpy", "float16", Q4F16)
    monkeypatch.setattr(stream, "_WORTH_COMPILING", 0)
    (tmp_path / "scratch").mkdir()
    compiled = run(tmp_path / "compiled", "float16", Q4F16, scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").glob("*.so"))
    assert all(np.array_equal(numpy[name], compiled[name]) for name in numpy)


IMPORTANCE = {
    name: np.exp(np.random.default_rng(seed).standard_normal(100)).astype(np.float32)
    for seed, name in enumerate(("qkv_proj.weight", "lm_head.weight"))
}


@pytest.mark.parametrize("rounding", ["mse", "calibrated"])
def test_searched_scales(tmp_path: Path, rounding: Any) -> None:
    """By parameter: with its importance where it has one, without where it has none, as search.encode does it."""
    made = run(tmp_path, "float32", replace(Q4F16, rounding=rounding), importance=IMPORTANCE)
    for name, values in joined("float32").items():
        if values.ndim == 1:
            assert np.array_equal(made[name], values.astype(np.float16))
            continue
        weighted = IMPORTANCE.get(name) if rounding == "calibrated" else None
        wanted = search.encode(values, "float32", NK, "float16", weighted)
        prefix = name.removesuffix("weight")
        assert np.array_equal(made[f"{prefix}q_weight"], wanted.words), name
        assert np.array_equal(made[f"{prefix}q_scale"], wanted.scales), name


@pytest.mark.parametrize(
    ("importance", "text"),
    [
        (None, "rounding: calibrated needs the importance of each layer's inputs, and none was measured"),
        ({"x.weight": np.ones(100)}, "importance of x.weight: the model has no such parameter; measure it again"),
        (
            {"qkv_proj.weight": np.ones(99)},
            "importance of qkv_proj.weight: shape [99], but the parameter is [48, 100]",
        ),
        (
            {"qkv_proj.weight": np.full(100, np.nan)},
            "importance of qkv_proj.weight: expected finite numbers, none below 0; measure it again",
        ),
        (
            {"qkv_proj.weight": np.full(100, -1.0)},
            "importance of qkv_proj.weight: expected finite numbers, none below 0; measure it again",
        ),
    ],
)
def test_importance_that_does_not_fit(tmp_path: Path, importance: Any, text: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        run(tmp_path, "float32", replace(Q4F16, rounding="calibrated"), importance=importance)
    assert str(error.value) == text


@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_matrices_that_are_rounded_already(tmp_path: Path, layout: Any) -> None:
    """They are taken as they are, in pieces; what nobody rounded is rounded as by `mse`."""
    weights = replace(NK, layout=layout)
    values = joined("float32")
    other = group.encode(values["qkv_proj.weight"] * 2, "float32", NK, "float16")
    gptq = replace(Q4F16, weights=weights, rounding="gptq")
    made = run(tmp_path, "float32", gptq, ready={"qkv_proj.weight": other})
    words, scales = (made[f"qkv_proj.{form}"] for form in ("q_weight", "q_scale"))
    assert np.array_equal(words.T if layout == "KN" else words, other.words)
    assert np.array_equal(scales.T if layout == "KN" else scales, other.scales)
    wanted = search.encode(values["embed.weight"], "float32", NK, "float16")
    assert np.array_equal(made["embed.q_weight"], wanted.words)


@pytest.mark.parametrize(
    ("ready", "text"),
    [
        (None, "rounding: gptq takes matrices that were rounded layer by layer, and none were"),
        ({"x.weight": (48, 16, 4)}, "rounded x.weight: the model has no such parameter; round it again"),
        ({"qkv_proj.weight": (47, 16, 4)}, "rounded qkv_proj.weight: shape [47, 16], expected [48, 16]"),
        ({"qkv_proj.weight": (48, 16, 5)}, "rounded qkv_proj.weight: shape [48, 5], expected [48, 4]"),
    ],
)
def test_rounded_matrices_that_do_not_fit(tmp_path: Path, ready: Any, text: str) -> None:
    given = ready and {
        name: Packed(np.zeros((rows, words), np.uint32), np.zeros((rows, scales), np.float16))
        for name, (rows, words, scales) in ready.items()
    }
    with pytest.raises(MlcBuildError) as error:
        run(tmp_path, "float32", replace(Q4F16, rounding="gptq"), ready=given)
    assert str(error.value) == text


def test_overrides_reach_the_folder(tmp_path: Path) -> None:
    notes: list[str] = []
    overrides = (("lm_head", replace(NK, bits=8)), ("embedding", None), ("o_proj", None))
    made = run(tmp_path, "float32", replace(Q4F16, overrides=overrides), note=notes.append)
    assert made["embed.weight"].dtype == np.float16
    assert made["qkv_proj.q_weight"].shape == (48, 16)
    wanted = group.encode(joined("float32")["lm_head.weight"], "float32", replace(NK, bits=8), "float16")
    assert np.array_equal(made["lm_head.q_weight"], wanted.words)
    assert notes == ["override 'o_proj' matches no parameter of this model"]


OUTER = Weights(8, 0, "uint8", "KN", False, scheme="minmax_outer")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_bad_values_of_formats_with_ranges_name_the_tensor(tmp_path: Path, value: float) -> None:
    values = tensors("float16")
    values["k.weight"][5, 6] = value
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, "float16", replace(Q4F16, weights=OUTER, embedding="kept"), values=values)
    what = "NaN" if np.isnan(value) else "-Inf"
    assert str(error.value) == (
        f"model.safetensors: tensor k.weight (parameter qkv_proj.weight): {what} at [5, 6]; the checkpoint is damaged"
    )


def test_values_that_are_too_far_apart(tmp_path: Path) -> None:
    values = tensors("float32")
    values["k.weight"][5, :64] = 3e38
    values["k.weight"][5, 6] = -3.1e38
    weights = Weights(4, 20, "uint32", "NK", False, packed_scale_min="bf16x2")
    weights = replace(weights, bits=8)
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, "float32", replace(Q4F32, weights=weights), values=values)
    assert str(error.value) == (
        "model.safetensors: tensor k.weight (parameter qkv_proj.weight): -3.1e+38 at [5, 6] is too large for bfloat16; "
        "use a quantization whose model_dtype is float32, with symmetric weights"
    )
    values = tensors("float32")
    values["lm_head.weight"][3], values["lm_head.weight"][4] = -65000, 65000
    with pytest.raises(CheckpointError) as error:
        run(tmp_path, "float32", replace(Q4F16, weights=OUTER, embedding="kept"), values=values)
    assert str(error.value) == (
        "model.safetensors: parameter lm_head.weight: its values are too far apart for ranges in float16; choose "
        "another quantization"
    )


def test_ranges_do_not_depend_on_threads_or_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization = replace(Q4F16, weights=OUTER, embedding="kept")
    one = run(tmp_path / "one", "bfloat16", quantization, threads=1)
    monkeypatch.setattr(sources, "PIECE", 700)
    many = run(tmp_path / "many", "bfloat16", quantization, threads=5)
    assert all(np.array_equal(one[name], many[name]) for name in one)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("shape", [(48000, 4096), pytest.param((12, 4000, 4096), marks=pytest.mark.slow)])
@pytest.mark.slow
def test_memory_stays_near_a_fixed_buffer(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Matrices of 384 MB (zeros, so that the file takes no disk) are packed within 200 MB of resident memory."""
    script = (
        f"""
shape = {shape}
"""
        + """
import json, re, sys
from pathlib import Path
folder = Path(sys.argv[1])
header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 48000 * 4096 * 2]}}).encode()
path = folder / "model.safetensors"
with path.open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + 48000 * 4096 * 2)
from mlcbuild.checkpoints.index import index
from mlcbuild.checkpoints.table import read_table
from mlcbuild.models.parameters import Parameter
from mlcbuild.quantization.stream import quantize
from mlcbuild.recipes.types import Quantization, Weights
parameter = Parameter("w.weight", shape, "o_proj", ("w",))
weights = Weights(4, 32, "uint32", "NK", True)
document = index([parameter], read_table({path.name: path}, {path.name: "d"}))
quantize(document, {"d": path}, [parameter], Quantization("q4f16_1", "q4", "float16", weights), folder)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    assert int(result.stdout) < 200_000
