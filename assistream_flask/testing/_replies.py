"""What a request was, what it is answered with, and what can go wrong."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FAULTS: Mapping[str, str] = {
    "401": "HTTP 401: the key is refused (the message holds the request's own key, as all messages here do)",
    "429": "HTTP 429 with Retry-After: 1",
    "500": "HTTP 500",
    "400": "HTTP 400: the request is refused",
    "error_nested": 'an error {"error": {"message": ...}} in mid-stream, then a clean end',
    "error_flat": 'an error {"type": "error", "message": ...} in mid-stream, then a clean end',
    "error_first": "HTTP 200, then a (nested) error event at once",
    "response_failed": "in mid-stream response.failed or thread.run.failed; an error chunk in chat",
    "cut": "the connection breaks in mid-stream: no last chunk",
    "ends_early": "the stream ends cleanly in mid-answer: no terminal event, no [DONE]",
    "stall": "silence in mid-stream, until the client leaves or the server closes",
    "stall_headers": "never answers, not even with headers, until the client leaves or the server closes",
    "malformed": "one event in mid-stream is broken JSON; the rest follows",
    "unknown_events": "unknown events, comments, id and retry lines between the real ones; completes",
    "missing_fields": "no optional fields and no *.done events, data-only frames, a [DONE]; completes",
    "function_call": "asks for a tool; answers in words once the tool's output is in the history",
    "call_no_ids": "as function_call; the events of its arguments name no item, and in chat it has no id",
    "call_no_index": "as function_call; in chat it has no index, and its id in each delta",
    "call_late_name": "as function_call; its name, and in chat its id, come with its end",
    "call_empty_final": "as function_call; the final item has no arguments, only their events have",
    "call_first_only": "as function_call, twice; only the first has *.done events and is in the final response",
    "call_objects": "as function_call; in chat its arguments are an object, not a text",
    "call_one_delta": "as function_call, twice; each comes whole, in chat both in one delta",
    "call_no_finish": "as function_call; in chat no finish_reason comes",
    "call_finish_stop": "as function_call; in chat the finish_reason is stop",
    "call_half": "as function_call; its arguments end half-way and are no JSON, and the answer completes",
    "incomplete": "stops half-way, as when the token limit is reached",
    "content_filter": "stops half-way, as when the content filter strikes",
    "crlf": "lines end in CRLF; completes",
    "tiny_chunks": "bytes come in pieces of 1 to 7, split anywhere, inside UTF-8 too; completes",
}
"""What can go wrong, by name: for `Reply(fault=...)`, or by hand as the model ``offline-<name>``.

Unstreamed requests get the nearest thing: mid-stream errors are HTTP 500, ``cut`` and ``ends_early`` break the
body off, ``malformed`` is half a body, and what concerns only frames changes nothing.

Those that begin with ``call`` call the request's first function, or ``lookup``, where the `Reply` has no calls of its
own. In the dialects that they do not name, they are as ``function_call``.

A response in the background goes on in spite of ``cut``, ``ends_early``, ``stall``, ``stall_headers`` and
``malformed``: these befall the stream that it was created with, and a later one gets all of it.
"""

HTTP_FAULTS = {
    "401": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided: {key}."),
    "429": (429, "requests", "rate_limit_exceeded", "Rate limit reached for the key {key}. Try again in 1s."),
    "500": (500, "server_error", "server_error", "The server had an error with the key {key}."),
    "400": (400, "invalid_request_error", "invalid_value", "Invalid value, sent with the key {key}."),
}
JSON = dict[str, Any]
# By the type of a hosted tool: the prefix of its items' ids, the word of the event while it works, what is streamed of
# it and by which event, and what the request's ``include`` must name.
HOSTED: Mapping[str, tuple[str, str, tuple[str, str], tuple[str, str]]] = {
    "web_search": ("ws", "searching", ("", ""), ("action.sources", "web_search_call.action.sources")),
    "file_search": ("fs", "searching", ("", ""), ("results", "file_search_call.results")),
    "code_interpreter": (
        "ci", "interpreting", ("code", "code_interpreter_call_code"), ("outputs", "code_interpreter_call.outputs"),
    ),
    "image_generation": ("ig", "generating", ("", ""), ("", "")),
    "mcp": ("mcp", "", ("arguments", "mcp_call_arguments"), ("", "")),
}  # fmt: skip


@dataclass(frozen=True)
class ToolCall:
    """A call of a function of the client's, for `Reply(calls=...)`.

    `arguments` that are a text are sent as they are, so they may be no JSON. Without `id` the server makes one.
    """

    name: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)
    id: str | None = None

    @property
    def text(self) -> str:
        """Give the arguments as they are sent."""
        return self.arguments if isinstance(self.arguments, str) else dump(self.arguments).decode()


@dataclass(frozen=True)
class HostedCall:
    """A call of a tool that the model server executes itself, for `Reply(calls=...)`.

    `type` is ``web_search``, ``file_search``, ``code_interpreter``, ``image_generation`` or ``mcp``; `fields` are those
    of its item, such as ``{"action": {...}}`` or ``{"code": ..., "outputs": [...]}``; those that the API has only where
    the request's ``include`` asks for them are sent only then. The Assistants API has ``file_search`` and
    ``code_interpreter``, Chat Completions none.
    """

    type: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.type not in HOSTED:
            raise ValueError(f"Unknown hosted tool {self.type!r}. Use one of: {', '.join(HOSTED)}.")


@dataclass(frozen=True)
class Reply:
    """What one request is answered with.

    Streams send `reasoning`, then `text`, then `refusal`, one `tokens` entry a delta, then `calls`; of these those of
    hosted tools come before the text. Without `text`, `refusal` and `calls` it is as `scripted` says. A request's
    ``tool_choice="none"`` and ``parallel_tool_calls=False`` are kept: there are no calls then, or only the first.
    `phase` is that of the message (Responses). `fault` is a name of `FAULTS`. `delay` (seconds between tokens) and
    `first_delay` (before the first) replace the server's. `usage` is (input tokens, output tokens); unset, both
    are counted. `annotations` are sent unchanged, so give them in the shape of the dialect that asks.

    A request's ``max_output_tokens`` (chat: ``max_completion_tokens`` or ``max_tokens``) is kept: the answer
    stops there and says so in its dialect.
    """

    text: str | None = None
    reasoning: str = ""
    refusal: str = ""
    fault: str | None = None
    delay: float | None = None
    first_delay: float | None = None
    usage: tuple[int, int] | None = None
    annotations: tuple[Mapping[str, Any], ...] = ()
    calls: Sequence[ToolCall | HostedCall] = ()
    phase: str | None = None

    def __post_init__(self) -> None:
        if self.fault is not None and self.fault not in FAULTS:
            raise ValueError(f"Unknown fault {self.fault!r}. Use one of: {', '.join(FAULTS)}.")

    @property
    def tokens(self) -> list[str]:
        """Give the text as its deltas are sent: about a word each, nothing lost, so joined they are the text."""
        return split(self.text or "")


@dataclass(eq=False)
class Request:
    """One request as the server got it.

    `headers` have lower-case names, `body` is the parsed JSON (None without one). For the three that generate,
    `dialect` is "responses", "chat" or "assistants", `instructions` what the model is told to be, and `messages`
    the history as (role, text) in order, where a tool's output has the role "tool". `tools` are the functions that the
    model may call now, as ``{"name", "description", "parameters"}``. Times are `time.monotonic()`.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    received_at: float
    dialect: str | None = None
    model: str = ""
    instructions: str = ""
    messages: list[tuple[str, str]] = field(default_factory=list)
    tools: list[JSON] = field(default_factory=list)
    may_call: bool = True
    """Whether ``tool_choice`` lets the model call a function."""
    may_call_many: bool = True
    """Whether ``parallel_tool_calls`` lets it call several at once."""
    must_call: bool = False
    """Whether ``tool_choice`` has it call one."""
    closed_at: float | None = None
    """When the server saw that the client had closed the connection before the answer's end; else None."""
    # Looked up when called, so that a gevent patch after the import counts.
    _done: threading.Event = field(default_factory=lambda: threading.Event(), repr=False)

    @property
    def disconnected(self) -> bool:
        """Tell whether the client closed the connection before the answer's end."""
        return self.closed_at is not None

    @property
    def key(self) -> str:
        """Give the request's bearer key, or "" without one."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    def wait(self, timeout: float = 5.0) -> bool:
        """Wait until the server is through with the request; False when `timeout` seconds were not enough."""
        return self._done.wait(timeout)


Replies = Callable[[Request], Reply | str] | Iterable[Reply | str] | Reply | str | None


def error_object(message: str, type: str, code: str | None = None, param: str | None = None) -> JSON:
    return {"message": message, "type": type, "param": param, "code": code}


def split(text: str) -> list[str]:
    return re.findall(r"\s*\S{1,16}|\s+", text)


def dump(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def last(request: Request, role: str) -> str:
    return next((text for this, text in reversed(request.messages) if this == role), "")
