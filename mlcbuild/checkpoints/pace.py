"""How fast an answer of a hub has to come: one that trickles keeps a connection alive, and never ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mlcbuild.errors import CheckpointError

SLOWEST, WINDOW = 1024, 120.0  # bytes a second that have to come, on average over so many seconds


@dataclass
class Pace:
    """From where and since when what arrives is counted."""

    place: int
    since: float = field(default_factory=time.monotonic)

    def check(self, asked: object, place: int) -> None:
        """Raises CheckpointError where too little arrived in WINDOW seconds; then the next seconds count."""
        passed = time.monotonic() - self.since
        if passed < WINDOW:
            return
        if place - self.place < SLOWEST * WINDOW:
            raise CheckpointError(
                f"{asked}: the hub sent {max(0, place - self.place):,} bytes in {passed:.0f} seconds, which counts "
                "as nothing: try again later"
            )
        self.place, self.since = place, time.monotonic()
