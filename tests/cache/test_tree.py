"""Names, digests and selections of trees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mlcbuild.cache.tree import Entry, Tree, canonical, check_name
from mlcbuild.errors import MlcBuildError


def entry(digest: str, mode: int = 0o644, path: str = "x") -> Entry:
    return Entry(digest, 1, mode, Path(path))


def test_canonical_json_has_one_spelling_per_value() -> None:
    assert canonical({"b": (1, 2), "a": "é"}) == canonical({"a": "é", "b": [1, 2]}) == b'{"a":"\\u00e9","b":[1,2]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(math.nan)


def test_a_tree_is_its_names_contents_and_modes_and_not_where_they_lie() -> None:
    tree = Tree({"a": entry("1", path="/here"), "b": entry("2")})
    assert tree.digest == Tree({"b": entry("2"), "a": entry("1", path="/there")}).digest
    for other in ({"a": entry("1")}, {"a": entry("1"), "c": entry("2")}, {"a": entry("1"), "b": entry("2", 0o755)}):
        assert Tree(other).digest != tree.digest


def test_selecting_by_patterns() -> None:
    tree = Tree({name: entry("1") for name in ("config.json", "model-1.safetensors", "README.md")})
    assert set(tree.select(("config.json", "*.safetensors")).files) == {"config.json", "model-1.safetensors"}
    assert tree.select(()) is tree


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a//b", "./a", "", "a\\b", "a/", "a\0b", ".."])
def test_names_that_climb_are_refused(name: str) -> None:
    with pytest.raises(MlcBuildError, match="not a plain relative file name"):
        check_name(name)


def test_a_missing_file_of_a_tree_is_named_with_those_that_are_there() -> None:
    with pytest.raises(MlcBuildError, match=r"^x\.json: no such file; there are: a, b$"):
        Tree({"b": entry("1"), "a": entry("2")}).path("x.json")
