"""Makes the page of the routes, docs/reference/http.md, of docs/reference/openapi.yaml: `python docs/http_page.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

REFERENCE: Final = Path(__file__).resolve().parent / "reference"
PAGE: Final = REFERENCE / "http.md"
METHODS: Final = ("get", "post", "put", "patch", "delete")
# Objects that have a heading of their own, in this order; what stands inside another without a name is told there.
OBJECTS: Final = (
    *("Thread", "Entry", "Message", "ContentPart", "Run", "RequiredAction", "RunError", "Step", "ReasoningDetails"),
    *("ToolCallsDetails", "ToolCall", "Assistant", "Started", "ToolOutput", "Approval", "Snapshot", "MessageDelta"),
    *("StepDelta", "ToolCallsDelta", "Deleted", "Event", "Error", "Metadata"),
)

Json = dict[str, Any]


def load() -> Json:
    """Read the OpenAPI file."""
    found: Json = yaml.safe_load((REFERENCE / "openapi.yaml").read_text())
    return found


def page(api: Json) -> str:
    """Give the page, in Markdown."""
    return "\n".join(_lines(api)).rstrip() + "\n"


def _lines(api: Json) -> Iterator[str]:
    yield "# HTTP"
    yield ""
    yield "<!-- Made of openapi.yaml by `python docs/http_page.py`: change that file, not this one. -->"
    yield ""
    yield "For programs the same is in [openapi.yaml](openapi.yaml) (OpenAPI 3.1)."
    yield ""
    yield api["info"]["description"].rstrip()
    yield ""
    yield "| route | what it does |"
    yield "|---|---|"
    for path, method, operation in _operations(api):
        yield f"| `{method.upper()} {path}` | {operation['summary']} |"
    for tag in api["tags"]:
        yield from ("", f"## {tag['name']}", "", tag["description"])
        for path, method, operation in _operations(api):
            if tag["name"] in operation["tags"]:
                yield from _operation(api, path, method, operation)
    yield from ("", "## Errors", "", "All of them with an [Error](#error), whose `code` is one of these.")
    yield from ("", "| status | code |", "|---|---|")
    for status, response in _refusals(api).items():
        yield f"| {status} | {_cell(response['description'])} |"
    yield from ("", "## Objects", "", "Each key is always there, but those marked with a `?`.")
    for name in OBJECTS:
        yield from _object(api, name)


def _operations(api: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in api["paths"].items():
        for method in METHODS:
            if method in item:
                shared = item.get("parameters", [])
                yield path, method, {**item[method], "parameters": [*shared, *item[method].get("parameters", [])]}


def _refusals(api: Json) -> Json:
    """Give what all routes together may be refused with, by status."""
    found: Json = {}
    for _, _, operation in _operations(api):
        found |= {status: _resolved(api, one) for status, one in operation["responses"].items() if "$ref" in one}
    return dict(sorted(found.items()))


def _operation(api: Json, path: str, method: str, operation: Json) -> Iterator[str]:
    yield from ("", f"### {method.upper()} {path}", "", f"{operation['summary']}.")
    if text := operation.get("description", "").rstrip():
        yield from ("", text)
    given = [_resolved(api, one) for one in operation["parameters"]]
    if told := [one for one in given if one["in"] != "path"]:
        yield from ("", "| it takes | in | |", "|---|---|---|")
        for one in told:
            kind = {"query": "the query", "header": "a header"}[one["in"]]
            yield f"| `{one['name']}` | {kind} | {_cell(_words(api, one))} |"
    if body := operation.get("requestBody"):
        schema = _resolved(api, body["content"]["application/json"]["schema"])
        yield from ("", "| field of the body | | |", "|---|---|---|")
        required = schema.get("required", [])
        fields = schema.get("properties", {})
        for name, field in fields.items():
            mark = "required" if name in required else "optional"
            yield f"| `{name}` | {mark} | {_cell(_words(api, field))} |"
        if not fields:
            yield "| none | | The body is `{}`, or empty. |"
    yield from ("", "| answer | with | |", "|---|---|---|")
    refused = []
    for status, response in operation["responses"].items():
        if "$ref" in response:
            refused.append(status)
        else:
            yield f"| {status} | {_content(response)} | {_cell(response['description'])} |"
    if refused:
        yield from ("", f"It may be refused with {', '.join(refused)}: see [Errors](#errors).")


def _content(response: Json) -> str:
    for kind, content in response.get("content", {}).items():
        name = content["schema"].get("$ref", "").rpartition("/")[2]
        told = f"[{name}](#{name.lower()})" if name in OBJECTS else f"`{kind}`"
        return f"a stream of [{name}](#{name.lower()})" if kind == "text/event-stream" and name else told
    return ""


def _object(api: Json, name: str) -> Iterator[str]:
    schema = api["components"]["schemas"][name]
    yield from ("", f"### {name}", "", _sentence(schema["description"]))
    if fields := list(_fields(api, schema)):
        yield from ("", "| key | type | |", "|---|---|---|")
        yield from fields
    if name == "Event":
        yield from ("", "| event | data |", "|---|---|")
        for kind in schema["oneOf"]:
            event, data = kind["properties"]["event"], kind["properties"]["data"]
            data = data.get("contentSchema", data)
            for one in event.get("enum", [event.get("const")]):
                yield f"| `{one}` | {_type(api, data)} |"


def _fields(api: Json, schema: Json, before: str = "") -> Iterator[str]:
    """Give a row for each key of an object, and for those of the objects that stand in it."""
    for name, field in schema.get("properties", {}).items():
        mark = "" if name in schema.get("required", []) else "?"
        yield f"| `{before}{name}{mark}` | {_type(api, field)} | {_cell(field.get('description', ''))} |"
        inner, more = (field["items"], "[]") if "items" in field else (field, "")
        yield from _fields(api, inner, f"{before}{name}{more}.")
    if "properties" not in schema:
        kinds = [rows for kind in schema.get("oneOf", []) if (rows := list(_fields(api, kind, before)))]
        for at, rows in enumerate(kinds):
            if at:
                yield "| *or* | | |"
            yield from rows


def _type(api: Json, schema: Json) -> str:
    """Give in a few words what a value is."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name in OBJECTS else _type(api, _resolved(api, schema))
    if "const" in schema:
        return f"`{str(schema['const']).lower() if isinstance(schema['const'], bool) else schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "oneOf" in schema and "properties" not in schema:
        return " or ".join(dict.fromkeys(_type(api, one) for one in schema["oneOf"]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(api, schema['items'])}"
    if isinstance(kind, list):
        return " or ".join(kind)
    return str(kind)


def _words(api: Json, value: Json) -> str:
    """Give what there is to say of a parameter or a field: its description, type, limits and default."""
    found = _resolved(api, value)
    schema = _resolved(api, found.get("schema", found))
    said = [_sentence(found.get("description") or schema.get("description", ""))]
    kind = _type(api, schema)
    if kind != "string":
        said.append(f"{kind[0].upper()}{kind[1:]}." if kind[0].isalpha() else f"{kind}.")
    if "minimum" in schema:
        said.append(f"From {schema['minimum']} to {schema['maximum']}.")
    if "default" in schema:
        said.append(f"Default: `{schema['default']}`.")
    return " ".join(part for part in said if part)


def _resolved(api: Json, value: Json) -> Json:
    while "$ref" in value:
        found: Any = api
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if not text or text.endswith(".") else f"{text}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(load()))
