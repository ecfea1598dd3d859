"""The public objects' types: they need nothing, are the OpenAPI file's schemas, what is made has their keys, and a type
checker tells of a key that is not there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types as kinds
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
import yaml

from assistream_flask import Commands, RunList, errors, events, sse, types
from assistream_flask.events import Event
from assistream_flask.runs.message_accumulator import MessageAccumulator, Stop
from assistream_flask.runs.tool_loop import required
from assistream_flask.store.sql import thread_object
from assistream_flask.store.thread_change import StoredCall
from assistream_flask.upstream.deltas import Annotation, Call, End, Reasoning, Refusal, Text, WholeCall

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS: dict[str, Any] = yaml.safe_load((ROOT / "docs/reference/openapi.yaml").read_text())["components"]["schemas"]

TYPED = {name: value for name, value in vars(types).items() if is_typeddict(value)}
"""All TypedDicts of the module."""


# What it needs


def test_the_module_needs_nothing_but_typing() -> None:
    nodes = list(ast.walk(ast.parse((ROOT / "assistream_flask/types.py").read_text())))
    assert [node.module for node in nodes if isinstance(node, ast.ImportFrom)] == ["typing"]
    assert [node for node in nodes if isinstance(node, ast.Import)] == []


def test_it_is_imported_where_nothing_is_installed() -> None:
    # -S leaves out what is installed.
    asked = "import sys; from assistream_flask.types import Run; assert {'flask', 'openai'}.isdisjoint(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", asked], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_type_is_public_and_says_what_it_is() -> None:
    aliases = {"ContentPart", "PartDelta", "EventData", "StepDetails", "ToolCallStatus"}
    assert set(types.__all__) == TYPED.keys() | aliases
    # A TypedDict without a docstring has none, not dict's.
    assert [name for name, typed in TYPED.items() if not typed.__doc__] == []


# The OpenAPI file


def resolved(schema: Any) -> Any:
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def without_null(schema: Any) -> tuple[Any, bool]:
    """Give what a value is where it is not ``null``, and whether it may be that."""
    kind = schema.get("type")
    if isinstance(kind, list):
        (other,) = (one for one in kind if one != "null")
        return {**schema, "type": other}, "null" in kind
    several = schema.get("oneOf")
    if several and {"type": "null"} in several:
        (other,) = (one for one in several if one != {"type": "null"})
        return resolved(other), True
    return schema, False


def without_none(hint: Any) -> tuple[Any, bool]:
    """Do the same with a type."""
    if get_origin(hint) not in (Union, kinds.UnionType):
        return hint, False
    left = [one for one in get_args(hint) if one is not type(None)]
    return Union[tuple(left)], len(left) < len(get_args(hint))  # noqa: UP007


def differences(hint: Any, schema: Any, at: str) -> Iterator[str]:
    """Tell where a type and a schema are not the same."""
    schema = resolved(schema)
    (schema, may_be_null), (hint, may_be_none) = without_null(schema), without_none(hint)
    if may_be_null != may_be_none:
        yield f"{at}: null"
    if is_typeddict(hint):
        yield from of_object(hint, schema, at)
    elif "oneOf" in schema:
        for one, other in zip(get_args(hint), schema["oneOf"], strict=True):
            yield from differences(one, other, f"{at}|{one.__name__}")
    elif get_origin(hint) is Literal:
        allowed = schema.get("enum", [schema.get("const")])
        if set(get_args(hint)) != set(allowed):
            yield f"{at}: {get_args(hint)} and {allowed}"
    elif get_origin(hint) is list:
        yield from differences(get_args(hint)[0], schema["items"], f"{at}[]")
    elif schema.get("type") != {str: "string", int: "integer", bool: "boolean"}.get(get_origin(hint) or hint, "object"):
        yield f"{at}: {hint} and {schema}"


def of_object(hint: Any, schema: Any, at: str) -> Iterator[str]:
    known, typed = schema.get("properties", {}), get_type_hints(hint)
    if hint is types.Annotation:
        # It is what a model server says: the file promises no keys.
        known, typed = {}, {} if hint.__required_keys__ == frozenset() else typed
    if known.keys() != typed.keys():
        yield f"{at}: keys {known.keys() ^ typed.keys()}"
    if set(schema.get("required", ())) != hint.__required_keys__:
        yield f"{at}: required {set(schema.get('required', ())) ^ hint.__required_keys__}"
    for name in known.keys() & typed.keys():
        yield from differences(typed[name], known[name], f"{at}.{name}")


@pytest.mark.parametrize(
    ("typed", "schema"),
    [
        (types.Thread, "Thread"),
        (types.Message, "Message"),
        (types.ContentPart, "ContentPart"),
        (types.Run, "Run"),
        (types.RequiredAction, "RequiredAction"),
        (types.LastError, "RunError"),
        (types.Step, "Step"),
        (types.ReasoningDetails, "ReasoningDetails"),
        (types.ToolCallsDetails, "ToolCallsDetails"),
        (types.ToolCall, "ToolCall"),
        (types.Entry, "Entry"),
        (types.AssistantSummary, "Assistant"),
        (types.StartedRuns, "Started"),
        (types.Snapshot, "Snapshot"),
        (types.MessageDelta, "MessageDelta"),
        (types.StepDelta, "StepDelta"),
        (types.ToolCallsDelta, "ToolCallsDelta"),
        (types.Deleted, "Deleted"),
        (types.ErrorBody, "Error"),
    ],
)
def test_a_type_is_the_openapi_files_schema(typed: Any, schema: str) -> None:
    assert list(differences(typed, SCHEMAS[schema], schema)) == []


def test_the_data_of_events_are_those_that_the_openapi_file_names() -> None:
    named = [one["properties"]["data"].get("contentSchema") for one in SCHEMAS["Event"]["oneOf"]]
    schemas = {one["$ref"].rpartition("/")[2] if "$ref" in one else "Ping" for one in named if one}
    assert {one.__name__ for one in get_args(types.EventData)} == schemas


def test_a_difference_would_be_seen() -> None:
    good = SCHEMAS["StepDelta"]
    worse: list[Mapping[str, Any]] = [
        {**good, "properties": {**good["properties"], "more": {"type": "string"}}},
        {**good, "required": ["id"]},
        {**good, "properties": {**good["properties"], "object": {"const": "thread"}}},
        {**good, "properties": {**good["properties"], "run_id": {"type": ["string", "null"]}}},
        {**good, "properties": {**good["properties"], "run_id": {"type": "integer"}}},
    ]
    assert [len(list(differences(types.StepDelta, one, ""))) for one in worse] == [1, 1, 1, 1, 1]


# What is made


def misfits(value: object, hint: Any, at: str) -> Iterator[str]:
    """Tell where a value is none of its type."""
    origin = get_origin(hint)
    if origin in (Union, kinds.UnionType):
        if all(list(misfits(value, one, at)) for one in get_args(hint)):
            yield f"{at}: {value!r} is no {hint}"
    elif is_typeddict(hint) and isinstance(value, dict):
        yield from misfits_of_object(value, hint, at)
    elif origin is Literal:
        if value not in get_args(hint):
            yield f"{at}: {value!r} is no {hint}"
    elif origin is list and isinstance(value, list):
        for one in value:
            yield from misfits(one, get_args(hint)[0], f"{at}[]")
    elif type(value) is not (origin or hint):
        yield f"{at}: {value!r} is no {hint}"


def misfits_of_object(value: dict[str, object], hint: Any, at: str) -> Iterator[str]:
    typed = get_type_hints(hint)
    if not hint.__required_keys__ <= value.keys() <= typed.keys():
        yield f"{at}: has {sorted(value)}"
    for name in value.keys() & typed.keys():
        yield from misfits(value[name], typed[name], f"{at}.{name}")


def made(end: Callable[[MessageAccumulator], list[Event]]) -> tuple[list[Event], types.Entry]:
    """Give the events of an answer of every kind, and the entry that is left."""
    run = events.run("thread_1", "tutor", None)
    message = events.message("thread_1", "assistant", [], assistant_id="tutor", run_id=run["id"])
    run["message_id"] = message["id"]
    told = [events.run_created(run.copy()), events.run_status(run.copy()), events.message_created(message.copy())]
    reply = MessageAccumulator(run, message, [])
    told += reply.wait() + reply.begin()
    told += reply.add([Reasoning("hm"), Text(0, "a"), Annotation(0, {"type": "url_citation"}), Refusal(1, "no")])
    told += called(reply, "call_1") + reply.calls.change("call_1", "completed", "It is.") + reply.calls.end()
    told += called(reply, "call_2")
    waiting = StoredCall(run["id"], "call_2", 2, 1, "step_1", "ask", "page", "{}", "requires_action", "output")
    told += reply.require(required([waiting]), 1) + reply.requeue() + reply.begin()
    told += end(reply)
    whole, message, steps = reply.snapshot()
    entry = events.entry(message, whole, steps)
    return [*told, events.snapshot("thread_1", [entry], False), events.thread_deleted("thread_1")], entry


def called(reply: MessageAccumulator, call_id: str) -> list[Event]:
    """Have the model call a function and a tool of its server; give the events."""
    told = reply.add([Call(0, call_id, "ask", "function", "{}"), Call(1, "ws_1", "", "web_search", "")])
    told += reply.calls.complete(reply.run, reply.content_count, [WholeCall(call_id, "ask", '{"whom": "you"}')])
    return told + reply.calls.start(call_id)


TOKENS: types.Usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
ENDS: list[Callable[[MessageAccumulator], list[Event]]] = [
    lambda reply: reply.end(End(None, TOKENS)),
    lambda reply: reply.end(End("max_tokens", None)),
    lambda reply: reply.end(End("content_filter", None)),
    lambda reply: reply.end(errors.RunError("upstream_cut")),
    lambda reply: reply.end(Stop.CANCELLED),
    lambda reply: reply.end(Stop.EXPIRED),
    lambda reply: reply.end(Stop.SHUTDOWN),
]


@pytest.mark.parametrize("end", ENDS)
def test_what_events_carry_is_of_its_type(end: Callable[[MessageAccumulator], list[Event]]) -> None:
    told, entry = made(end)
    seen = set()
    for event in told:
        typed = type_of(event.name)
        seen.add(typed.__name__)
        assert list(misfits(event.data, typed, event.name)) == []
    assert seen == {one.__name__ for one in get_args(types.EventData)} - {"Ping"}
    assert list(misfits(entry, types.Entry, "entry")) == []


def type_of(name: str) -> Any:
    """Give the type of an event's data, by the OpenAPI file."""
    for one in SCHEMAS["Event"]["oneOf"]:
        words = one["properties"]["event"]
        if name in words.get("enum", [words.get("const")]):
            return TYPED[one["properties"]["data"]["contentSchema"]["$ref"].rpartition("/")[2]]
    raise AssertionError(name)


def test_what_is_no_event_is_of_its_type_too() -> None:
    thread = thread_object({"id": "thread_1", "created_at": 1, "metadata": {}})
    assert list(misfits(thread, types.Thread, "thread")) == []
    message = events.message("thread_1", "user", [events.text_part("hi")])
    assert list(misfits(events.entry(message), types.Entry, "entry")) == []
    for decision in (None, {"needs": "output", "at": 1}):
        body = errors.RequestError(409, "already_answered", "No.", decision=decision).body()
        assert list(misfits(body, types.ErrorBody, "error")) == []
    assert (sse.PING, get_type_hints(types.Ping)) == (b"event: ping\ndata: {}\n\n", {})


def test_a_misfit_would_be_seen() -> None:
    run: Any = {**events.run("thread_1", "tutor", None), "message_id": "msg_1"}
    assert list(misfits(run, types.Run, "")) == []
    worse = [{**run, "stauts": "queued"}, {**run, "status": "done"}, {**run, "usage": {}}, {**run, "created_at": "1"}]
    assert [len(list(misfits(one, types.Run, ""))) for one in worse] == [1, 1, 1, 1]


# Type checkers

SNIPPET = """\
from assistream_flask.types import ContentPart, Run, Usage

def look(run: Run, part: ContentPart, usage: Usage) -> None:
    run["status"]
    run["stauts"]
    run["status"] = "done"
    run["usage"]["total_tokens"]
    if part["type"] == "text":
        part["text"]["value"]
        part["refusal"]
    wrong: Usage = {"prompt_tokens": 1, "completion_tokens": 1}
"""


@pytest.mark.slow
def test_mypy_tells_of_a_key_or_a_word_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "app.py"
    path.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file="]
    # The same as of mypy's own run before the tests: without, it takes as long again.
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--no-error-summary", "--hide-error-context", "app.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [
        (int(line.split(":")[1]), line.rpartition("[")[2]) for line in done.stdout.splitlines() if ": error: " in line
    ]
    assert found == [
        (5, "typeddict-item]"),
        (6, "typeddict-item]"),
        (7, "index]"),
        (10, "typeddict-item]"),
        (11, "typeddict-item]"),
    ], done.stdout + done.stderr


if typing.TYPE_CHECKING:
    # mypy tells of each of these, or of the comment that expects it: what the package gives is typed.
    def _misspelt(commands: Commands, runs: RunList, reply: MessageAccumulator) -> None:
        commands.thread("thread_1", owner="me")["objcet"]  # type: ignore[typeddict-item]
        commands.threads(owner="me")[0]["objcet"]  # type: ignore[typeddict-item]
        commands.messages("thread_1", owner="me")[0]["mesage"]  # type: ignore[typeddict-item]
        commands.add_message("thread_1", "hi", owner="me")["mesage"]  # type: ignore[typeddict-item]
        commands.run("thread_1", ["tutor"], owner="me")[0]["stauts"]  # type: ignore[typeddict-item]
        commands.cancel("thread_1", "run_1", owner="me")["stauts"]  # type: ignore[typeddict-item]
        runs.wait()[0]["stauts"]  # type: ignore[typeddict-item]
        reply.run["stauts"]  # type: ignore[typeddict-item]
        events.run("thread_1", "tutor", None)["stauts"]  # type: ignore[typeddict-item]
        events.reasoning_step(reply.run, 0)["stauts"]  # type: ignore[typeddict-item]
        events.tool_call("call_1", "ask", "page")["stauts"]  # type: ignore[typeddict-item]
        commands.approve("thread_1", "run_1", "call_1", owner="me")["stauts"]  # type: ignore[typeddict-item]
