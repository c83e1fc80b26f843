"""Headers of safetensors files: the library's own files are read; every damage has its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.header import read_header
from mlcbuild.checkpoints.mapped import read
from mlcbuild.errors import CheckpointError
from tests.checkpoints.files import header, write

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float16)
TENSORS: dict[str, Any] = {"a.weight": A, "b.bias": B}


def problem(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(path, path.name)
    return str(error.value)


def test_files_of_the_safetensors_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        "half": torch.randn(3, 4, dtype=torch.float16),
        "brain": torch.randn(5, 2).to(torch.bfloat16),
        "single": torch.randn(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    refs = {ref.name: ref for ref in read_header(path, path.name, "digest")}
    assert refs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        bits = tensor.view(torch.int16).numpy().view(np.uint16) if name == "brain" else tensor.numpy()
        array = read(refs[name])
        assert array.dtype == bits.dtype and array.shape == tuple(tensor.shape)
        assert np.array_equal(array, bits)
        assert refs[name].blob == "digest" and refs[name].nbytes == bits.nbytes


def test_mapped_arrays_are_read_only(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", TENSORS)
    array = read(read_header(path, path.name)[0])
    assert np.array_equal(array, A) and not array.flags.writeable


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", TENSORS)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:-1])
    assert problem(path) == (
        f"x.safetensors: truncated: tensor b.bias ends at byte {start + 32}, the file has {start + 31} "
        f"(it should have {start + 32}); get it again"
    )
    path.write_bytes(whole[: start + 3])
    assert "truncated: tensor a.weight ends at byte" in problem(path)
    path.write_bytes(whole[: start - 5])
    assert problem(path) == (
        f"x.safetensors: truncated: its header alone is {start - 8} bytes, the file has {start - 5}; get it again"
    )
    path.write_bytes(whole[:7])
    assert problem(path) == "x.safetensors: truncated: 7 bytes, too short for a safetensors header"
    path.write_bytes(b"")
    assert problem(path) == "x.safetensors: truncated: 0 bytes, too short for a safetensors header"


def test_left_over_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", TENSORS, tail=b"???")
    assert problem(path) == "x.safetensors: 3 bytes follow the last tensor; a safetensors file has none"


def test_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    pointer = "x.safetensors: a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"
    assert problem(path) == pointer
    path.write_bytes(b"\xff" * 60)
    assert problem(path).startswith("x.safetensors: not a safetensors file: it claims a header of ")
    for text in (b"{", b"[]", b"\xff\xff", b"[" * 5000):
        write(path, {}, head=text)
        assert problem(path).startswith("x.safetensors: not a safetensors file: its header is not ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"dtype": "F9"},
            "unknown dtype 'F9'; known are BF16, BOOL, C64, F16, F32, F4, F64, F6_E2M3, F6_E3M2, F8_E4M3, "
            "F8_E4M3FNUZ, F8_E5M2, F8_E5M2FNUZ, F8_E8M0, I16, I32, I64, I8, U16, U32, U64, U8",
        ),
        ({"dtype": "F64"}, "F64 [2, 3] takes 48 bytes, but its data_offsets [0, 24] hold 24"),
        ({"shape": [2, 4]}, "F32 [2, 4] takes 32 bytes, but its data_offsets [0, 24] hold 24"),
        ({"data_offsets": [24, 0]}, "F32 [2, 3] takes 24 bytes, but its data_offsets [24, 0] hold -24"),
        ({"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}, "F4 [3] takes 1.5 bytes, but its data_offsets [0, 1]"),
    ],
)
def test_one_tensor_wrong(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    head = header(TENSORS)
    head["a.weight"] |= change
    path = write(tmp_path / "x.safetensors", TENSORS, head)
    assert problem(path).startswith(f"x.safetensors: tensor a.weight: {text}")


@pytest.mark.parametrize("entry", [None, [], {}, {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}])
def test_an_entry_of_another_form(tmp_path: Path, entry: Any) -> None:
    path = write(tmp_path / "x.safetensors", TENSORS, header(TENSORS) | {"a.weight": entry})
    assert problem(path) == (
        "x.safetensors: tensor a.weight: its header entry is not {dtype, shape, data_offsets: [begin, end]}: "
        f"{entry!r:.120}"
    )


@pytest.mark.parametrize(
    ("offsets", "text"),
    [
        ([20, 28], "its data overlaps the tensor before it (byte {20}, expected {24})"),
        ([26, 34], "its data leaves a gap before it (byte {26}, expected {24})"),
    ],
)
def test_gaps_and_overlaps(tmp_path: Path, offsets: list[int], text: str) -> None:
    head = header(TENSORS)
    head["b.bias"]["data_offsets"] = offsets
    path = write(tmp_path / "x.safetensors", TENSORS, head)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for offset in (20, 24, 26):
        text = text.replace(f"{{{offset}}}", str(start + offset))
    assert problem(path) == f"x.safetensors: tensor b.bias: {text}"


def test_a_name_twice(tmp_path: Path) -> None:
    text = (
        b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}'
    )
    path = write(tmp_path / "x.safetensors", {"a": B[:2]}, text)
    assert problem(path) == "x.safetensors: 'a' occurs twice in the header"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b", "", "a/../../b", "a\nb"])
def test_names_that_climb(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "x.safetensors", {name: A})
    assert problem(path) == (
        f"x.safetensors: tensor name {name!r} is refused: as a path it would climb out of its folder"
    )


def test_all_problems_at_once(tmp_path: Path) -> None:
    head = header(TENSORS)
    head["a.weight"]["dtype"] = "F9"
    head["b.bias"]["shape"] = [5]
    assert len(problem(write(tmp_path / "x.safetensors", TENSORS, head)).splitlines()) == 2


def test_a_dtype_that_no_parameter_has(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"ids": np.arange(3)})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor ids: dtype I64, expected F16 BF16 F32"):
        read(read_header(path, path.name)[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": [2**62] * 32}, f"F32 {[2**62] * 32} takes more than 2^60 bytes, but its data_offsets [0, 24] hold"),
        ({"shape": [1] * 33}, "its header entry is not {dtype, shape, data_offsets: [begin, end]}"),
        ({"shape": [2**63]}, "its header entry is not {dtype, shape, data_offsets: [begin, end]}"),
        ({"data_offsets": [0, 2**70]}, "its header entry is not {dtype, shape, data_offsets: [begin, end]}"),
        ({"data_offsets": [-24, 0]}, "its header entry is not {dtype, shape, data_offsets: [begin, end]}"),
        ({"shape": True}, "its header entry is not {dtype, shape, data_offsets: [begin, end]}"),
    ],
)
def test_numbers_that_no_file_has(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    """FAULTS D: the size of such a shape was no number that could be shown."""
    head = header(TENSORS)
    head["a.weight"] |= change
    path = write(tmp_path / "x.safetensors", TENSORS, head)
    assert problem(path).startswith(f"x.safetensors: tensor a.weight: {text}")


def test_very_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS D: looking for the name that is there twice took time by the square of their number."""
    entry = b'{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    names = [b'"n%d":' % i + entry for i in range(20_000)]
    path = write(tmp_path / "x.safetensors", {}, b"{" + b",".join([*names, names[-1]]) + b"}")
    assert problem(path) == "x.safetensors: 'n19999' occurs twice in the header"
    path = write(tmp_path / "x.safetensors", {}, b"{" + b",".join(names) + b"}")
    assert len(read_header(path, path.name)) == 20_000
    path = write(tmp_path / "x.safetensors", {}, b"{" + b",".join(names).replace(b"F16", b"F9") + b"}")
    *_, last = lines = problem(path).splitlines()
    assert len(lines) == 13 and last == "and 19988 more of this kind"
    monkeypatch.setattr("mlcbuild.checkpoints.header.MOST_TENSORS", 15_000)
    assert problem(path) == "x.safetensors: 20,000 tensors in one file; at most 15,000 are read"


def test_a_name_that_is_no_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a" * 1001: A})
    assert problem(path) == (
        f"x.safetensors: tensor name {'a' * 1001!r:.60}… is refused: it has 1,001 characters, of at most 1000"
    )
    path = write(tmp_path / "x.safetensors", {}, b'{"\\ud800":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}')
    assert problem(path) == (
        "x.safetensors: tensor name '\\ud800' is refused: as a path it would climb out of its folder"
    )
