"""The event vocabulary: one constructor an event, in the words of the Assistants v2 API.

Every constructor gives an :class:`Event`; its ``data`` is the JSON object that pages receive.
``key`` is the run an event belongs to (``None`` for a user's message), so that one POST can
follow its own runs.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

from pydantic_core import to_json

from .types import (
    Annotation,
    ContentPart,
    Deleted,
    Entry,
    EventData,
    Message,
    MessageDelta,
    PartDelta,
    ReasoningDetails,
    RefusalPart,
    Run,
    Snapshot,
    Step,
    StepDelta,
    StepDetails,
    TextPart,
    ToolCall,
    ToolCallDelta,
    ToolCallsDelta,
)

Json: TypeAlias = dict[str, Any]
"""A JSON object as it comes in, from a model server, a request or a database; what we give has a type of its own, see
:mod:`.types`."""
TERMINAL: Final = frozenset({"completed", "incomplete", "failed", "cancelled", "expired"})
RUN_ENDS: Final = frozenset(f"thread.run.{status}" for status in TERMINAL)
"""The names of the events that end a run."""


class Event(NamedTuple):
    """A name, its data, and the id of the run that it tells of."""

    name: str
    data: EventData
    key: str | None = None


class Said(NamedTuple):
    """What a model is to know of a message: who spoke (``None``: a user), what, and whether that is whole.

    ``items`` are what an assistant's run said and did, where there is more than the text, in the words of the Responses
    API: see :class:`.items.Turn`. Each call among them has its output.
    """

    speaker: str | None
    text: str
    is_whole: bool = True
    items: Sequence[Json] = ()


def text_of(content: Sequence[ContentPart]) -> str:
    """Give what a message says: its parts are paragraphs."""
    said = (part["refusal"] if part["type"] == "refusal" else part["text"]["value"] for part in content)
    return "\n\n".join(text for text in said if text)


def dumps(value: object) -> str:
    """Give compact JSON on one line. A lone surrogate, which UTF-8 cannot carry, becomes U+FFFD."""
    try:
        text = to_json(value).decode()
        if "NaN" not in text and "Infinity" not in text:
            return text
    except ValueError:
        pass
    # Much slower, and it takes lone surrogates and refuses what is no JSON.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text if text.isascii() else clean(text)


def clean(text: str) -> str:
    """Give ``text`` as UTF-8 can carry it: surrogate pairs joined, lone surrogates U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def new_id(kind: str) -> str:
    """Give ``<kind>_`` and 32 random hex digits: 128 bits, not to be guessed."""
    return f"{kind}_{secrets.token_hex(16)}"


def now() -> int:
    """Give Unix time in seconds, as in OpenAI's objects."""
    return int(time.time())


# Objects


def message(
    thread_id: str,
    role: Literal["user", "assistant"],
    content: list[ContentPart],
    *,
    assistant_id: str | None = None,
    run_id: str | None = None,
) -> Message:
    """Give a new message object (Assistants v2). A user's is completed, an assistant's in progress."""
    at = now()
    mine = role == "user"
    return {
        "id": new_id("msg"),
        "object": "thread.message",
        "created_at": at,
        "thread_id": thread_id,
        "role": role,
        "status": "completed" if mine else "in_progress",
        "content": content,
        "assistant_id": assistant_id,
        "run_id": run_id,
        "completed_at": at if mine else None,
        "incomplete_at": None,
        "incomplete_details": None,
        "metadata": {},
    }


def text_part(value: str) -> TextPart:
    """Give a text content part."""
    return {"type": "text", "text": {"value": value, "annotations": []}}


def refusal_part(value: str) -> RefusalPart:
    """Give a refusal content part."""
    return {"type": "refusal", "refusal": value}


def run(thread_id: str, assistant_id: str, model: str | None) -> Run:
    """Give a new run object (Assistants v2), queued; ``message_id`` is for the caller to fill."""
    return {
        "id": new_id("run"),
        "object": "thread.run",
        "thread_id": thread_id,
        "assistant_id": assistant_id,
        # Nobody else sees the run before it is filled.
        "message_id": cast(str, None),
        "status": "queued",
        "required_action": None,
        "expires_at": None,
        "last_error": None,
        "incomplete_details": None,
        "usage": None,
        "model": model,
        "created_at": now(),
        "started_at": None,
        "completed_at": None,
        "failed_at": None,
        "cancelled_at": None,
        "metadata": {},
    }


def reasoning_step(run: Run, content_index: int) -> Step:
    """Give a new run step that holds the model's summary of its reasoning, behind so many parts of the message."""
    return _step(run, {"type": "reasoning", "reasoning": {"text": ""}}, content_index)


def tool_calls_step(run: Run, content_index: int) -> Step:
    """Give a new run step that holds tool calls, behind so many parts of the message."""
    return _step(run, {"type": "tool_calls", "tool_calls": []}, content_index)


def _step(run: Run, details: StepDetails, content_index: int) -> Step:
    return {
        "id": new_id("step"),
        "object": "thread.run.step",
        "run_id": run["id"],
        "thread_id": run["thread_id"],
        "assistant_id": run["assistant_id"],
        "type": details["type"],
        "status": "in_progress",
        "created_at": now(),
        "completed_at": None,
        "content_index": content_index,
        "step_details": details,
    }


def tool_call(call_id: str, name: str, kind: Literal["server", "page", "hosted"], type: str = "function") -> ToolCall:
    """Give a new tool call, whose arguments come in."""
    return {
        "id": call_id,
        "type": type,
        "function": {"name": name, "arguments": "", "output": None},
        "status": "in_progress",
        "kind": kind,
        "error": None,
        "started_at": None,
        "completed_at": None,
    }


def entry(message: Message, run: Run | None = None, steps: list[Step] | None = None) -> Entry:
    """Give what pages render: a message, who speaks, and for an assistant its run and steps."""
    return {"assistant_id": message["assistant_id"], "message": message, "run": run, "steps": steps or []}


# Events


def snapshot(thread_id: str, data: list[Entry], has_more: bool) -> Event:
    """Give the newest page of the thread: first on a fresh connection, and where a place can't be proven."""
    page: Snapshot = {"thread_id": thread_id, "data": data, "has_more": has_more}
    return Event("thread.snapshot", page)


def message_created(message: Message) -> Event:
    """Tell that a message has its place in the thread."""
    return Event("thread.message.created", message, message["run_id"])


def text_delta(message: Message, index: int, value: str) -> Event:
    """Append ``value`` to text part ``index``."""
    return _delta(message, {"index": index, "type": "text", "text": {"value": value}})


def annotation_delta(message: Message, index: int, annotation: Annotation) -> Event:
    """Append ``annotation`` to those of text part ``index``."""
    return _delta(message, {"index": index, "type": "text", "text": {"annotations": [annotation]}})


def refusal_delta(message: Message, index: int, value: str) -> Event:
    """Append ``value`` to refusal part ``index``."""
    return _delta(message, {"index": index, "type": "refusal", "refusal": value})


def _delta(message: Message, part: PartDelta) -> Event:
    data: MessageDelta = {"id": message["id"], "object": "thread.message.delta", "delta": {"content": [part]}}
    return Event("thread.message.delta", data, message["run_id"])


def message_ended(message: Message) -> Event:
    """Tell the whole message in its final state: ``thread.message.completed`` or ``.incomplete``."""
    return Event(f"thread.message.{message['status']}", message, message["run_id"])


def run_created(run: Run) -> Event:
    """Tell that a run was stored."""
    return Event("thread.run.created", run, run["id"])


def run_status(run: Run) -> Event:
    """Tell the whole run, named by its status: ``thread.run.queued``, ``.in_progress``, ``.failed`` ..."""
    return Event(f"thread.run.{run['status']}", run, run["id"])


def step_created(step: Step) -> Event:
    """Tell that a run step began."""
    return Event("thread.run.step.created", step, step["run_id"])


def reasoning_delta(step: Step, value: str) -> Event:
    """Append ``value`` to the step's reasoning text."""
    return _step_delta(step, {"type": "reasoning", "reasoning": {"text": value}})


def tool_call_delta(step: Step, call: ToolCallDelta) -> Event:
    """Tell what is new of one of the step's tool calls."""
    return _step_delta(step, {"type": "tool_calls", "tool_calls": [call]})


def _step_delta(step: Step, details: ReasoningDetails | ToolCallsDelta) -> Event:
    data: StepDelta = {
        "id": step["id"],
        "object": "thread.run.step.delta",
        "run_id": step["run_id"],
        "delta": {"step_details": details},
    }
    return Event("thread.run.step.delta", data, step["run_id"])


def step_ended(step: Step) -> Event:
    """Tell the whole step in its final state: ``thread.run.step.completed``, ``.failed`` or ``.cancelled``."""
    return Event(f"thread.run.step.{step['status']}", step, step["run_id"])


def thread_deleted(thread_id: str) -> Event:
    """Tell that the thread is gone; its streams end after this."""
    gone: Deleted = {"id": thread_id, "object": "thread.deleted", "deleted": True}
    return Event("thread.deleted", gone)


# State: what the events add up to


def apply(entry: Entry, event: str, data: EventData | Json) -> None:
    """Add an event of growing text, a delta or one of a step, to ``entry``, in place."""
    if event == "thread.message.delta":
        _extend(entry["message"]["content"], cast(MessageDelta, data))
    elif event == "thread.run.step.delta":
        grown = cast(StepDelta, data)
        for step in entry["steps"]:
            if step["id"] == grown["id"]:
                _grow(step["step_details"], grown["delta"]["step_details"])
    elif event.startswith("thread.run.step."):
        new = cast(Step, data)
        is_known = any(step["id"] == new["id"] for step in entry["steps"])
        # Where it stands: a step may end behind one that began later.
        entry["steps"] = [new if step["id"] == new["id"] else step for step in entry["steps"]] + [new] * (not is_known)


def _grow(details: StepDetails, grown: ReasoningDetails | ToolCallsDelta) -> None:
    if details["type"] == "reasoning":
        details["reasoning"]["text"] += cast(ReasoningDetails, grown)["reasoning"]["text"]
        return
    for delta in cast(ToolCallsDelta, grown)["tool_calls"]:
        grow_call(details["tool_calls"], delta)


def grow_call(calls: list[ToolCall], delta: ToolCallDelta) -> None:
    """Add what is new of a tool call to ``calls``, in place."""
    if delta["index"] == len(calls):
        calls.append(tool_call("", "", "server"))
    target: Any = calls[delta["index"]]
    function = delta.get("function", {})
    target["function"]["arguments"] += function.get("arguments", "")
    target["function"].update({name: function[name] for name in ("name", "output") if name in function})
    target.update({name: value for name, value in delta.items() if name not in ("index", "function")})


def _extend(content: list[ContentPart], grown: MessageDelta) -> None:
    for part in grown["delta"]["content"]:
        if part["index"] == len(content):
            content.append(text_part("") if part["type"] == "text" else refusal_part(""))
        # What grows is of one type from its first delta on.
        target: Any = content[part["index"]]
        if part["type"] == "refusal":
            target["refusal"] += part["refusal"]
        else:
            target["text"]["value"] += part["text"].get("value", "")
            target["text"]["annotations"].extend(part["text"].get("annotations", ()))
