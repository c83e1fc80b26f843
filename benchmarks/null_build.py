"""What a build costs that has nothing to do, beside ninja on a graph of the same steps.

    python benchmarks/null_build.py                      # 100, 1,000 and 5,000 recipes
    python benchmarks/null_build.py --recipes 1000 --rounds 11
    python benchmarks/null_build.py --keep /tmp/null     # leave the workspaces there, to look into or to profile

Each workspace is a matrix of tiny models (one in five with a structure of its own), quantizations and targets. Nothing
is compiled: the cache's entries and blobs are put there through the store's own functions, with artifacts of as many
files as real ones have, and the packages are installed as a build installs them. Ninja gets one edge a step and one a
package, with the same number of output files, and has run once.

Rounds are interleaved; medians of CPU seconds (user and system of the process and its children) and of wall seconds
are printed, with the ratio to ninja. Needs `ninja` (from PyPI, or the system's); without it its columns are empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mlcbuild.cache.action import Action
from mlcbuild.cache.tree import Tree
from mlcbuild.engine.graph import Step
from mlcbuild.workspace.session import Session, open_session

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import many
from benchmarks.many import Cost

# What a step of each kind makes; a package also passes on the files of its weights and its library.
FILES = {
    "convert": ("parameters.json",),
    "quantize": ("params_shard_0.bin", "tensor-cache.json"),
    "lower": ("module.json", "metadata.json"),
    "library": ("model.so", "library.json"),
    "package": ("{model}-MLC/mlc-chat-config.json",),
    "measure": ("figures.json",),
    "verify": ("quality.json",),
}


def main() -> None:
    options = _options()
    print(
        f"{'recipes':>8} {'steps':>7}  {'what':<22} {'CPU s':>7} {'wall s':>7}  {'ninja CPU':>9} {'wall':>7}  CPU ratio"
    )
    folder = Path(options.keep or tempfile.mkdtemp(prefix="null-build-"))
    try:
        for count in options.recipes:
            measure(folder / str(count), count, options.rounds)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def measure(folder: Path, count: int, rounds: int) -> None:
    """Make the workspace and ninja's graph in `folder` and print a line per command."""
    session = make_workspace(folder / "workspace", count)
    one = sorted(session.graph.goals)[count // 2]
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    make_ninja(folder / "ninja", session, ninja)
    doit = [sys.executable, "-m", "doit"]
    commands: dict[str, tuple[list[str], list[str] | None]] = {
        "doit build": ([*doit, "build"], [ninja] if ninja else None),
        "doit build recipe=ONE": ([*doit, "build", f"recipe={one}"], [ninja, f"build/{one}"] if ninja else None),
    }
    for command, _ in commands.values():  # what a first look learns is remembered
        check(command, folder / "workspace")
    time.sleep(0.05)
    costs: dict[str, list[tuple[Cost, Cost | None]]] = {what: [] for what in commands}
    for _ in range(rounds):
        for what, (command, beside) in commands.items():
            ours = run(command, folder / "workspace")
            costs[what].append((ours, run(beside, folder / "ninja") if beside else None))
    for what, measured in costs.items():
        cpu, wall = (statistics.median(getattr(ours, name) for ours, _ in measured) for name in ("cpu", "wall"))
        theirs = [other for _, other in measured if other is not None]
        line = f"{count:>8,} {len(session.graph.steps):>7,}  {what:<22} {cpu:>7.3f} {wall:>7.3f}"
        if theirs:
            other = statistics.median(cost.cpu for cost in theirs)
            line += (
                f"  {other:>9.3f} {statistics.median(cost.wall for cost in theirs):>7.3f}  {cpu / max(other, 1e-3):.1f}"
            )
        print(line, flush=True)


def run(command: Sequence[str], where: Path) -> Cost:
    return many.run(command, where, {}, where.parent / "output.txt")


def check(command: Sequence[str], where: Path) -> None:
    """Raises RuntimeError unless the build says that it had nothing to do."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=many.environment())
    if done.returncode or not done.stdout.splitlines()[-1].startswith("0 done, "):
        raise RuntimeError(f"{' '.join(command)}: not a null build: {done.stdout[-500:]}{done.stderr[-500:]}")


def make_workspace(root: Path, count: int) -> Session:
    """A workspace with `count` recipes, all of them built and installed."""
    many.write_workspace(root, count)
    sync, os.fsync = os.fsync, lambda descriptor: None  # a benchmark's cache need not survive a power cut
    try:
        session = open_session(root, lambda event: None)
        for step in session.graph.steps.values():
            _pretend(session, step)
        for name in session.graph.goals:
            session.install(name)
    finally:
        os.fsync = sync
    return session


def _pretend(session: Session, step: Step) -> None:
    """Commit an action for the step, as if it had run."""
    lookup, store = session.lookup, session.store
    ingredients = lookup.ingredients(step.name)
    assert ingredients is not None
    given = ingredients.inputs
    passed_on: dict[str, Mapping[str, object]] = {}
    files = {}
    if step.kind == "download":
        files = dict(given["files"].files)
        for entry in files.values():
            store.borrow(entry)
    if step.kind == "package":
        passed_on = {"quantize": given["quantize"].files, "library": {"model.so": given["library"].files["model.so"]}}
        for entries in passed_on.values():
            files |= {f"{step.fields['model']}-MLC/{name}": entry for name, entry in entries.items()}  # type: ignore[misc]
    scratch = store.root / "pretended"
    for name in FILES.get(step.kind, ()):
        scratch.write_text(json.dumps({"key": ingredients.key, "file": name, "kl": 0.01, "status": "passed"}))
        files[name.format(**step.fields)] = store.ingest(scratch)
    tree = Tree(dict(sorted(files.items())))
    action = Action.of(ingredients, step.name, 1.0, tree)
    store.commit(action)
    lookup.learn(step.name, action)


def make_ninja(folder: Path, session: Session, ninja: str | None) -> None:
    """The same graph for ninja, brought up to date."""
    folder.mkdir(parents=True)
    steps = session.graph.steps
    outputs = {name: [f"{_path(name)}/{file}" for file in _files(session, name)] for name in steps}
    lines = ["rule step", "  command = touch $out"]
    for name, step in steps.items():
        needed = " ".join(output for producer in step.producers for output in outputs[producer])
        sources = " ".join(source for item in step.inputs if item.path for source in _sources(item.path))
        lines.append(f"build {' '.join(outputs[name])}: step {needed} {sources}")
    for name, goal in session.graph.goals.items():
        lines.append(f"build build/{name}: step {' '.join(outputs[goal.steps['verify']])}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    if ninja:
        subprocess.run([ninja, "--quiet"], cwd=folder, check=True)


def _files(session: Session, name: str) -> list[str]:
    action = session.lookup.find(name)
    assert action is not None
    return sorted(action.tree.files)


def _sources(path: Path) -> Iterator[str]:
    yield from (str(file) for file in sorted(path.iterdir())) if path.is_dir() else [str(path)]


def _path(name: str) -> str:
    return name.replace(":", "/")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, nargs="+", default=[100, 1000, 5000], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--keep", metavar="DIR", help="make the workspaces there and leave them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
