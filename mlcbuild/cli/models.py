"""The commands about a model and what it becomes: `new`, `inspect`, `test-run`, `generate` and `compare`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlcbuild.cli.options import (
    CACHE,
    JSON,
    RECIPES,
    SAMPLING,
    STOP,
    arg,
    cache_of,
    command,
    given,
    named_cache,
    workspace,
)
from mlcbuild.errors import MlcBuildError

if TYPE_CHECKING:
    from mlcbuild.recipes.types import Catalog


def _new(options: argparse.Namespace) -> int:
    from mlcbuild.cache.gc import parse_size
    from mlcbuild.inspect.model_file import Wish, write_model_file

    catalog = _catalog(required=True)
    memory = parse_size(options.memory)
    told = (options.name, options.revision, options.template, options.delta_of, options.lora)
    wish = Wish(options.checkpoint, *told, memory)
    write_model_file(wish, catalog, cache_of(options, catalog.root), dry_run=options.dry_run)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from mlcbuild.inspect import library
    from mlcbuild.inspect.checkpoint import open_checkpoint
    from mlcbuild.inspect.inspection import inspect_checkpoint, to_json
    from mlcbuild.inspect.inspection_text import render

    catalog = _catalog(required=False)
    path = Path(options.checkpoint)
    if path.suffix in library.SUFFIXES and path.is_file():
        seen = library.inspect_library(path, catalog, options.weights)
        print(json.dumps(library.to_json(seen), indent=1)) if options.json else sys.stdout.write(library.render(seen))
        return 0
    if options.weights is not None:
        raise MlcBuildError(f"--weights is for a library ({', '.join(library.SUFFIXES)}), and {path} is none")
    with open_checkpoint(options.checkpoint, catalog, options.revision) as checkpoint:
        name = checkpoint.model.name if checkpoint.model else options.checkpoint
        inspection = inspect_checkpoint(checkpoint, catalog, name)
    if options.json:
        print(json.dumps(to_json(inspection), indent=1, ensure_ascii=False))
    else:
        sys.stdout.write(render(inspection))
    return 1 if inspection.has_problem else 0


def _catalog(required: bool) -> Catalog:
    """The workspace's; outside of one, and unless it is `required`, what comes with mlcbuild. Raises MlcBuildError."""
    from mlcbuild.recipes.files import stock
    from mlcbuild.recipes.load import load

    try:
        root = workspace()
    except MlcBuildError:
        if required:
            raise
        root = stock().recipes.parent
    return load(root)


def _test_run(options: argparse.Namespace) -> int:
    from mlcbuild.reporting.screen import screen
    from mlcbuild.smoke.run import test_run

    for text in test_run(workspace(), options.recipe, named_cache(options), screen(sys.stdout)).values():
        print(text)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from mlcbuild.runtime.commands import generate

    generate(**given(options))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from mlcbuild.reporting.compare import compare

    sys.stdout.write(compare(options.one, options.other))
    return 0


_REVISION = arg("--revision", metavar="REV", help="a branch, tag or commit (default: the main branch)")
COMMANDS = (
    command(
        "new",
        _new,
        "write the model file of a checkpoint, and say what is left for you to decide",
        arg(
            "checkpoint",
            metavar="HF_ID_OR_PATH",
            help="owner/name, owner/name:Q4_K_M, a folder, a GGUF file",
        ),
        arg("--name", help="the model's name (default: the repository's or the folder's, in lower case)"),
        arg("--delta-of", metavar="BASE", help="the checkpoint holds only the difference to this one"),
        arg("--lora", metavar="ADAPTER", help="merge the checkpoint with this adapter: owner/name or a folder"),
        arg("--template", metavar="NAME", help="a conversation template (default: guessed from the tokenizer)"),
        arg("--memory", default="8G", metavar="SIZE", help="suggest quantizations that fit into this (default 8G)"),
        arg("--dry-run", action="store_true", help="print the file and write nothing"),
        _REVISION,
    ),
    command(
        "inspect",
        _inspect,
        "show what a checkpoint or a library is, and which libraries it could share",
        arg(
            "checkpoint",
            metavar="HF_ID_OR_PATH",
            help="owner/name, a folder, a GGUF file, a model's name, a library",
        ),
        arg("--weights", type=Path, metavar="FOLDER", help="check that the library fits these weights"),
        JSON,
        _REVISION,
    ),
    command("test-run", _test_run, "try every step of a recipe on a small random model", RECIPES, CACHE),
    command(
        "generate",
        _generate,
        "run a package: print what it writes after a prompt",
        arg("folder", type=Path, help="a package (dist/NAME), or a folder of weights with --library"),
        arg("--prompt", required=True, help="the text to continue, or with --chat the user's message"),
        arg("--chat", action="store_true", help="apply the package's conversation template"),
        arg("--library", type=Path, help="the compiled library, where it is not in the folder"),
        arg("--max-tokens", type=int, default=256, metavar="N", help="stop after N tokens (default 256)"),
        *SAMPLING,
        STOP,
        JSON,
        arg("--threads", type=int, metavar="N", help="CPU threads (default: physical cores)"),
        arg("--device", choices=("cpu", "cuda"), help="where to run (default: what the library was built for)"),
    ),
    command(
        "compare",
        _compare,
        "print two packages' figures side by side",
        arg("one", type=Path, metavar="A", help="a package (dist/NAME)"),
        arg("other", type=Path, metavar="B", help="another package"),
    ),
)
