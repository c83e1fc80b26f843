"""The commands that look at a checkpoint: `new` and `inspect`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.recipes.types import Catalog

Run = Callable[[argparse.Namespace], int]
Add = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]", str, Run, str], argparse.ArgumentParser]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser], add: Add) -> None:
    """Put the commands among the others."""
    new = add(commands, "new", _new, "write the model file of a checkpoint, and say what it does not know")
    new.add_argument("checkpoint", metavar="HF_ID_OR_PATH", help="owner/name on the hub, or a folder")
    new.add_argument("--name", help="the model's name (default: the repository's or the folder's, in lower case)")
    new.add_argument("--delta-of", metavar="BASE", help="the checkpoint is the difference to this one")
    new.add_argument("--lora", metavar="ADAPTER", help="merge the checkpoint with this adapter: owner/name or a folder")
    new.add_argument("--template", metavar="NAME", help="a conversation template (default: guessed from the tokenizer)")
    new.add_argument(
        "--memory", default="8G", metavar="SIZE", help="suggest quantizations that fit into this (default 8G)"
    )
    new.add_argument("--dry-run", action="store_true", help="print the file and write nothing")

    inspect = add(commands, "inspect", _inspect, "show what a checkpoint or a library is, and what it could share")
    inspect.add_argument(
        "checkpoint", metavar="HF_ID_OR_PATH", help="owner/name on the hub, a folder, a model's name, a library"
    )
    inspect.add_argument("--weights", type=Path, metavar="FOLDER", help="of a library: check that it takes these")
    inspect.add_argument("--json", action="store_true", help="as JSON")

    for parser in (new, inspect):
        parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit (default: the main branch)")


def _new(options: argparse.Namespace) -> int:
    from mlcbuild.cache.gc import parse_size
    from mlcbuild.inspect.new import Wish, new

    catalog = _catalog(required=True)
    named = os.environ.get("MLCBUILD_CACHE")
    cache = Path(named).absolute() if named else catalog.root / "cache"
    wish = Wish(
        options.checkpoint,
        options.name,
        options.revision,
        options.template,
        options.delta_of,
        options.lora,
        parse_size(options.memory),
    )
    new(wish, catalog, cache, dry_run=options.dry_run)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from mlcbuild.inspect import library
    from mlcbuild.inspect.found import find
    from mlcbuild.inspect.inspect import survey, to_json
    from mlcbuild.inspect.text import render

    catalog = _catalog(required=False)
    path = Path(options.checkpoint)
    if path.suffix in library.SUFFIXES and path.is_file():
        seen = library.look(path, catalog, options.weights)
        print(json.dumps(library.to_json(seen), indent=1)) if options.json else sys.stdout.write(library.render(seen))
        return 0
    if options.weights is not None:
        raise MlcBuildError(f"--weights is for a library ({', '.join(library.SUFFIXES)}), and {path} is none")
    with find(options.checkpoint, catalog, options.revision) as found:
        known = survey(found, catalog, found.model.name if found.model else options.checkpoint)
    if options.json:
        print(json.dumps(to_json(known), indent=1, ensure_ascii=False))
    else:
        sys.stdout.write(render(known))
    return 0


def _catalog(required: bool) -> Catalog:
    """The workspace's; outside of one, and unless it is `required`, what comes with mlcbuild. Raises MlcBuildError."""
    from mlcbuild.recipes.load import load
    from mlcbuild.recipes.stock import stock
    from mlcbuild.recipes.workspace import find_root

    try:
        root = find_root(Path.cwd())
    except MlcBuildError:
        if required:
            raise
        root = stock().recipes.parent
    return load(root)
