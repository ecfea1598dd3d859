"""What OpenAI refuses of a history and of tools, in its words."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable, Iterator
from typing import Any

from ._replies import JSON, error_object


class Refused(Exception):
    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.error = status, error_object(message, "invalid_request_error", code, param)


def missing(param: str) -> Refused:
    return Refused(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def check_length(value: Any, param: str, most: int) -> None:
    if not isinstance(value, str):
        raise Refused(400, f"Invalid type for '{param}': expected a string.", param=param, code="invalid_type")
    if not value:
        message = f"Invalid '{param}': empty string. Expected a string with minimum length 1, but got an empty string"
        raise Refused(400, f"{message} instead.", param=param, code="empty_string")
    if len(value) > most:
        message = f"Invalid '{param}': string too long. Expected a string with maximum length {most}, but got a string"
        raise Refused(400, f"{message} with length {len(value)} instead.", param=param, code="string_above_max_length")


def check_arguments(value: Any, param: str) -> None:
    if not isinstance(value, str):
        kind = "an object" if isinstance(value, dict) else "something else"
        message = f"Invalid type for '{param}': expected a string, but got {kind} instead."
        raise Refused(400, message, param=param, code="invalid_type")
    try:
        is_object = isinstance(json.loads(value), dict)
    except ValueError:
        is_object = False
    if not is_object:
        raise Refused(400, f"Invalid '{param}': arguments must be a valid JSON object string.", param=param)


# Encrypted content


def sealed(id: str, model: str, key: str) -> str:
    """Give the encrypted content of the reasoning `id`, which only the same model takes back under the same key."""
    named = id.encode("utf-8", "replace")
    return "gAAAAA" + base64.urlsafe_b64encode(named + b"." + _mac(named, model, key)).decode()


def unsealed(content: str, model: str, key: str) -> str | None:
    """Give the id of the reasoning item that the content is of; None where it was not made for this model and key."""
    try:
        named, _, mac = base64.b64decode(content.removeprefix("gAAAAA"), b"-_", validate=True).partition(b".")
    except ValueError:
        return None
    return named.decode("utf-8", "replace") if hmac.compare_digest(mac, _mac(named, model, key)) else None


def _mac(named: bytes, model: str, key: str) -> bytes:
    return hmac.digest(
        b"offline", b"\n".join([named, *(part.encode("utf-8", "replace") for part in (model, key))]), "md5"
    )


# The input of a response

_CALLS = {
    "function_call": "fc", "web_search_call": "ws", "file_search_call": "fs", "code_interpreter_call": "ci",
    "image_generation_call": "ig", "mcp_call": "mcp",
}  # fmt: skip
_PREFIXES = {**_CALLS, "message": "msg", "reasoning": "rs", "function_call_output": "fc"}
_FIELDS = {
    "message": {"type", "id", "status", "role", "content", "phase"},
    "reasoning": {"type", "id", "summary", "content", "encrypted_content"},
    "function_call": {"type", "id", "status", "call_id", "name", "arguments", "namespace", "async", "caller"},
    "function_call_output": {"type", "id", "status", "call_id", "output"},
}
_NEEDS = {"reasoning": ("summary",), "function_call": ("call_id", "name", "arguments"),
          "function_call_output": ("call_id", "output")}  # fmt: skip


def kind_of(item: JSON) -> str:
    # An item without type is a message, or, with nothing but its id, a reference.
    return str(item.get("type") or ("message" if "role" in item or "id" not in item else "item_reference"))


class Input:
    """The items of a request for a response: each is what it may be, and together they are closed.

    `known` gives the item that a stored response has under an id, `required` the id of the reasoning before which an
    item was made; `opened` reads encrypted content.
    """

    def __init__(
        self,
        items: list[JSON],
        *,
        known: Callable[[str], JSON | None],
        required: Callable[[str], str | None],
        opened: Callable[[str], str | None],
        strict: bool,
    ) -> None:
        self.items, self.known, self.required, self.opened, self.strict = items, known, required, opened, strict
        self.ids: set[str] = set()
        self.open_calls: list[str] = []
        self.thought: str | None = None

    def check(self) -> None:
        """Raise Refused for the first thing that OpenAI would not take."""
        for n, item in enumerate(self.items):
            self.check_shape(f"input[{n}]", kind_of(item), item)
        for item in self.items:
            self.read(item if kind_of(item) != "item_reference" else self.stored(str(item.get("id"))))
        if self.thought is not None:
            raise self.lonely(self.thought)
        if self.open_calls:
            raise Refused(400, f"No tool output found for function call {self.open_calls[0]}.", param="input")

    def check_shape(self, where: str, kind: str, item: JSON) -> None:
        for name in item:
            is_extra = self.strict and kind != "message" and name in ("id", "status")
            if is_extra or name not in _FIELDS.get(kind, item):
                param = f"{where}.{name}"
                raise Refused(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
        for name in _NEEDS.get(kind, ()):
            if item.get(name) is None:
                raise missing(f"{where}.{name}")
        if item.get("id") is not None:
            self.check_id(f"{where}.id", kind, item["id"])
        if "call_id" in item:
            check_length(item["call_id"], f"{where}.call_id", 64)
        if kind == "function_call":
            check_arguments(item["arguments"], f"{where}.arguments")

    def check_id(self, param: str, kind: str, id: Any) -> None:
        check_length(id, param, 64)
        prefix = _PREFIXES.get(kind, "")
        if not id.startswith(prefix):
            message = f"Invalid '{param}': '{id}'. Expected an ID that begins with '{prefix}'."
            raise Refused(400, message, param=param, code="invalid_value")
        if id in self.ids:
            message = f"Duplicate item found with id {id}. Remove duplicate items from your input and try again."
            raise Refused(400, message, param="input")
        self.ids.add(id)

    def stored(self, id: str) -> JSON:
        item = self.known(id)
        if item is None:
            message = f"Item with id '{id}' not found. Items are not persisted when `store` is set to false. "
            hint = "Try again with `store` set to true, or remove this item from your input."
            raise Refused(404, message + hint, param="input")
        return item

    def read(self, item: JSON) -> None:
        kind = kind_of(item)
        if kind == "reasoning":
            self.thought = self.reasoning(item)
            return
        is_follower = kind in _CALLS or (kind == "message" and item.get("role") == "assistant")
        if self.thought is not None and not is_follower:
            raise self.lonely(self.thought)
        self.thought = None
        needs = self.required(str(item.get("id")))
        if needs is not None and needs not in self.ids:
            told = (
                f"Item '{item['id']}' of type '{kind}' was provided without its required 'reasoning' item: '{needs}'."
            )
            raise Refused(400, told, param="input")
        if kind in _CALLS and kind != "function_call":
            self.stored(item.get("id", ""))
        elif kind == "function_call":
            self.open_calls.append(item["call_id"])
        elif kind == "function_call_output":
            self.close(item["call_id"])

    def reasoning(self, item: JSON) -> str:
        """Give the id of a reasoning item that is known: stored, or by what it has encrypted."""
        content = item.get("encrypted_content")
        if content is None:
            if item.get("id") is None:
                raise missing(f"input[{self.items.index(item)}].encrypted_content")
            return str(self.stored(item["id"])["id"])
        id = self.opened(str(content))
        if id is None:
            message = f"The encrypted content {str(content)[:4]}...{str(content)[-4:]} could not be verified. "
            hint = "Reason: Encrypted content could not be decrypted or parsed."
            raise Refused(400, message + hint, code="invalid_encrypted_content")
        self.ids.add(id)
        return id

    def close(self, call_id: str) -> None:
        if call_id not in self.open_calls:
            raise Refused(400, f"No tool call found for function call output with call_id {call_id}.", param="input")
        self.open_calls.remove(call_id)

    def lonely(self, id: str) -> Refused:
        message = f"Item '{id}' of type 'reasoning' was provided without its required following item."
        return Refused(400, message, param="input")


# The messages of a chat


def check_chat(messages: list[JSON]) -> None:
    """Raise Refused where a message with tool calls is not followed by an answer to each, and by nothing else."""
    waiting: list[str] = []
    for n, message in enumerate(messages):
        if message.get("role") == "tool":
            _check_answer(message, n, waiting, after=messages[n - 1] if n else {})
            continue
        _check_answered(waiting, f"messages.[{n}].role")
        waiting = [_check_call(call, f"messages[{n}].tool_calls[{m}]")
                   for m, call in enumerate(message.get("tool_calls") or [])]  # fmt: skip
    _check_answered(waiting, "messages")


def _check_answer(message: JSON, n: int, waiting: list[str], after: JSON) -> None:
    if not waiting and after.get("role") != "tool":
        told = (
            "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
        )
        raise Refused(400, told, param=f"messages.[{n}].role")
    id = message.get("tool_call_id")
    if id is None:
        raise missing(f"messages[{n}].tool_call_id")
    if id not in waiting:
        told = f"Invalid parameter: 'tool_call_id' of '{id}' not found in 'tool_calls' of previous message."
        raise Refused(400, told, param=f"messages.[{n}].tool_call_id")
    waiting.remove(id)


def _check_answered(waiting: list[str], param: str) -> None:
    if waiting:
        rule = "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
        told = (
            f"{rule} 'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(waiting)}"
        )
        raise Refused(400, told, param=param)


def _check_call(call: Any, where: str) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    for found, name in ((call, "id"), (call, "type"), (call, "function"), (function, "name"), (function, "arguments")):
        if not isinstance(found, dict) or found.get(name) is None:
            raise missing(f"{where}.{'function.' if found is function else ''}{name}")
    check_length(call["id"], f"{where}.id", 40)
    check_arguments(call["function"]["arguments"], f"{where}.function.arguments")
    return str(call["id"])


# Tools

_NOT_STRICT = ("default", "allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas",
               "patternProperties", "propertyNames", "uniqueItems", "prefixItems")  # fmt: skip


def check_tools(body: JSON, dialect: str) -> None:
    """Raise Refused for a function that OpenAI would not take."""
    tools = body.get("tools") or []
    if dialect == "chat" and not tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if body.get(name) is not None:
                message = f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified."
                raise Refused(400, message, param=name)
    for n, tool in enumerate(tools):
        if not isinstance(tool, dict) or not tool.get("type"):
            raise missing(f"tools[{n}].type")
        if tool["type"] == "function":
            where = f"tools[{n}]" if dialect == "responses" else f"tools[{n}].function"
            _check_function(tool if dialect == "responses" else tool.get("function") or {}, where)


def _check_function(function: JSON, where: str) -> None:
    name, schema = function.get("name"), function.get("parameters") or {}
    if name is None:
        raise missing(f"{where}.name")
    check_length(name, f"{where}.name", 64)
    if not all(letter.isascii() and (letter.isalnum() or letter in "_-") for letter in name):
        message = f"Invalid '{where}.name': string does not match pattern. Expected a string that matches the pattern"
        raise Refused(400, f"{message} '^[a-zA-Z0-9_-]+$'.", param=f"{where}.name", code="invalid_value")
    is_strict = bool(function.get("strict"))
    told = next(_not_strict(schema, ()), "") if is_strict else ""
    if (schema or is_strict) and schema.get("type") != "object":
        told = f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{schema.get('type')}\"'."
    if told:
        message, code = f"Invalid schema for function '{name}': {told}", "invalid_function_parameters"
        raise Refused(400, message, param=f"{where}.parameters", code=code)


def _not_strict(schema: Any, at: tuple[str, ...]) -> Iterator[str]:
    """Tell what strict mode does not allow of a schema."""
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        if beside := set(schema) - {"$ref", "$defs"}:
            yield f"context={at}, $ref cannot have keywords {beside}."
        return
    yield from (f"In context={at}, '{name}' is not permitted." for name in _NOT_STRICT if name in schema)
    if "type" not in schema and "anyOf" not in schema:
        yield f"In context={at}, schema must have a 'type' key."
    if schema.get("type") == "object":
        yield from _not_strict_object(schema, at)
    for name in ("properties", "$defs"):
        for key, inner in (schema.get(name) or {}).items():
            yield from _not_strict(inner, (*at, name, key))
    for n, inner in enumerate(schema.get("anyOf") or ()):
        yield from _not_strict(inner, (*at, "anyOf", str(n)))
    if "items" in schema:
        yield from _not_strict(schema["items"], (*at, "items"))


def _not_strict_object(schema: JSON, at: tuple[str, ...]) -> Iterator[str]:
    if schema.get("additionalProperties") is not False:
        yield f"In context={at}, 'additionalProperties' is required to be supplied and to be false."
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    every = (
        f"In context={at}, 'required' is required to be supplied and to be an array including every key in properties."
    )
    yield from (f"{every} Missing '{name}'." for name in properties if name not in required)
    yield from (f"{every} Extra required key '{name}' supplied." for name in required if name not in properties)
