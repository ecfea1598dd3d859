"""Holds JSON schemas of others to what model servers take: one that they don't take fails the request with all tools.

It does what the metaschema of draft 2020-12 says, which OpenAI's refusals quote, whatever draft a schema names: in a
walk of its own, as a library takes seconds for what a hostile server can put into a schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from ..events import Json, dumps

COMBINING: Final = ("allOf", "anyOf", "enum", "not", "oneOf")
"""What OpenAI refuses at the top of a schema, though it may stand there."""
_MOST_PATTERN: Final = 1_000
_MOST_HOPS: Final = 20
_TYPES: Final = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})


class UnfitError(Exception):
    """Why a model cannot be told of a function, in a few words."""


def check(schema: Json) -> None:
    """Raise :class:`UnfitError` where a model server would refuse it as the arguments of a function."""
    if schema.get("type") != "object":
        raise UnfitError("its schema is none of an object")
    waiting: list[Any] = [schema]
    known: set[str] = set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, bool):
            continue
        if not isinstance(one, dict):
            raise UnfitError("its schema has something else where a schema is to be")
        if "$id" in one and one is not schema:
            raise UnfitError("its schema has another within that has an $id")
        for keyword, value in one.items():
            if (rule := _RULES.get(keyword)) is not None and not rule(value):
                raise UnfitError(f"its schema has a wrong {keyword}")
            if keyword in _REFERENCES:
                _check_reference(schema, value, known)
            waiting += _inner(keyword, value)


def _inner(keyword: str, value: Any) -> Iterator[Any]:
    """Give the schemas that a keyword has, whose value is as its rule says."""
    if keyword in _ONE:
        yield value
    elif keyword in _SOME:
        yield from value
    elif keyword in _NAMED:
        yield from value.values()
    elif keyword == "dependencies":
        yield from (one for one in value.values() if not isinstance(one, list))


def _check_reference(schema: Json, reference: str, known: set[str]) -> None:
    """Look where a reference leads; ``known`` are those that lead somewhere, each of which is looked at once."""
    passed: list[str] = []
    while reference not in known:
        if reference in passed or len(passed) >= _MOST_HOPS:
            raise UnfitError("its schema has references that lead to each other")
        passed.append(reference)
        found = _resolved(schema, reference)
        if not isinstance(found, dict) or not isinstance(found.get("$ref"), str):
            break
        reference = found["$ref"]
    known.update(passed)


def _resolved(schema: Json, reference: str) -> Any:
    if not re.fullmatch("#(/.*)?", reference):
        raise UnfitError("its schema refers to one elsewhere")
    found: Any = schema
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and re.fullmatch("[0-9]{1,9}", name) and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise UnfitError("its schema refers to what it does not have")
    return found


def without_combining(schema: Json) -> tuple[Json, str]:
    """Give the schema without what OpenAI refuses at its top, and that in words, for the function's description: the
    server holds the arguments to it, and a model that knows of it keeps to it."""
    taken = {keyword: schema[keyword] for keyword in COMBINING if keyword in schema}
    rest = {keyword: value for keyword, value in schema.items() if keyword not in taken}
    return rest, f"The arguments are also to be valid by this JSON schema: {dumps(taken)}" if taken else ""


# Rules


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > _MOST_PATTERN:
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError, Warning):
        return False
    return True


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value) and len(set(value)) == len(value)


def _is_type(value: Any) -> bool:
    if isinstance(value, str):
        return value in _TYPES
    return _are_names(value) and bool(value) and _TYPES.issuperset(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_some(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _are_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value))


def _are_named_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_are_names, value.values()))


def _are_named_flags(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_flag, value.values()))


def _are_dependencies(value: Any) -> bool:
    return isinstance(value, dict) and all(_are_names(one) for one in value.values() if isinstance(one, list))


def _is_anchor(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[A-Za-z_][-A-Za-z0-9._]*", value) is not None


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[^#]*#?", value) is not None


_REFERENCES: Final = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_ONE: Final = frozenset(
    {
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_SOME: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED: Final = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})


def _rules() -> Iterator[tuple[Callable[[Any], bool], str]]:
    yield _is_text, "$comment $schema contentEncoding contentMediaType description format title"
    yield _is_text, " ".join(_REFERENCES)
    yield _is_flag, "deprecated readOnly uniqueItems writeOnly"
    yield _is_number, "exclusiveMaximum exclusiveMinimum maximum minimum"
    yield _is_count, "maxContains maxItems maxLength maxProperties minContains minItems minLength minProperties"
    yield _is_mapping, " ".join(_NAMED - {"patternProperties"})
    yield _is_some, " ".join(_SOME)
    yield _is_list, "enum examples"
    yield _is_anchor, "$anchor $dynamicAnchor $recursiveAnchor"
    yield _is_id, "$id"
    yield _is_pattern, "pattern"
    yield _is_step, "multipleOf"
    yield _is_type, "type"
    yield _are_dependencies, "dependencies"
    yield _are_named_flags, "$vocabulary"
    yield _are_named_names, "dependentRequired"
    yield _are_names, "required"
    yield _are_patterns, "patternProperties"


_RULES: Final[Mapping[str, Callable[[Any], bool]]] = {
    keyword: rule for rule, keywords in _rules() for keyword in keywords.split()
}
