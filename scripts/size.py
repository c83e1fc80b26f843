"""How large the program is, and whether it keeps to its budget: every line has to be worth its reading.

python scripts/size.py                  # lines by package, the change since the main branch; exits with 1 over budget
python scripts/size.py --base REV       # the change since another revision
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

PYTHON, ARCHITECTURES = "mlcbuild", "recipes/architectures"
MOST = {PYTHON: 50_500, ARCHITECTURES: 5_100}  # lines of Python, lines of YAML
MOST_IN_A_FILE, FEW_IN_A_FILE = 400, 35
_SUFFIXES = {PYTHON: ".py", ARCHITECTURES: ".yaml"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sizes; 1 where a bound is passed."""
    parser = argparse.ArgumentParser("python scripts/size.py", description="Lines by package, and the budget.")
    parser.add_argument("--base", metavar="REV", help="compare with this revision (default: where main was left)")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository")
    options = parser.parse_args(arguments)
    sizes = _sizes(options.root)
    print(report(sizes, _sizes_at(options.root, options.base)))
    problems = over_budget(sizes)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def report(sizes: Mapping[str, int], before: Mapping[str, int] | None) -> str:
    """A row for each package, with its change where `before` is known, and the files that are large or tiny."""
    now, then = _packages(sizes), _packages(before or {})
    rows = []
    for name in sorted(now | then):
        change = f"{now[name] - then[name]:+6,}" if before is not None and now[name] != then[name] else ""
        rows.append(f"{name:34}{now[name]:7,} {change}".rstrip())
    for part, most in MOST.items():
        total = sum(lines for path, lines in sizes.items() if path.startswith(f"{part}/"))
        rows.append(f"{part + ', all of it':34}{total:7,} of {most:,}")
    python = {path: lines for path, lines in sizes.items() if path.startswith(f"{PYTHON}/")}
    tiny = [path for path, lines in python.items() if 1 < lines < FEW_IN_A_FILE]
    rows.append(f"{len(tiny)} of {len(python)} Python files are under {FEW_IN_A_FILE} lines: {', '.join(tiny)}")
    return "\n".join(rows)


def over_budget(sizes: Mapping[str, int]) -> list[str]:
    """A sentence for each bound that is passed."""
    problems = []
    for part, most in MOST.items():
        total = sum(lines for path, lines in sizes.items() if path.startswith(f"{part}/"))
        if total > most:
            problems.append(f"{part}/ has {total:,} lines, {total - most:,} over its budget of {most:,}")
    for path, lines in sizes.items():
        if path.endswith(".py") and lines > MOST_IN_A_FILE:
            problems.append(f"{path} has {lines} lines, over {MOST_IN_A_FILE}: split it by its ideas")
    return problems


def _packages(sizes: Mapping[str, int]) -> Counter[str]:
    """Lines by package: `mlcbuild/cli`, `mlcbuild/tasks.py`, `recipes/architectures`."""
    lines: Counter[str] = Counter()
    for path, count in sizes.items():
        lines["/".join(path.split("/")[:2])] += count
    return lines


def _sizes(root: Path) -> dict[str, int]:
    """Lines of every counted file, by its path in the repository."""
    files = [path for part, suffix in _SUFFIXES.items() for path in sorted((root / part).rglob(f"*{suffix}"))]
    return {path.relative_to(root).as_posix(): path.read_bytes().count(b"\n") for path in files}


def _sizes_at(root: Path, base: str | None) -> dict[str, int] | None:
    """The same at a revision; None where git does not have it, as in a shallow clone."""
    for revision in [base] if base else ["origin/main", "main"]:
        found = subprocess.run(["git", "merge-base", "HEAD", revision], cwd=root, capture_output=True, text=True)
        if found.returncode == 0:
            command = ["git", "archive", found.stdout.strip(), *_SUFFIXES]
            archive = subprocess.run(command, cwd=root, capture_output=True, check=True)
            return _sizes_in(archive.stdout)
    return None


def _sizes_in(archive: bytes) -> dict[str, int]:
    sizes = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None and member.name.endswith(tuple(_SUFFIXES.values())):
                sizes[member.name] = content.read().count(b"\n")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
