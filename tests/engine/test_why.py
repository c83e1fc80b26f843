"""The reasons for a miss, as the user reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.cache.action import Action
from mlcbuild.cache.store import Store
from mlcbuild.cache.tree import Tree
from mlcbuild.engine.graph import Graph, Input, Step
from mlcbuild.engine.lookup import Lookup
from mlcbuild.engine.why import why

FIELDS = {"quantization": {"weights": {"group_size": 32, "bits": 4}}, "names": ["a", "b"]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "text").write_text("text")
    return Store(tmp_path / "cache")


def lookup(store: Store, fields: object = FIELDS) -> Lookup:
    text = Input("text", path=store.root.parent / "text")
    steps = [
        Step("convert", "convert:m", "tests.engine.toysteps.convert", fields, (text,)),  # type: ignore[arg-type]
        Step("quantize", "quantize:m", "tests.engine.toysteps.quantize", {}, (Input("convert", step="convert:m"),)),
    ]
    return Lookup(store, Graph({step.name: step for step in steps}))


def record(store: Store, name: str = "convert:m", **changes: object) -> None:
    """Put an action into the store as if it had run, with some of its ingredients changed."""
    now = lookup(store).ingredients("convert:m")
    assert now is not None
    (store.root / "incoming").write_text("made")
    ingredients = {
        "code": now.code,
        "fields": now.fields,
        "inputs": {name: tree.digest for name, tree in now.inputs.items()},
        "toolchain": now.toolchain,
        **changes,
    }
    key = now.key if not changes else f"{len(list(store.root.glob('ac/*/*'))):064}"
    tree = Tree({"file": store.ingest(store.root / "incoming")})
    store.commit(Action(key, "convert", name, seconds=1.0, tree=tree, **ingredients))  # type: ignore[arg-type]


def reasons(store: Store, fields: object = FIELDS) -> tuple[str, ...]:
    answer, _ = why(lookup(store, fields), ["quantize:m"])
    assert not answer.hit
    return answer.reasons


def test_nothing_was_ever_built(store: Store) -> None:
    convert, quantize = why(lookup(store), ["quantize:m"])
    assert str(convert) == "miss  convert:m\n        no convert step was ever run with this cache"
    assert str(quantize) == "miss  quantize:m\n        input convert: convert:m has to run first"


def test_a_hit(store: Store) -> None:
    record(store)
    assert str(why(lookup(store), ["convert:m"])[0]) == "hit   convert:m"


def test_a_field(store: Store) -> None:
    record(store)
    fields = {"quantization": {"weights": {"group_size": 40, "bits": 4}}, "names": ["a", "c"]}
    assert reasons(store, fields) == ('names ["a", "b"] → ["a", "c"]', "quantization.weights.group_size 32 → 40")


def test_a_field_that_is_new_or_gone(store: Store) -> None:
    record(store, fields={"old": None, **FIELDS})
    assert reasons(store, {"new": "x", **FIELDS}) == ("new (absent) → x", "old null → (absent)")


def test_code_tools_and_inputs(store: Store) -> None:
    version = lookup(store).versions(lookup(store).graph.steps["convert:m"])["numpy"]
    record(store, code="other", toolchain={"numpy": "1.0"}, inputs={"text": "other"})
    assert reasons(store) == (
        "the code of the step convert changed",
        f"numpy 1.0 → {version}",
        f"input text: other content ({store.root.parent / 'text'})",
    )


def test_the_nearest_action_is_compared(store: Store) -> None:
    record(store, code="other", toolchain={"numpy": "1.0"})
    record(store, name="convert:other", code="third")
    record(store, fields={"quantization": {"weights": {"group_size": 64, "bits": 3}}, "names": ["a", "b"]})
    assert reasons(store) == ("the code of the step convert changed",)


def test_a_lost_blob(store: Store) -> None:
    record(store)
    for blob in store.root.glob("cas/*/*"):
        blob.unlink()
    assert reasons(store) == ("its artifact is in the cache no longer: a file of it was removed or changed",)


def test_long_values_are_cut(store: Store) -> None:
    record(store, fields={"text": "a" * 100})
    assert reasons(store, {"text": "a" * 100 + "b"}) == (f"text {'a' * 60}… → {'a' * 60}…",)
