"""Whether content is valid under a JSON Schema: yes or no, ten times as fast as jsonschema and more.

It says nothing else; what is wrong with content that is not valid is worked out by jsonschema (`schemas`). The keywords
are those of draft 2020-12 that the schemas here use; their meaning is that of the specification's "Validation" and
"Applicators", a whole number being an int.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
_Of = Callable[[Any], Check]  # the check of a schema that stands inside another

_ANNOTATIONS = {"$schema", "$defs", "title", "description", "examples", "default", "errorMessage"}
_TYPES: dict[str, Check] = {
    "string": lambda value: type(value) is str,
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: type(value) is bool,
    "object": lambda value: type(value) is dict,
    "array": lambda value: type(value) is list,
    "null": lambda value: value is None,
}
# Those that are about values of one type only: the type, and whether the value keeps the rule.
_RULES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, rule: value >= rule),
    "maximum": ("number", lambda value, rule: value <= rule),
    "exclusiveMinimum": ("number", lambda value, rule: value > rule),
    "multipleOf": ("number", lambda value, rule: not value % rule),
    "minLength": ("string", lambda value, rule: len(value) >= rule),
    "minItems": ("array", lambda value, rule: len(value) >= rule),
    "maxItems": ("array", lambda value, rule: len(value) <= rule),
    "uniqueItems": ("array", lambda value, rule: not rule or _unique(value)),
    "minProperties": ("object", lambda value, rule: len(value) >= rule),
    "required": ("object", lambda value, rule: all(name in value for name in rule)),
}
_APPLICATORS = ("properties", "patternProperties", "additionalProperties", "items", "prefixItems", "if", "then", "else")


class Checks:
    """`contents` are the schemas by kind, which may refer to one another as `KIND.schema.json`."""

    def __init__(self, contents: Mapping[str, Any]) -> None:
        self._contents = contents

    @functools.cache  # noqa: B019  (there is one for each set of schemas)
    def at(self, kind: str, pointer: str = "") -> Check:
        """The check of the schema of `kind`, or of a part of it. Raises LookupError for a keyword that is not known."""
        schema = self._contents[kind]
        for part in pointer.split("/")[1:]:
            schema = schema[part]
        return self._check(kind, schema)

    def _check(self, kind: str, schema: Any) -> Check:
        if isinstance(schema, bool):
            return lambda value: schema
        of = functools.partial(self._check, kind)
        checks = [self._keyword(kind, word, rule, of) for word, rule in schema.items() if word not in _ANNOTATIONS]
        parts = [check for check in (*checks, _inside(schema, of)) if check is not None]
        return parts[0] if len(parts) == 1 else lambda value: all(check(value) for check in parts)

    def _keyword(self, kind: str, word: str, rule: Any, of: _Of) -> Check | None:
        if word in _APPLICATORS:
            return None  # `_inside` looks at them together
        if word in _RULES:
            type_of, keeps = _TYPES[_RULES[word][0]], _RULES[word][1]
            return lambda value: not type_of(value) or keeps(value, rule)
        match word:
            case "$ref":
                file, _, pointer = rule.partition("#")
                of_kind = file.removesuffix(".schema.json") or kind
                return lambda value: self.at(of_kind, pointer)(value)  # when it is asked: a schema may hold itself
            case "type":
                types = [_TYPES[name] for name in ([rule] if isinstance(rule, str) else rule)]
                return types[0] if len(types) == 1 else lambda value: any(is_one(value) for is_one in types)
            case "const":
                return lambda value: _equal(value, rule)
            case "enum" if all(type(each) is str for each in rule):
                texts = frozenset(rule)
                return lambda value: type(value) is str and value in texts
            case "enum":
                return lambda value: any(_equal(value, each) for each in rule)
            case "pattern":
                found = re.compile(strict(rule)).search
                return lambda value: type(value) is not str or found(value) is not None
            case "not":
                wrong = of(rule)
                return lambda value: not wrong(value)
            case "propertyNames":
                fits = of(rule)
                return lambda value: type(value) is not dict or all(map(fits, value))
            case "allOf" | "anyOf":
                checks, wanted = [of(each) for each in rule], all if word == "allOf" else any
                return lambda value: wanted(check(value) for check in checks)
        raise LookupError(word)


def strict(pattern: str) -> str:
    """Python's `$` also matches before a final line break, JSON Schema's does not."""
    return pattern[:-1] + r"\Z" if pattern.endswith("$") else pattern


def _inside(schema: Mapping[str, Any], of: _Of) -> Check | None:
    """What the applicators say together: of the parts of an object, of the items of an array, and of the whole."""
    if schema.keys().isdisjoint(_APPLICATORS):
        return None
    parts = {name: of(each) for name, each in schema.get("properties", {}).items()}
    forms = [(re.compile(form).search, of(each)) for form, each in schema.get("patternProperties", {}).items()]
    others, items = of(schema.get("additionalProperties", True)), of(schema.get("items", True))
    first = [of(each) for each in schema.get("prefixItems", ())]
    case, then, otherwise = (of(schema.get(word, True)) for word in ("if", "then", "else"))

    def check(value: Any) -> bool:
        if type(value) is dict:
            for name, each in value.items():
                fitting = [parts[name]] if name in parts else []
                fitting += [fits for found, fits in forms if found(name)]
                if not all(fits(each) for fits in fitting or (others,)):
                    return False
        elif type(value) is list:
            heads = zip(first, value, strict=False)
            if not all(fits(each) for fits, each in heads) or not all(map(items, value[len(first) :])):
                return False
        return then(value) if case(value) else otherwise(value)

    return check


def _unique(values: list[Any]) -> bool:
    if all(type(value) is str for value in values):
        return len(set(values)) == len(values)
    return not any(_equal(value, other) for place, value in enumerate(values) for other in values[:place])


def _equal(one: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and is not true."""
    if type(one) is list and type(other) is list:
        return len(one) == len(other) and all(map(_equal, one, other))
    if type(one) is dict and type(other) is dict:
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return (type(one) is bool) == (type(other) is bool) and bool(one == other)
