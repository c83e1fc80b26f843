"""PyTorch's files, written by PyTorch itself and read without it; and pickles that are not weights."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints import computed, mapped
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.table import read_table
from mlcbuild.checkpoints.torch_files import read_torch
from mlcbuild.errors import CheckpointError
from tests.checkpoints.files import folder

torch = pytest.importorskip("torch")
FILE = "pytorch_model.bin"
CODE = "which is refused: a file of weights holds tensors only, and code from a checkpoint is never run; "


def save(root: Path, tensors: Any, legacy: bool = False, name: str = FILE) -> Path:
    torch.save(tensors, root / name, _use_new_zipfile_serialization=not legacy)
    return root / name


def refs(path: Path) -> dict[str, TensorRef]:
    return {ref.name: ref for ref in read_torch(path, path.name, "digest")}


def values(ref: TensorRef) -> Any:
    """The tensor as torch has it."""
    array = np.array(mapped.view(ref))
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if ref.dtype == "BF16" else torch.from_numpy(array)
    )


def problem(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_torch(path, path.name)
    return str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_are_found_where_they_lie(tmp_path: Path, dtype: str, legacy: bool) -> None:
    whole = torch.randn(12, 7).to(getattr(torch, dtype))
    tensors = {
        "plain": torch.randn(3, 5).to(whole.dtype),
        "whole": whole,
        "slice": whole[2:5],  # of the same storage
        "scalar": torch.tensor(2.5).to(whole.dtype),
        "empty": torch.zeros(0, 4).to(whole.dtype),
        "turned": whole.T,
        "column": whole[:, 3],
        "every other": whole[::2],
        "expanded": whole[0].expand(4, 7),
    }
    found = refs(save(tmp_path, collections.OrderedDict(tensors), legacy))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(values(found[name]), tensor), name
        assert found[name].nbytes == tensor.numel() * tensor.element_size() and found[name].blob == "digest"
    assert {name for name, ref in found.items() if ref.strides} == {"turned", "column", "every other", "expanded"}
    assert found["slice"].offset == found["whole"].offset + 2 * 7 * whole.element_size()


@pytest.mark.parametrize("legacy", [False, True])
def test_what_state_dicts_hold_besides(tmp_path: Path, legacy: bool) -> None:
    """Parameters, the notes that a module's state dict carries, whole numbers in buffers."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    found = refs(save(tmp_path, module.state_dict(), legacy))
    assert found["1.num_batches_tracked"].dtype == "I64"
    assert torch.equal(values(found["0.weight"]), module[0].weight)
    parameters = {name: torch.nn.Parameter(value) for name, value in module.named_parameters()}
    assert torch.equal(values(refs(save(tmp_path, parameters, legacy))["0.weight"]), module[0].weight)
    flags = {"masked": torch.tensor([True, False]), "bytes": torch.arange(4, dtype=torch.uint8)}
    assert [ref.dtype for ref in refs(save(tmp_path, flags, legacy)).values()] == ["BOOL", "U8"]


def test_tensors_that_are_not_row_major_are_laid_out_anew(tmp_path: Path) -> None:
    tensor = torch.randn(700, 900)
    table = refs(save(tmp_path, {"turned": tensor.T, "plain": tensor, "unused": tensor.T}))
    (tmp_path / "out").mkdir()
    found = computed.strided(table, {"turned", "plain"})
    written = computed.write(computed.place(found), tmp_path / "out")
    assert written.keys() == {"turned"}
    ref = written["turned"]
    assert ref.strides is None and ref.file == "tensors-0.bin"
    assert torch.equal(values(ref), tensor.T)


def test_shards(tmp_path: Path) -> None:
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    save(tmp_path, {"a": torch.ones(2)}, name=one)
    save(tmp_path, {"b": torch.zeros(3)}, name=two)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": one, "b": two}}))
    table = read_table(folder(tmp_path), {one: "first", two: "second"})
    assert {name: (ref.file, ref.blob) for name, ref in table.items()} == {"a": (one, "first"), "b": (two, "second")}
    (tmp_path / two).unlink()
    with pytest.raises(CheckpointError) as error:
        read_table(folder(tmp_path))
    assert str(error.value) == (
        f"{two}: missing: pytorch_model.bin.index.json puts 1 tensors into it, b first; download it again"
    )


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(2)}, name="RWKV-4-World.pth")
    assert read_table(folder(tmp_path))["a"].file == "RWKV-4-World.pth"


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.mkdir, ("owned",), "posix.mkdir"),
        (eval, ("1",), "__builtin__.eval"),
        (getattr, ("", "join"), "__builtin__.getattr"),
        (torch.load, ("x",), "torch.serialization.load"),
    ],
)
def test_code_in_a_pickle_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, arguments: tuple[Any, ...], name: str, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, {"a": torch.ones(2), "b": Runs(function, *arguments)}, legacy)
    assert problem(path) == f"{FILE}: its pickle names {name}, {CODE}save it as safetensors"
    assert not (tmp_path / "owned").exists()


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    assert problem(save(tmp_path, torch.nn.Linear(2, 2))).startswith(
        f"{FILE}: its pickle names torch.nn.modules.linear.Linear, which is refused: "
    )


def test_a_pickle_cannot_change_what_it_was_given(tmp_path: Path) -> None:
    """BUILD sets attributes: of nothing that the reader made."""
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI0\n(I2\nI2\nt(I2\nI1\nt"
        b"I00\nNtR"
    )
    for state in (b"}S'shape'\nS'abc'\nsb", b"(N}S'offset'\nI9\nstb"):
        text = b"(dS'a'\n" + tensor + state + b"s."
        with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
            archive.writestr("m/data.pkl", text)
            archive.writestr("m/data/0", bytes(16))
        assert problem(tmp_path / FILE).startswith(f"{FILE}: not a PyTorch file of weights: AttributeError: ")
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:  # and without it the tensor is one
        archive.writestr("m/data.pkl", b"(dS'a'\n" + tensor + b"s.")
        archive.writestr("m/data/0", bytes(16))
    assert refs(tmp_path / FILE)["a"].shape == (2, 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "but it holds a list"),
        ({"a": 1}, "but 'a' is a int"),
        ({1: torch.ones(1)}, "but 1 is a tensor"),
        ({"model": {"a": torch.ones(1)}}, "but 'model' is a dict; the weights may be inside it: save that part alone"),
    ],
)
def test_what_is_not_a_mapping_of_names_to_tensors(tmp_path: Path, content: Any, text: str) -> None:
    expected = f"{FILE}: expected a mapping of names to tensors (a state dict), {text}"
    assert problem(save(tmp_path, content)) == expected


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """The zip with its entries as `change` (name, content -> content or None) makes them."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            new = change(name, content)
            if new is not None:
                archive.writestr(name, new)
    return path


def test_damaged_files(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.ones(4)})
    whole = path.read_bytes()
    missing = rewritten(path, lambda name, content: None if name.endswith("/data/0") else content)
    assert problem(missing) == f"{FILE}: tensor a: its storage 0 is not in the file; get it again"
    path.write_bytes(whole)
    short = rewritten(path, lambda name, content: content[:-1] if name.endswith("/data/0") else content)
    assert problem(short) == f"{FILE}: tensor a: its storage 0 has 15 bytes, but 4 values of F32 take 16"
    path.write_bytes(whole)
    big = rewritten(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    assert problem(big) == f"{FILE}: its numbers are b'big'-endian; save it on a little-endian machine"
    path.write_bytes(whole)
    packed = rewritten(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert problem(packed) == (
        f"{FILE}: pytorch_model/data.pkl is compressed, which torch.save never does; save it again"
    )
    path.write_bytes(whole[:-30])
    assert problem(path).startswith(f"{FILE}: truncated or damaged: ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"")
    assert problem(path) == f"{FILE}: a zip without data.pkl, so not a PyTorch file of weights: word/document.xml"


def test_damaged_files_of_the_older_format(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.ones(4)}, legacy=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    found = problem(path)
    assert found.startswith(f"{FILE}: tensor a: truncated: the file ends before its storage ")
    assert found.endswith(" does; get it again")
    path.write_bytes(whole[:60])
    assert problem(path) == f"{FILE}: truncated or damaged: it ends too early; get it again"
    path.write_bytes(b"")
    assert problem(path).startswith(f"{FILE}: truncated or damaged: ")
    path.write_bytes(pickle.dumps({"a": 1}))
    assert problem(path) == (f"{FILE}: not a PyTorch file of weights: neither a zip, nor with the older magic number")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert problem(path) == f"{FILE}: a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"
    path.write_bytes(b"versions")
    assert problem(path).startswith(f"{FILE}: not a PyTorch file of weights: UnpicklingError: ")


def test_views_that_leave_their_storage_and_names_that_climb(tmp_path: Path) -> None:
    path = save(tmp_path, {"../a": torch.ones(2)})
    assert problem(path) == (f"{FILE}: tensor name '../a' is refused: as a path it would climb out of its folder")
    text = io.BytesIO()
    text.write(
        b"(dS'a'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQI1\n(I2\nI2\nt"
        b"(I2\nI1\ntI00\nNtRs."
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", text.getvalue())
        archive.writestr("m/data/0", bytes(16))
    assert problem(path) == f"{FILE}: tensor a: [2, 2] from element 1 on leaves its storage"


def crafted(path: Path, text: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", text)
    return path


DOUBLED = b"(I1\ntp0\n" + b"".join(b"0g%d\ng%d\n\x86p%d\n" % (i, i, i + 1) for i in range(60))  # t = (t, t)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"}" + DOUBLED + b"I1\ns.", "its pickle has tuples of more than 10,000 values in each other"),
        (b"(" + DOUBLED + b"tQ.", "its pickle has tuples of more than 10,000 values in each other"),
        (b"\x8f.", "its pickle has sets or objects of its own, which is refused: a file of weights holds tensors only"),
        (b"(lp0\n" + b"".join(b"(lp%d\ng%d\nag%d\na" % (i + 1, i, i) for i in range(60)) + b".", "it holds a list"),
        (b"(lp0\n" + b"".join(b"(lp%d\ng%d\nag%d\na" % (i + 1, i, i) for i in range(60)) + b"Q.", "not a PyTorch file"),
        (b"}K\x01\x8b\x00\x00\x00\x40.", "truncated or damaged: it ends too early"),
        (b"}r\xff\xff\xff\xffX\x01\x00\x00\x00aI1\ns.", "but 'a' is a int"),
        (b"}\x8b\x00\x08\x00\x00" + b"\x7f" * 2048 + b"I1\ns.", "but a int is a int"),
    ],
)
def test_pickles_that_would_never_end(tmp_path: Path, text: bytes, expected: str) -> None:
    """FAULTS D: tuples in tuples are hashed and shown in 2^60 steps, memo places are counted in gigabytes."""
    assert expected in problem(crafted(tmp_path / FILE, text))


def test_a_pickle_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS D, a sibling."""
    monkeypatch.setattr("mlcbuild.checkpoints.pickles.MAX_PICKLE", 1000)
    assert problem(crafted(tmp_path / FILE, b"N0" * 600 + b"}.")) == (
        f"{FILE}: its pickle has more than 1,000 bytes; save it as safetensors"
    )
