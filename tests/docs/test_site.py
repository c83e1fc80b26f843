"""The pages as a site: every page is in it, and no link leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "site" / "index.html").read_text()
    assert 'href="tutorial/"' in start and "recipes/models/tale.yaml" in start
    python = (tmp_path / "site" / "python" / "index.html").read_text()
    assert 'id="mlcbuild.runtime.Model.logits"' in python
