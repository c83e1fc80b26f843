"""The unquantized model straight from a checkpoint's files, as verify runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import Model
from mlcbuild.verify.reference import load_reference, widen
from tests.runtime import tiny_llama
from tests.runtime.test_session import IDS, assert_close, expected


def index_of(path: Path, parameters: tiny_llama.Arrays, dtype: str = "float32") -> dict[str, Any]:
    """Write the parameters to one file, each in two parts that lie apart, and describe them as convert does."""
    stored = {"float32": lambda a: a, "float16": lambda a: a.astype(np.float16), "bfloat16": bfloat16_bits}[dtype]
    described, data = [], bytearray(b"header")
    for name, array in parameters.items():
        parts = []
        for piece in np.split(array, [len(array) // 3]):
            raw = stored(piece).tobytes()
            part = {
                "blob": "d1",
                "file": path.name,
                "offset": len(data),
                "nbytes": len(raw),
                "shape": list(piece.shape),
            }
            parts.append(part)
            data += raw + b"between"
        described.append({"name": name, "shape": list(array.shape), "dtype": dtype, "parts": parts})
    path.write_bytes(data)
    return {"version": 1, "parameters": described}


def bfloat16_bits(array: Any) -> Any:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def test_the_reference_is_the_checkpoints_model(tmp_path: Path, tiny_library: Path, reference: Any) -> None:
    path = tmp_path / "model.safetensors"
    index = index_of(path, tiny_llama.mlc_parameters(reference))
    model = load_reference(tiny_library, index, {"d1": path}, tmp_path)
    assert_close(model.logits(IDS), expected(reference, IDS))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parameters_are_widened_exactly(tmp_path: Path, dtype: str) -> None:
    values = {"a": np.arange(-5, 16, dtype=np.float32).reshape(3, 7), "b": np.array([0.5, 2**-14, 96], np.float32)}
    records = widen(index_of(tmp_path / "x", values, dtype), {"d1": tmp_path / "x"}, tmp_path / "wide")
    for record in records:
        assert (record.offset % 64, record.dtype) == (0, "float32")
        found = np.fromfile(record.shard, np.float32, record.nbytes // 4, offset=record.offset)
        assert np.array_equal(found.reshape(record.shape), values[record.name])


def test_parts_that_do_not_make_up_the_parameter(tmp_path: Path) -> None:
    index = index_of(tmp_path / "x", {"a": np.ones((6, 2), np.float32)})
    del index["parameters"][0]["parts"][1]
    with pytest.raises(MlcBuildError, match=r"the parts of a hold 4 values, but its shape \[6, 2\] takes 12"):
        widen(index, {"d1": tmp_path / "x"}, tmp_path / "wide")


def test_a_reference_has_no_tokenizer(tiny: Model) -> None:
    with pytest.raises(MlcBuildError, match="loaded without a weights folder, so it has no tokenizer"):
        Model(tiny.network, {}).generate("text")
