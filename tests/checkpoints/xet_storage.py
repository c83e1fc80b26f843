"""What lies in a folder that hf_xet's own storage on local disks (`local://`) wrote to: what a hub with Xet would have.

Files are known there by a Merkle hash. The sha256 by which commits name them is in the shards, whose layout is that of
xet-core's `MDBShardFileHeader` and `FileDataSequenceHeader`: after a head of 48 bytes, records of 48 bytes.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

_RECORD = 48  # bytes
_CHECKED, _DESCRIBED = 1 << 31, 1 << 30  # flags: as many records of verification follow; one with the sha256 follows
_END = b"\xff" * 32


def contents(folder: Path) -> dict[str, bytes]:
    """Files by sha256, each read back from its chunks."""
    import hf_xet

    found: dict[str, bytes] = {}
    session = hf_xet.XetSession()
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        for merkle, sha256, size in _files(shard.read_bytes()):
            with tempfile.TemporaryDirectory() as temporary:
                target = Path(temporary) / "file"
                with session.new_file_download_group(endpoint=f"local://{folder}") as group:
                    group.start_download_file(hf_xet.XetFileInfo(merkle, size), str(target))
                found[sha256] = target.read_bytes()
    return found


def _files(shard: bytes) -> list[tuple[str, str, int]]:
    """Merkle hash, sha256 and bytes of each file in a shard."""
    found, at = [], _RECORD
    while (merkle := shard[at : at + 32]) != _END:
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        starts = range(at + _RECORD, at + _RECORD * (1 + segments), _RECORD)
        size = sum(struct.unpack_from("<I", shard, start + 36)[0] for start in starts)
        at += _RECORD * (1 + segments * (2 if flags & _CHECKED else 1))
        if flags & _DESCRIBED:
            found.append((_hex(merkle), _hex(shard[at : at + 32]), size))
            at += _RECORD
    return found


def _hex(digest: bytes) -> str:
    """Hashes are four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
