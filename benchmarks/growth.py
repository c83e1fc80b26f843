"""How costs grow with the number of recipes, where nothing is built: planning, checking, listing, and one edit.

    python benchmarks/growth.py                          # 1,000, 10,000 and 30,000 recipes
    python benchmarks/growth.py --recipes 1000 3000 --rounds 1
    python benchmarks/growth.py --touched 10000          # and builds with nothing to do, after one YAML was touched

The workspaces are those of `null_build.py`. Each command starts with an empty cache. Medians of CPU and wall seconds
are printed, and CPU seconds a recipe as a multiple of those of the first row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import many, null_build
from benchmarks.many import Cost

MLCBUILD, DOIT = [sys.executable, "-m", "mlcbuild.cli"], [sys.executable, "-m", "doit"]


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    print(f"{'what':<24} {'recipes':>8} {'CPU s':>8} {'wall s':>8}  a recipe")
    try:
        for what, measure in COMMANDS.items():
            first = None
            for count in options.recipes:
                cost = _median([measure(folder / "workspace", count) for _ in range(options.rounds)])
                first = first or cost.cpu / count
                _print(what, count, cost, f"{cost.cpu / count / first:.2f}")
        for count in options.touched:
            _print("build after a touch", count, touched(folder / "workspace", count, options.rounds), "")
    finally:
        shutil.rmtree(folder)


def plan(root: Path, count: int) -> Cost:
    _new(root, count)
    return many.run([*MLCBUILD, "plan"], root, {}, root.parent / "output.txt")


def check_misspelt(root: Path, count: int) -> Cost:
    """Every recipe names a model that is not there, by a letter."""
    _new(root, 1)
    for number in range(count):
        text = "model: storeis\nquantization: q4f16_1\ntarget: cpu\n"
        (root / "recipes" / f"r{number:05}.yaml").write_text(text)
    return many.run([*MLCBUILD, "check"], root, {}, root.parent / "output.txt", status=1)


def list_all(root: Path, count: int) -> Cost:
    _new(root, count)
    return many.run([*DOIT, "list", "--all"], root, {}, root.parent / "output.txt")


def touched(root: Path, count: int, rounds: int) -> Cost:
    """A build of what is built, after one model file was written again as it was."""
    shutil.rmtree(root, ignore_errors=True)
    null_build.make_workspace(root, count)
    null_build.check([*DOIT, "build"], root)  # what a first look learns is remembered
    costs = []
    for _ in range(rounds):
        os.utime(root / "recipes" / "models" / "m0000.yaml")
        costs.append(many.run([*DOIT, "build"], root, {}, root.parent / "output.txt"))
    return _median(costs)


COMMANDS: dict[str, Callable[[Path, int], Cost]] = {
    "plan, nothing cached": plan,
    "check, names misspelt": check_misspelt,
    "list --all": list_all,
}


def _new(root: Path, count: int) -> None:
    shutil.rmtree(root, ignore_errors=True)
    many.write_workspace(root, count)


def _median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.cpu for cost in costs), statistics.median(cost.wall for cost in costs))


def _print(what: str, count: int, cost: Cost, ratio: str) -> None:
    print(f"{what:<24} {count:>8,} {cost.cpu:>8.2f} {cost.wall:>8.2f}  {ratio:>8}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, nargs="*", default=[1000, 10000, 30000], metavar="N")
    parser.add_argument("--touched", type=int, nargs="*", default=[10000], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
