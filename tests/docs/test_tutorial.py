"""The tutorial, followed: its files are written and its commands run, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, blocks

BIN = Path(sys.executable).parent
PAGE = DOCS / "tutorial.md"


@pytest.mark.slow
def test_every_command_works_and_says_what_it_should(tmp_path: Path) -> None:
    where, cache, said = tmp_path, tmp_path / "cache", ""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLCBUILD_")}
    ran = []
    for block in blocks(PAGE.read_text()):
        if block.language == "yaml":
            path = where / block.info[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.language != "sh":
            continue
        for command in block.text.splitlines():
            program, rest = command.split(" ", 1)
            done = subprocess.run(
                f"{BIN / program} {rest}",
                shell=True,
                cwd=where,
                env={**environment, "MLCBUILD_CACHE": str(cache)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            ran.append(command)
            said += done.stdout
            if rest.startswith("init "):
                where = tmp_path / rest.split()[1]
    assert len(ran) >= 14
    assert "0 done, " in said and "hit   verify:stories-cpu" in said
    assert sorted(path.name for path in (where / "dist").iterdir()) == ["own", "stories-8bit", "stories-cpu"]
    assert "-F _doit doit" in said and "#compdef doit" in said
    (snippet,) = [block.text for block in blocks((ROOT / "README.md").read_text()) if block.language == "python"]
    shows = f"{snippet}\nprint(scores.dtype, scores.shape[1] == model.vocab_size)"
    done = subprocess.run([sys.executable, "-c", shows], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, _, facts = done.stdout.strip().rpartition("\n")
    assert answer and facts == "float32 True"


def test_every_flag_of_the_old_commands_is_answered() -> None:
    text = (DOCS / "coming-from.md").read_text()
    flags = set(re.findall(r"`(--[a-z-]+)`", text))
    assert {"--quantization", "--conv-template", "--system-lib-prefix", "--reuse-lib", "--dry-run"} < flags
    assert len(flags) > 50
