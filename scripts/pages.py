"""Pictures of pages as Chromium shows them: docs/report*.webp and docs/chat*.webp.

    python scripts/pages.py                       # two nights of 40 recipes, built for real; some minutes
    python scripts/pages.py --keep DIR            # builds there, and leaves it: another time what is there is shown
    python scripts/pages.py --look DIR            # also every page at three widths, light and dark, into DIR

The nights are those of benchmarks/matrix.py: tiny models with random weights, in ten quantizations for two targets. In
between one model gets other weights, and a recipe comes along whose bound is too strict. `stories-cpu` is what is
served.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import matrix  # noqa: E402
from tests.support.chromium import Page, browser  # noqa: E402

RECIPES = 40
WIDTHS = {"phone": 390, "tablet": 820, "desk": 1280}  # in CSS pixels
HEIGHT = 840
HEIGHTS = {"chat": 560, "report": 1500}  # of what the docs show
KEPT = (("", "desk", False), ("-phone", "phone", True))  # that is: a name's end, how wide, whether dark
QUESTIONS = ("What do rabbits eat?", "What color is the sky?")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--look", type=Path, metavar="DIR")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        root = (options.keep or Path(made)).resolve() / "workspace"
        nights(root)
        with served(root / "dist" / "stories-cpu") as address, browser(Path(made) / "profile") as page:
            talk(page, address)
            pictures(page, "chat", options.look)
            page.open((root / "report.html").as_uri())
            pictures(page, "report", options.look)


def nights(root: Path) -> None:
    """report.html of two nights, and dist/stories-cpu."""
    if not root.exists():
        matrix.make_workspace(root, RECIPES)
    if not (root / "nights.jsonl").exists():
        run(root, "doit", "--continue", "build", "log_json=nights.jsonl")
        models = root / "recipes" / "models"
        strict = "{model: m000, quantization: q3f16_1, target: cpu, verify: {kl: 0.00001, gate: fail}}\n"
        (root / "recipes" / "m000-strict.yaml").write_text(strict)
        again = root / "again"
        matrix.write_checkpoint(again, layers=1, seed=99)
        (again / "model.safetensors").replace(models / "m001" / "model.safetensors")
        run(root, "doit", "--continue", "build", "log_json=nights.jsonl", expected=1)
    if not (root / "dist" / "stories-cpu").exists():
        (root / "recipes" / "stories-cpu.yaml").write_text("{model: stories, quantization: q4f16_1, target: cpu}\n")
        run(root, "doit", "build", "recipe=stories-cpu")
    run(root, "mlcbuild.cli", "report", "nights.jsonl", "-o", "report.html")


def run(root: Path, *words: str, expected: int = 0) -> None:
    """Raises RuntimeError with what a command wrote, where it ended otherwise than expected."""
    done = subprocess.run([sys.executable, "-m", *words], cwd=root, capture_output=True, text=True)
    if done.returncode != expected:
        raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def served(package: Path) -> Iterator[str]:
    """The address of a server for a package."""
    command = [sys.executable, "-m", "mlcbuild.cli", "serve", str(package), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            yield next(found[0] for line in lines if (found := re.search(r"http://[\d.]+:\d+", line)))
        finally:
            process.terminate()


def talk(page: Page, address: str) -> None:
    page.open(address)
    page.until("!document.querySelector('input').disabled", 60)
    for number, question in enumerate(QUESTIONS, 1):
        page.evaluate("document.querySelector('input').focus()")
        page.type(question)
        page.until(f"document.querySelectorAll('.model').length == {number}", 30)
        page.until("document.querySelector('form button').textContent == 'Send'", 60)


def pictures(page: Page, name: str, look: Path | None) -> None:
    """Those of the docs, and the whole page at each width and in each light."""
    for end, width, dark in KEPT:
        (ROOT / "docs" / f"{name}{end}.webp").write_bytes(picture(page, WIDTHS[width], HEIGHTS[name], dark, "webp"))
    if look is None:
        return
    look.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        for dark in (False, True):
            shown = picture(page, WIDTHS[width], HEIGHT, dark, "png")
            (look / f"{name}-{width}-{'dark' if dark else 'light'}.png").write_bytes(shown)


def picture(page: Page, width: int, height: int, dark: bool, form: str) -> bytes:
    """What can be seen without scrolling of the page that is open, so many pixels wide and high."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page._call("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page._call("Emulation.setDeviceMetricsOverride", size)
    quality = {"quality": 85} if form == "webp" else {}
    shown = page._call("Page.captureScreenshot", {"format": form, **quality})
    return base64.b64decode(shown["data"])


if __name__ == "__main__":
    main()
