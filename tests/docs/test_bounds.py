"""docs/bounds.md is what the code says: every bound with its value."""

from __future__ import annotations

import importlib
import re

from mlcbuild.chat import apart, jinja, tokenizer_info
from mlcbuild.checkpoints import header, hub, listing, pace, pickles
from mlcbuild.models import fields
from tests.docs.pages import DOCS, code, table

ROWS = table((DOCS / "bounds.md").read_text(), "what", "at most", "kept by")
BOUND = re.compile(r"(MAX|MOST|LARGEST|LONGEST|SLOWEST)(_[A-Z]+)*")
MODULES = (header, hub, listing, pace, pickles, apart, jinja, tokenizer_info, fields)


def test_every_row_has_the_value_of_the_code() -> None:
    for what, bound, kept_by in ROWS:
        if not kept_by:
            assert what.startswith("**")
            continue
        module, _, name = code(kept_by)[0].rpartition(".")
        value = getattr(importlib.import_module(f"mlcbuild.{module}"), name)
        number = f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
        assert re.search(rf"(?<![\d,]){number}(?![\d,])", f"{what} {bound}"), f"{what}: {name} is {number}"


def test_every_bound_of_these_modules_has_a_row() -> None:
    told = {name.rpartition(".")[2] for _, _, kept_by in ROWS for name in code(kept_by)}
    for module in MODULES:
        assert {name for name in vars(module) if BOUND.fullmatch(name)} <= told, module.__name__
