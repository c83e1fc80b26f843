"""Bytes are proven where they leave: by size and date alone, nothing is installed, shared, or given to a step.

FAULTS.md A2. The same for `doit publish`: tests/publishing/test_publish.py.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.cache.test_materialise import damage
from tests.engine.workspace import Workspace
from tests.workspace.test_maintenance import ONE, mlcbuild


def blob_of_weights(workspace: Workspace) -> Path:
    """The blob of a recipe's weights, as the cache has it."""
    (digest,) = {
        digest for name, digest in workspace.digests().items() if name.startswith(ONE) and name.endswith(".bin")
    }
    return workspace.cache / "cas" / digest[:2] / digest


def test_damage_is_not_installed_again(built: Workspace) -> None:
    """As when eight bytes are changed through a link in dist/, and the date is set back."""
    expected, blob = built.digests(), blob_of_weights(built)
    damage(blob)
    built.doit()
    assert built.ran() == {}, "a build with nothing to do hashes nothing"
    shutil.rmtree(built.dist)
    output = built.doit()
    assert f"{blob}: damaged: its sha256 is " in output
    assert ": removed; what made it runs again" in output
    assert built.ran() == {"quantize": 1}
    assert built.digests() == expected


@pytest.mark.slow
def test_damage_is_not_shared(built: Workspace, tmp_path: Path) -> None:
    blob, folder = blob_of_weights(built), tmp_path / "shared"
    damage(blob)
    output = mlcbuild(built, "cache", "push", ONE, "--remote", str(folder), status=1)
    assert f"{blob}: damaged: its sha256 is " in output
    assert ": removed; not put into the shared cache: the next build makes it again" in output
    for path in folder.glob("cas/*/*"):
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()
    built.doit()
    assert built.ran() == {"quantize": 1}
    mlcbuild(built, "cache", "push", ONE, "--remote", str(folder))
    assert (folder / "cas" / blob.parent.name / blob.name).read_bytes() == blob.read_bytes()


@pytest.mark.slow
def test_damage_does_not_get_into_what_is_made_of_it(built: Workspace) -> None:
    expected, blob = built.digests(), blob_of_weights(built)
    damage(blob)
    built.write("recipes/models/tiny.yaml", "source: {path: tiny}\ntemplate: llama-2\n")
    output = built.doit()
    assert f"{blob}: damaged: its sha256 is " in output
    assert built.ran()["quantize"] == 1
    weights = {name: digest for name, digest in expected.items() if name.endswith(".bin")}
    assert weights.items() <= built.digests().items()
