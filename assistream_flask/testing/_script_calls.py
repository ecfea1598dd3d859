"""What the demo's assistant calls: the functions that the user names, with arguments out of the user's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ._replies import JSON, Request, ToolCall

_LINE = re.compile(r"^\s*call\s+([\w-]+)[ \t]*(\{.*\})?\s*$", re.IGNORECASE | re.MULTILINE)


def outputs(request: Request) -> list[str]:
    """Give the outputs that the model got since the user's last message."""
    last = max((n for n, (role, _) in enumerate(request.messages) if role == "user"), default=-1)
    return [text for role, text in request.messages[last + 1 :] if role == "tool"]


def calls_of(request: Request, text: str) -> Sequence[ToolCall]:
    """Give the calls that are still to be made for a user's message, in its order; none where it asks for none."""
    tools = {str(tool["name"]): tool.get("parameters") or {} for tool in request.tools}
    lines = [(name, given) for name, given in _LINE.findall(text) if name in tools]
    calls = [ToolCall(name, given or Filler(tools[name], "").whole()) for name, given in lines] or _named(tools, text)
    left = calls[len(outputs(request)) :]
    if left or not request.must_call or not tools:
        return left
    name = next(iter(tools))
    return [ToolCall(name, Filler(tools[name], text).whole())]


def _named(tools: dict[str, JSON], text: str) -> list[ToolCall]:
    """Give a call for each time that the text names a tool, with the words behind the name."""
    found = sorted((one.start(), one.end(), name) for name in tools for one in _in_words(name).finditer(text))
    ends = [*(start for start, _, _ in found[1:]), len(text)]
    said = [
        re.sub(r"[\s,;.]+(and|then|and then)\s*$", "", text[behind:end])
        for (_, behind, _), end in zip(found, ends, strict=False)
    ]
    return [ToolCall(name, Filler(tools[name], words).whole()) for (_, _, name), words in zip(found, said, strict=True)]


def _in_words(name: str) -> re.Pattern[str]:
    # People write "look up" for lookup, and "pick a date" for pick_date.
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name) or [re.escape(name)]
    inside = [r"[ -]?".join(word) if word.isalnum() else word for word in words]
    return re.compile(r"\b" + r"(?:[\W_]+(?:an?|the|my)\b)?[\W_]*".join(inside) + r"\b", re.IGNORECASE)


class Filler:
    """Makes arguments for a schema out of a text: quoted words, numbers and days in their order, else the whole."""

    def __init__(self, schema: JSON, text: str) -> None:
        self.schema, self.text = schema, text.strip(" \t\r\n.,:;!?")
        self.quoted = re.findall(r"[\"“]([^\"”]*)[\"”]", text)
        self.days = re.findall(r"\b\d{4}-\d\d-\d\d\b", text)
        bare = re.sub(r"[\"“][^\"”]*[\"”]", "", text)
        self.numbers = re.findall(r"(?<![\w.-])-?\d+(?:\.\d+)?(?![\w-])", bare)

    def whole(self) -> JSON:
        """Give the arguments."""
        return self.object(self.schema)

    def made(self, schema: JSON) -> Any:
        if "$ref" in schema:
            schema = self.schema.get("$defs", {}).get(str(schema["$ref"]).rpartition("/")[2], {})
        options = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
        if options:
            return self.made(options[0])
        if "const" in schema or schema.get("enum"):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return next((value for value in values if str(value).lower() in self.text.lower()), values[0])
        kind = schema.get("type")
        make = {"object": self.object, "array": self.array, "integer": self.number, "number": self.number}
        if kind in make:
            return make[kind](schema)
        return True if kind == "boolean" else None if kind == "null" else self.string(schema)

    def object(self, schema: JSON) -> JSON:
        properties = schema.get("properties") or {}
        names = schema.get("required") or list(properties)
        return {name: self.made(properties.get(name, {})) for name in names}

    def array(self, schema: JSON) -> list[Any]:
        return [self.made(schema.get("items") or {})]

    def number(self, schema: JSON) -> float:
        value = float(self.numbers.pop(0)) if self.numbers else 1.0
        return int(value) if schema["type"] == "integer" else value

    def string(self, schema: JSON) -> str:
        if schema.get("format") == "date":
            return self.days.pop(0) if self.days else "2026-01-01"
        return self.quoted.pop(0) if self.quoted else self.text
