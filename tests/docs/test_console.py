"""What a page shows as typed at a prompt prints what the page says that it prints."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcbuild.cli.main import main
from mlcbuild.workspace.init import init
from tests.docs.pages import PAGES, ROOT, blocks

SHOWN = {page.name: [b.text for b in blocks(page.read_text()) if b.language == "console"] for page in PAGES}


def commands(text: str) -> Iterator[tuple[list[str], str]]:
    """The words after each `$`, and the lines up to the next."""
    for command in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, output = command.partition("\n")
        yield shlex.split(line, comments=True), output


def pattern(output: str) -> str:
    """A regular expression in which `…` on a line of its own is any lines, and elsewhere anything on its line."""
    lines = [
        "(?:.*\\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + "\\n" for line in output.splitlines()
    ]
    return "".join(lines)


@pytest.mark.parametrize("page", sorted(name for name, found in SHOWN.items() if found))
def test_commands_print_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init(tmp_path)
    shutil.copytree(ROOT / "recipes/models/stories", tmp_path / "checkpoints/tale")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLCBUILD_CACHE", raising=False)
    for text in SHOWN[page]:
        for words, output in commands(text):
            assert words[0] == "mlcbuild"
            assert main(words[1:]) == 0
            said = capsys.readouterr().out
            assert re.fullmatch(pattern(output), said), f"{page}: {' '.join(words)} prints\n{said}"
