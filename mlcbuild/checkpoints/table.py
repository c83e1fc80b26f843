"""All tensors of a checkpoint folder in one table, whether it is one file or many, of safetensors or of PyTorch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.header import MAX_HEADER, MOST_TENSORS, NAMED, TensorRef, climbs, first_of, read_header
from mlcbuild.checkpoints.torch_files import read_torch
from mlcbuild.errors import POINTER, CheckpointError, pointer


@dataclass(frozen=True)
class Form:
    """The names of a checkpoint's files in one format: one file, or an index and the shards that it names."""

    single: str
    index: str
    shard: re.Pattern[str]
    read: Callable[[Path, str, str], list[TensorRef]]


# In the order in which they are looked for: safetensors win over the same weights as pickles, as in transformers.
SAFETENSORS = Form(
    "model.safetensors", "model.safetensors.index.json", re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors"), read_header
)
TORCH = Form(
    "pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d{5,}-of-\d{5,}\.bin"), read_torch
)
FORMS = (SAFETENSORS, TORCH)
_VARIANT = re.compile(r"model\.[A-Za-z0-9_-]+\.safetensors")  # as transformers calls what `variant` names: fp16
_PICKLES = (".bin", ".pt", ".pth")


def weight_files(names: Collection[str]) -> list[str]:
    """Those of a checkpoint's files that hold its weights, in one form, and its index; empty where there are none.

    One file wins over an index beside it, and safetensors over pickles. Without any of the usual names, a single
    `model.VARIANT.safetensors` is the checkpoint, or a single .pth file.
    """
    for form in FORMS:
        if form.single in names:
            return [form.single]
        if form.index in names:
            return sorted(name for name in names if name == form.index or form.shard.fullmatch(name))
    variants = [name for name in names if _VARIANT.fullmatch(name)]
    pickles = [name for name in names if name.endswith(".pth") and "/" not in name]
    single = variants or (pickles if not any(name.endswith(".safetensors") for name in names) else [])
    return single if len(single) == 1 else []


def read_table(
    files: Mapping[str, Path], blobs: Mapping[str, str] | None = None, note: Callable[[str], None] = lambda text: None
) -> dict[str, TensorRef]:
    """Tensors by name. `files` are the checkpoint's files, `blobs` their sha256 by the same names, where known.

    `note` is told where the index's `total_size` is not the tensors': nobody reads it, so it may be wrong. Which files
    count, `weight_files` says. Raises CheckpointError with everything that is wrong: no weights, a shard that is
    missing, damaged (`read_header`, `read_torch`) or not in the index, an index that names a file outside the folder,
    a tensor that the index puts where it is not, that it leaves out, or that two shards hold.
    """
    blobs = blobs or {}
    found = weight_files(files)
    if not found:
        raise CheckpointError(_no_weights(files))
    for form in FORMS:
        if form.index in found:
            return _sharded(form, files, blobs, note)
    (single,) = found
    read = read_header if single.endswith(".safetensors") else read_torch
    return {ref.name: ref for ref in read(files[single], single, blobs.get(single, ""))}


def _sharded(
    form: Form, files: Mapping[str, Path], blobs: Mapping[str, str], note: Callable[[str], None]
) -> dict[str, TensorRef]:
    weight_map, told = _weight_map(files[form.index], form.index)
    shards = sorted(set(weight_map.values()))
    problems = [
        f"{form.index}: weight_map names {shard!r}, which lies outside the checkpoint's folder"
        for shard in shards
        if climbs(shard)
    ]
    table: dict[str, TensorRef] = {}
    unread, twice = set(), set()
    counts = Counter(weight_map.values())
    for shard in shards:
        if climbs(shard):
            unread.add(shard)
        elif shard not in files:
            unread.add(shard)
            first = next(name for name, file in weight_map.items() if file == shard) if len(unread) <= NAMED else "…"
            problems.append(
                f"{shard}: missing: {form.index} puts {counts[shard]} tensors into it, {first} first; download it again"
            )
        else:
            try:
                refs = form.read(files[shard], shard, blobs.get(shard, ""))
            except CheckpointError as error:
                unread.add(shard)
                problems.append(str(error))
                continue
            for ref in refs:
                if ref.name in table:
                    twice.add(ref.name)
                    problems.append(f"tensor {ref.name} is in two shards: {table[ref.name].file} and {shard}")
                elif weight_map.get(ref.name) is None:
                    problems.append(f"{shard}: tensor {ref.name} is not in {form.index}")
                table.setdefault(ref.name, ref)
    for name, shard in weight_map.items():
        if shard not in unread and (name not in table or table[name].file != shard):
            found = f"; it is in {table[name].file}" if name in table else ""
            if name not in twice:
                problems.append(f"{shard}: tensor {name} is missing, although {form.index} puts it there{found}")
    for file in sorted(files):
        if form.shard.fullmatch(file) and file not in shards:
            problems.append(
                f"{file}: not named in {form.index}: a shard too many, or the index is another checkpoint's"
            )
    if problems:
        raise CheckpointError(first_of(problems))
    if len(table) > MOST_TENSORS:
        raise CheckpointError(f"{form.index}: {len(table):,} tensors; at most {MOST_TENSORS:,} are read")
    size = sum({(ref.file, ref.offset, ref.nbytes): ref.nbytes for ref in table.values()}.values())
    if told is not None and told != size:
        note(f"{form.index}: total_size is {told:,}, and the tensors of the shards have {size:,} bytes")
    return table


def _weight_map(path: Path, name: str) -> tuple[dict[str, str], int | None]:
    """Which file a tensor is in, and the bytes of all, where the index has them."""
    if path.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{name}: {path.stat().st_size:,} bytes; an index has at most {MAX_HEADER:,}")
    try:
        content = path.read_bytes()
        if content.startswith(POINTER):
            raise CheckpointError(pointer(name))
        index: Any = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{name}: has no weight_map from tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{name}: its weight_map is empty")
    metadata = index.get("metadata")
    told = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, told if type(told) is int else None


def _no_weights(files: Mapping[str, Path]) -> str:
    single, index = SAFETENSORS.single, SAFETENSORS.index
    for form, endings in ((SAFETENSORS, (".safetensors",)), (TORCH, _PICKLES)):
        shards = sorted(file for file in files if file.endswith(endings))
        if shards:
            return (
                f"{form.index}: missing: the checkpoint has {', '.join(shards)}, but nothing says how they belong "
                "together"
            )
    return (
        f"no weights: expected {single}, or {index} and its shards, or PyTorch's {TORCH.single}; there are: "
        f"{', '.join(sorted(files)) or 'no files'}"
    )
