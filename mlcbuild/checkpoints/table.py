"""All tensors of a checkpoint folder in one table, whether it is one safetensors file or many."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcbuild.checkpoints.header import TensorRef, climbs, read_header
from mlcbuild.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def read_table(files: Mapping[str, Path], blobs: Mapping[str, str] | None = None) -> dict[str, TensorRef]:
    """Tensors by name. `files` are the checkpoint's files, `blobs` their sha256 by the same names, where known.

    `model.safetensors` wins over an index beside it, as in transformers. Raises CheckpointError with everything that
    is wrong: no weights, a shard that is missing, damaged (`read_header`) or not in the index, an index that names a
    file outside the folder, a tensor that the index puts where it is not, that it leaves out, or that two shards hold.
    """
    blobs = blobs or {}
    if SINGLE in files:
        return {ref.name: ref for ref in read_header(files[SINGLE], SINGLE, blobs.get(SINGLE, ""))}
    if INDEX not in files:
        raise CheckpointError(_no_weights(files))
    weight_map = _weight_map(files[INDEX])
    shards = sorted(set(weight_map.values()))
    problems = [
        f"{INDEX}: weight_map names {shard!r}, which lies outside the checkpoint's folder"
        for shard in shards
        if climbs(shard)
    ]
    table: dict[str, TensorRef] = {}
    unread = set()
    for shard in shards:
        if climbs(shard):
            unread.add(shard)
        elif shard not in files:
            unread.add(shard)
            first = next(name for name, file in weight_map.items() if file == shard)
            count = sum(file == shard for file in weight_map.values())
            problems.append(f"{shard}: missing: {INDEX} puts {count} tensors into it, {first} first; download it again")
        else:
            try:
                refs = read_header(files[shard], shard, blobs.get(shard, ""))
            except CheckpointError as error:
                unread.add(shard)
                problems.append(str(error))
                continue
            for ref in refs:
                if ref.name in table:
                    problems.append(f"tensor {ref.name} is in two shards: {table[ref.name].file} and {shard}")
                elif weight_map.get(ref.name) is None:
                    problems.append(f"{shard}: tensor {ref.name} is not in {INDEX}")
                table.setdefault(ref.name, ref)
    for name, shard in weight_map.items():
        if shard not in unread and (name not in table or table[name].file != shard):
            found = f"; it is in {table[name].file}" if name in table else ""
            if not any(problem.startswith(f"tensor {name} is in two shards") for problem in problems):
                problems.append(f"{shard}: tensor {name} is missing, although {INDEX} puts it there{found}")
    for file in sorted(files):
        if SHARD.fullmatch(file) and file not in shards:
            problems.append(f"{file}: not named in {INDEX}: a shard too many, or the index is another checkpoint's")
    if problems:
        raise CheckpointError("\n".join(problems))
    return table


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{INDEX}: not valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{INDEX}: has no weight_map from tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{INDEX}: its weight_map is empty")
    return weight_map


def _no_weights(files: Mapping[str, Path]) -> str:
    shards = sorted(file for file in files if file.endswith(".safetensors"))
    if shards:
        return f"{INDEX}: missing: the checkpoint has {', '.join(shards)}, but nothing says how they belong together"
    torch = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth")))
    if torch:
        return f"{torch[0]}: PyTorch pickles are not read yet; save the checkpoint as safetensors"
    return (
        f"no weights: expected {SINGLE}, or {INDEX} and its shards; there are: {', '.join(sorted(files)) or 'no files'}"
    )
