"""docs/kinds.md: the bounds are those that are applied, the kinds those that there are."""

from __future__ import annotations

import dataclasses

from mlcbuild.models.kinds import KINDS
from mlcbuild.verify.vector_bounds import BOUNDS
from tests.architectures.agreement import known_architectures
from tests.docs.pages import DOCS, code, table

PAGE = (DOCS / "kinds.md").read_text()


def test_the_bounds_of_vectors() -> None:
    rows = table(PAGE, "class", "warn below cosine", "fail below cosine")
    described = {code(row[0])[0]: tuple(map(float, row[1:])) for row in rows}
    assert described == {name: dataclasses.astuple(bounds) for name, bounds in BOUNDS.items()}


def test_every_architecture_that_is_no_chat_decoder_is_described() -> None:
    rows = table(PAGE, "architecture", "`kind`", "tested against")
    described = {name for row in rows for name in code(row[0])}
    special = {n for n, each in known_architectures().items() if {"kind", "embedding"} & set(each.data)}
    assert described == special
    assert {each.data.get("kind", "decoder") for each in known_architectures().values()} == set(KINDS)
