"""What is in a cache, in figures, by kind of step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlcbuild.cache.inventory import Inventory
from mlcbuild.cache.pins import Hold


@dataclass(frozen=True)
class Row:
    kind: str
    actions: int
    size: int  # bytes of the blobs that this kind's actions refer to, each once; kinds may share blobs
    counts: Mapping[str, int]  # built, fetched, hits: since the index was made


@dataclass(frozen=True)
class Stats:
    rows: tuple[Row, ...]
    actions: int
    blobs: int
    size: int  # bytes of all blobs, each once
    total: int  # bytes of the whole cache
    unused: int  # bytes of blobs that no action refers to
    borrowed: tuple[int, int]  # files that lie outside, and their bytes
    held: Mapping[str, tuple[int, int]]  # reason (dist, pin) -> how many holds, bytes of their blobs
    pins: tuple[str, ...]


def stats(found: Inventory, holds: Iterable[Hold], counts: Mapping[tuple[str, str], int]) -> Stats:
    """The figures of one cache."""
    kinds = sorted({record.step for record in found.records} | {kind for kind, _ in counts})
    sizes: dict[str, int] = {}
    for record in found.records:
        sizes.update(record.blobs)
    by_key = {record.key: record for record in found.records}
    held: dict[str, tuple[set[str], set[str]]] = {}
    pins = []
    for hold in holds:
        names, digests = held.setdefault(hold.reason, (set(), set()))
        names.add(hold.name)
        digests |= hold.blobs
        digests.update(digest for key in hold.keys if key in by_key for digest in by_key[key].blobs)
        if hold.reason == "pin":
            pins.append(hold.name)

    def here(digests: Iterable[str]) -> int:
        return sum(found.blobs[digest].size for digest in set(digests) if digest in found.blobs)

    def row(kind: str) -> Row:
        records = [record for record in found.records if record.step == kind]
        size = here(digest for record in records for digest in record.blobs)
        return Row(kind, len(records), size, {what: number for (of, what), number in counts.items() if of == kind})

    outside = [digest for digest in found.borrowed if digest not in found.blobs]
    return Stats(
        rows=tuple(row(kind) for kind in kinds),
        actions=len(found.records),
        blobs=len(found.blobs),
        size=here(found.blobs),
        total=found.size,
        unused=here(digest for digest in found.blobs if digest not in sizes),
        borrowed=(len(outside), sum(sizes.get(digest, 0) for digest in outside)),
        held={reason: (len(names), here(digests)) for reason, (names, digests) in held.items()},
        pins=tuple(sorted(pins)),
    )
