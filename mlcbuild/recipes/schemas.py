"""The JSON Schemas, and their verdicts in words.

A schema says what is allowed; two keywords make it say it well: `description` (also shown by editors) completes "is
missing", and `errorMessage` (which editors know too) completes "expected".
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcbuild.recipes.problems import did_you_mean, nearest, one_of, show, where

_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "object": "a mapping of keys to values",
    "array": "a list",
}


@dataclass(frozen=True)
class Complaint:
    """What is wrong with the value at `path`, or with `key` set, with its key."""

    path: tuple[str | int, ...]
    key: bool
    text: str


class Schemas:
    """The schemas of one folder. What is valid is found by jsonschema-rs, a hundred times as fast as jsonschema, which
    is imported when the first file is not valid and says what is wrong."""

    def __init__(self, folder: Path) -> None:
        self._texts = {path.name: path.read_bytes() for path in sorted(folder.glob("*.schema.json"))}

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of all of them."""
        digest = hashlib.sha256()
        for name, text in self._texts.items():
            digest.update(name.encode() + b"\0" + text + b"\0")
        return digest.hexdigest()

    @functools.cached_property
    def contents(self) -> dict[str, Any]:
        """The schemas by kind: `recipe`, `matrix` ..."""
        return {name.removesuffix(".schema.json"): json.loads(text) for name, text in self._texts.items()}

    def complaints(self, kind: str, data: Any) -> list[Complaint]:
        """Everything that is wrong with the content of a file of `kind`."""
        if self.is_valid(kind, data):
            return []
        schema = self.contents[kind]
        found = [c for error in self._validators[kind].iter_errors(data) for c in _explain(error, schema)]
        # `modle: x` is one mistake, not an unknown key and a missing one ...
        meant = {(c.path[:-1], nearest(c.path[-1], c.known)) for c in found if c.known}
        found = [c for c in found if (c.path, c.missing) not in meant]
        # ... and a single value has one mistake, however many keywords it offends.
        single = {c.path: c for c in reversed(found) if c.single}
        return [Complaint(c.path, c.key, c.text) for c in found if not c.single or c is single[c.path]]

    def is_valid(self, kind: str, data: Any) -> bool:
        """Whether nothing is wrong; False also where only jsonschema can tell."""
        check = self._quick[kind].is_valid
        try:
            # 4096.0 is a whole number to jsonschema-rs, and none here: its neighbour must be valid, too.
            return bool(check(data) and (not _has_whole_float(data) or check(_nudged(data))))
        except ValueError:  # what JSON cannot hold, such as a date or a key that is no text
            return False

    @functools.cached_property
    def _quick(self) -> dict[str, Any]:
        import jsonschema_rs

        base = "json-schema:///"  # of schemas without an `$id`
        known = [(f"{base}{kind}.schema.json", schema) for kind, schema in self.contents.items()]
        registry = jsonschema_rs.Registry(known)
        return {kind: jsonschema_rs.validator_for(schema, registry=registry) for kind, schema in self.contents.items()}

    @functools.cached_property
    def _validators(self) -> dict[str, Any]:
        import jsonschema
        import referencing

        # A whole number is an int here: 4096.0 would be another key of the cache than 4096.
        integer = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
            "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
        )
        extend: Any = jsonschema.validators.extend
        validator = extend(jsonschema.Draft202012Validator, validators={"pattern": _pattern}, type_checker=integer)
        resources = [
            (f"{kind}.schema.json", referencing.Resource.from_contents(schema))
            for kind, schema in self.contents.items()
        ]
        registry: Any = referencing.Registry().with_resources(resources)
        return {kind: validator(schema, registry=registry) for kind, schema in self.contents.items()}


def _has_whole_float(data: Any) -> bool:
    if type(data) is dict:
        return any(map(_has_whole_float, data.values()))
    return any(map(_has_whole_float, data)) if type(data) is list else type(data) is float and data.is_integer()


def _nudged(data: Any) -> Any:
    """The same without whole floats: the next number that is not whole. Raises ValueError where there is none."""
    if type(data) is dict:
        return {key: _nudged(value) for key, value in data.items()}
    if type(data) is list:
        return list(map(_nudged, data))
    if type(data) is not float or not data.is_integer():
        return data
    beside = math.nextafter(data, math.inf)
    if beside.is_integer():
        raise ValueError(data)
    return beside


@dataclass(frozen=True)
class _Explained(Complaint):
    known: tuple[str, ...] = ()  # for an unknown key: the keys that there are
    missing: str | None = None  # for a missing key: its name
    single: bool = False  # about a value that is no mapping and no list


def _explain(error: Any, root: Mapping[str, Any]) -> Iterator[_Explained]:
    path = tuple(error.absolute_path)
    value, schema, rule = error.instance, error.schema, error.validator_value
    if error.validator == "additionalProperties":
        known = tuple(schema["properties"])
        inside = f" in `{where(path)}`" if path else ""
        forms = schema.get("patternProperties", ())
        for key in value:
            if key not in known and not any(re.search(form, str(key)) for form in forms):
                hint = did_you_mean(key, known) or f"; expected {one_of(known)}"
                yield _Explained((*path, key), True, f"unknown key `{show(key)}`{inside}{hint}", known=known)
    elif error.validator == "required":
        # jsonschema reports each missing key on its own, and names it in the message only.
        for key in rule:
            if key not in value and error.message.startswith(repr(key)):
                properties = schema["properties"] if "properties" in schema else _properties(root, path)
                about = _phrase(properties.get(key, {}).get("description", ""))
                text = f"`{where((*path, key))}` is missing{about}"
                yield _Explained(path, False, text, missing=key)
    else:
        text = f"{_is(path, value)}expected {_expected(error)}"
        yield _Explained(path, False, text, single=not isinstance(value, dict | list))


def _expected(error: Any) -> str:
    value, rule, validator = error.instance, error.validator_value, error.validator
    if "errorMessage" in error.schema and validator in ("pattern", "const", "not", "anyOf"):
        return str(error.schema["errorMessage"])
    match validator:
        case "enum":
            return one_of(rule) + did_you_mean(value, rule)
        case "type":
            kinds: Sequence[str] = [rule] if isinstance(rule, str) else rule
            quotes = "; write it in quotes" if "string" in kinds and isinstance(value, int | float | bool) else ""
            return " or ".join(_WORDS[kind] for kind in kinds) + quotes
        case "minimum":
            return f"at least {rule}"
        case "maximum":
            return f"at most {rule}"
        case "exclusiveMinimum":
            return f"more than {rule}"
        case "multipleOf":
            return f"a multiple of {rule}"
        case "minLength" | "minItems" | "minProperties":
            return "something, not nothing" if rule == 1 else f"at least {rule} entries"
        case "maxItems":
            return f"at most {rule} entries"
        case "uniqueItems":
            repeated = [item for number, item in enumerate(value) if item in value[:number]]
            return f"each entry once, `{show(repeated[0])}` is repeated"
    return str(error.message)  # a keyword that no schema of ours uses


def _is(path: Sequence[str | int], value: object) -> str:
    if value is None and path:
        return f"`{where(path)}` is empty, "
    if isinstance(value, dict | list) or not path:
        return f"`{where(path)}`: " if path else ""
    # A number where text is expected and the other way round are told apart by their quotes.
    return f"`{where(path)}` is `{show(value)}`, "


def _properties(schema: Mapping[str, Any], path: Sequence[str | int]) -> Mapping[str, Any]:
    """Those at `path`; the schema that a key is missing under may be an `else` that describes none."""
    for part in path:
        schema = schema.get("properties", {}).get(part, {})
    properties: Mapping[str, Any] = schema.get("properties", {})
    return properties


def _phrase(description: str) -> str:
    first = description.split(". ")[0].rstrip(".")
    return f": {first[:1].lower()}{first[1:]}" if first else ""


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    # Python's `$` also matches before a final line break, JSON Schema's does not.
    strict = pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern
    if isinstance(value, str) and not re.search(strict, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")
