"""The schemas themselves, and the stock files under them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mlcbuild.recipes import syntax
from mlcbuild.recipes.files import FOLDERS, stock
from mlcbuild.recipes.schemas import Schemas
from mlcbuild.recipes.types import Linker, Model, Quantization, Recipe, Source, Target, Verify, Weights

SCHEMAS = Schemas(stock().schema)
STOCK = [(kind, path) for kind, folder in FOLDERS.items() for path in sorted((stock().recipes / folder).glob("*.yaml"))]


def _parts(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, subschema) of everything that describes a value."""
    if isinstance(schema, dict):
        if {"type", "enum", "const", "$ref"} & schema.keys():
            yield path, schema
        for key, value in schema.items():
            if key in ("properties", "$defs"):
                for name, part in value.items():
                    yield from _parts(part, f"{path}.{name}")
            elif key in ("items", "additionalProperties"):
                yield from _parts(value, f"{path}[]")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_schema_is_valid_and_has_examples_that_are_valid_under_it(kind: str) -> None:
    schema = SCHEMAS.contents[kind]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["examples"]
    for example in schema["examples"]:
        assert SCHEMAS.complaints(kind, example) == []


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_key_is_described(kind: str) -> None:
    schema = SCHEMAS.contents[kind]
    shared = SCHEMAS.contents["recipe"]["$defs"]
    for place, part in _parts(schema, kind):
        for name, value in part.get("properties", {}).items():
            target = value.get("$ref", "").rsplit("/", 1)[-1]
            described = "description" in value or "description" in {**shared, **schema.get("$defs", {})}.get(target, {})
            assert described, f"{place}.{name}"


@pytest.mark.parametrize("kind", FOLDERS)
def test_objects_are_closed(kind: str) -> None:
    for place, part in _parts(SCHEMAS.contents[kind], kind):
        if part.get("type") == "object":
            assert part.get("additionalProperties") is not None, place


@pytest.mark.parametrize(("kind", "path"), STOCK, ids=lambda value: getattr(value, "stem", value))
def test_a_stock_file_is_valid(kind: str, path: Path) -> None:
    data, faults = syntax.construct(syntax.compose(path.read_text()))
    assert faults == []
    assert SCHEMAS.complaints(kind, data) == []


@pytest.mark.parametrize(("kind", "path"), STOCK, ids=lambda value: getattr(value, "stem", value))
def test_a_stock_file_names_its_schema_for_editors(kind: str, path: Path) -> None:
    match = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert match is not None
    assert (path.parent / match[1]).resolve() == (stock().schema / f"{kind}.schema.json").resolve()


def test_architecture_fields_are_those_of_the_structure() -> None:
    """`config` and `decoder` accept the names that mlcbuild.models knows, and no others."""
    from mlcbuild.models.structure import Structure

    fields = set(Structure.__dataclass_fields__)
    schema = SCHEMAS.contents["architecture"]["properties"]
    assert set(schema["config"]["properties"]) <= fields
    assert set(schema["decoder"]["properties"]) <= fields


def test_template_fields_are_those_of_the_conversation() -> None:
    from mlcbuild.chat.conversation import Conversation

    fields = set(Conversation.__dataclass_fields__) - {"name"}  # the file's own name
    assert set(SCHEMAS.contents["template"]["properties"]) == fields


@pytest.mark.parametrize(
    ("kind", "path", "type_"),
    [
        ("recipe", "", Recipe),
        ("recipe", "$defs.verify", Verify),
        ("model", "", Model),
        ("model", "$defs.checkpoint", Source),
        ("quantization", "", Quantization),
        ("quantization", "weights", Weights),
        ("target", "", Target),
        ("target", "linker", Linker),
    ],
)
def test_every_key_arrives_in_a_field(kind: str, path: str, type_: Any) -> None:
    """A key that is accepted and then ignored would be worse than an unknown one."""
    schema = SCHEMAS.contents[kind]
    for part in path.split(".") if path else ():
        schema = schema[part] if part in schema else schema["properties"][part]
    # `class` is the field `kind`; descriptions are for people, inherited settings have arrived by then.
    keys = {"kind" if key == "class" else key for key in schema["properties"]} - {"description", "extends"}
    assert keys <= {field.name for field in dataclasses.fields(type_)}


def test_the_schemas_digest_covers_every_schema(tmp_path: Path) -> None:
    for kind, schema in SCHEMAS.contents.items():
        (tmp_path / f"{kind}.schema.json").write_text(json.dumps(schema))
    before = Schemas(tmp_path).digest
    (tmp_path / "recipe.schema.json").write_text("{}")
    assert Schemas(tmp_path).digest != before


def _places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value inside `data`."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*place, key)
        yield from _places(data[key], (*place, key))


def _changed(data: Any, chance: random.Random) -> Any:
    """The content with one or two values taken out, replaced or added."""
    data = copy.deepcopy(data)
    values: list[Any] = [
        None,
        True,
        0,
        1,
        -1,
        1.0,
        2.5,
        7,
        128,
        "",
        "x",
        "a\n",
        "float16",
        "native",
        [],
        ["a"],
        ["a", "a"],
        {},
    ]
    values += [[1, True], [1, 1.0], {"path": "a"}, {"hf": "a/b"}, {"hf": "a", "path": "b"}]
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(data))
        if not places:
            break
        *around, last = chance.choice(places)
        at = functools.reduce(lambda each, key: each[key], around, data)
        match chance.choice("drra"):
            case "d":
                del at[last]
            case "r":
                at[last] = chance.choice(values)
            case _ if isinstance(at, dict):
                at[chance.choice(["extra", "extends", "path", "hf", "revision", "kind", "name"])] = chance.choice(
                    values
                )
            case _:
                at.append(chance.choice([*at, *values]))
    return data


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_valid_is_found_out_as_jsonschema_does(kind: str) -> None:
    """The quick check, whose yes is believed, is compared over content of every kind, changed at random."""
    contents = SCHEMAS.contents[kind]["examples"]
    contents += [syntax.construct(syntax.compose(path.read_text()))[0] for of, path in STOCK if of == kind][:40]
    chance, whole, verdicts = random.Random(kind), SCHEMAS._validators[kind], set()
    for _ in range(40 if kind == "architecture" else 150):
        data = _changed(chance.choice(contents), chance)
        verdicts.add(whole.is_valid(data))
        assert SCHEMAS.is_valid(kind, data) == whole.is_valid(data), data
    assert verdicts == {True, False}
