"""What `doit list` says."""

from __future__ import annotations

import pytest

from tests.engine.workspace import Workspace

ALL = {"convert": 1, "quantize": 2, "lower": 3, "library": 3, "package": 2, "measure": 2, "verify": 2}
ONE = {"convert": 1, "quantize": 1, "lower": 2, "library": 2, "package": 1, "measure": 1, "verify": 1}


def test_list(workspace: Workspace) -> None:
    groups = workspace.doit("list", "-q").split()
    kinds = [
        "allocate",
        "build",
        "calibrate",
        "convert",
        "download",
        "execute",
        "library",
        "lower",
        "measure",
        "package",
        "publish",
        "quantize",
        "round",
        "runtime",
        "unpack",
        "verify",
    ]
    assert groups == kinds
    listed = workspace.doit("list", "--all", "-q").split()
    assert {"build:tiny-q4f16_1-cpu", "download:tiny", "convert:tiny", "quantize:tiny-q4f32_1"} < set(listed)


@pytest.mark.slow
def test_list_says_the_same_with_states(built: Workspace) -> None:
    """For names alone nothing is planned; for states, which doit may ask for behind a name, everything is."""
    built.doit("forget", "quantize:tiny-q4f16_1")
    names = built.doit("list", "--all").splitlines()
    states = built.doit("list", "--all", "-s").splitlines()
    assert [line[2:] for line in states] == names
    assert [line[0] for line in states if "quantize:" in line] == ["R", "U"]
    assert built.doit("list", "--all", "--deps", "-q", "quantize").split() == [
        *("quantize", "quantize:tiny-q4f16_1", "quantize:tiny-q4f32_1")
    ]
    assert built.doit("list", "--all", "--sort", "definition", "--template", "{name}") == built.doit(
        "list", "--all", "--sort=definition", "-s", "--template={name}"
    )
    built.write("pyproject.toml", "[tool.doit.commands.list]\nstatus = true\n")
    assert built.doit("list", "--all").splitlines() == states
