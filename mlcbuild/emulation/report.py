"""What the emulated device noted."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """`notes`: what is wrong, by kernel. `launches`: how often each kernel of the loaded modules ran."""

    notes: Mapping[str, tuple[str, ...]]
    launches: Mapping[str, int]


def read(device: ctypes.CDLL) -> Report:
    """What was noted since device/device.cpp was last told to forget, and which kernels ran."""
    ask = device.emulation_report
    ask.restype = ctypes.c_size_t
    buffer = ctypes.create_string_buffer(ask(None, ctypes.c_size_t(0)) + 1)
    ask(buffer, ctypes.c_size_t(len(buffer)))
    notes: dict[str, tuple[str, ...]] = {}
    launches: dict[str, int] = {}
    for line in buffer.value.decode().splitlines():
        what, kernel, text = line.split(" ", 2)
        if what == "note":
            notes[kernel] = (*notes.get(kernel, ()), text)
        else:
            launches[kernel] = launches.get(kernel, 0) + int(text)
    return Report(notes, launches)
