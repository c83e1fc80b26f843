"""docs/first-build.svg: a first build as a terminal shows it, drawn from what the commands really print.

python scripts/picture.py       # builds stories-cpu in a temporary workspace and writes the picture; half a minute
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs" / "first-build.svg"
WIDTH = 92
STYLES = {"ok": "green", "--": "dim"}  # as on a terminal
COMMANDS = (
    "doit build",
    'mlcbuild generate dist/stories-cpu --prompt "Once upon a time" --max-tokens 70',
    "doit build | tail -n 1",
)


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        run(f"mlcbuild init {folder}/packages", folder)
        for command in COMMANDS:
            console.print(Text(f"$ {command}", "bold"))
            for line in run(command, f"{folder}/packages").rstrip("\n").splitlines():
                # On a terminal, a step that runs is a bar, which is gone when the step is done.
                if not line.startswith(".. "):
                    console.print(Text(line, STYLES.get(line[:2], "")))
            console.print()
    # No fonts from elsewhere: the reader's own will do.
    template = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    drawn = console.export_svg(title="~/packages", code_format=template, unique_id="first-build")
    PICTURE.write_text("".join(f"{line.rstrip()}\n" for line in drawn.splitlines() if line.strip()), encoding="utf-8")


def run(command: str, folder: str) -> str:
    """What a command prints, in a workspace whose cache is its own."""
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLCBUILD_CACHE": f"{folder}/cache",
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
