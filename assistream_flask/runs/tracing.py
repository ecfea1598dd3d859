"""Traces runs with OpenTelemetry, where that is installed, by its conventions for generative AI: every name is here.

A run is a span ``invoke_agent``; what it asks of the model, round by round, are spans ``chat`` below it, and the calls
of server tools that it executes are spans ``execute_tool``. A run that waits for a person, or that another worker goes
on with, is several ``invoke_agent``: each part's links to the one before, as far as that is known. The conventions are
those of https://github.com/open-telemetry/semantic-conventions-genai, of which none is stable yet.

Nothing is imported before a worker is made, and nothing at all where the extra ``otel`` is missing. Nothing is done for
each delta. Whatever a tracer raises is logged, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from ..assistants import Assistant
from ..errors import RunError
from ..events import Json, dumps
from ..platform.log_throttle import LogThrottle
from ..tools import Tool
from ..types import Usage
from ..upstream.deltas import End, Source
from ..upstream.items import Turn

_log = logging.getLogger(__name__)

TRACER: Final = "assistream_flask"
CONTENT_VARIABLE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""The conventions' own: whether spans have what was said. ``NO_CONTENT``, the default, and ``EVENT_ONLY`` are no."""
_WITH_CONTENT: Final = ("true", "span_only", "span_and_event")

Attributes: TypeAlias = Mapping[str, Any]
Within: TypeAlias = Callable[[], AbstractContextManager[object]]
Begun: TypeAlias = Literal["asked", "answered", "taken_over"]
"""Why a part of a run began: it was asked for, what it waited for was answered, or another worker had it before."""

# Names of spans, and values.
_INVOKE_AGENT: Final = "invoke_agent"
_CHAT: Final = "chat"
_EXECUTE_TOOL: Final = "execute_tool"
# Who speaks it is not known: it says which API's flavour the attributes have, and server.address where it was asked.
_PROVIDER: Final = "openai"
_FUNCTION: Final = "function"

# Attributes.
_OPERATION_NAME: Final = "gen_ai.operation.name"
_PROVIDER_NAME: Final = "gen_ai.provider.name"
_AGENT_ID: Final = "gen_ai.agent.id"
_AGENT_NAME: Final = "gen_ai.agent.name"
_AGENT_DESCRIPTION: Final = "gen_ai.agent.description"
_CONVERSATION_ID: Final = "gen_ai.conversation.id"
_REQUEST_MODEL: Final = "gen_ai.request.model"
_REQUEST_STREAM: Final = "gen_ai.request.stream"
_RESPONSE_MODEL: Final = "gen_ai.response.model"
_RESPONSE_ID: Final = "gen_ai.response.id"
_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
_TOOL_NAME: Final = "gen_ai.tool.name"
_TOOL_DESCRIPTION: Final = "gen_ai.tool.description"
_TOOL_TYPE: Final = "gen_ai.tool.type"
_TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
_SERVER_ADDRESS: Final = "server.address"
_SERVER_PORT: Final = "server.port"
_ERROR_TYPE: Final = "error.type"
# Of OpenAI's APIs only.
_API_TYPE: Final = "openai.api.type"
_API_TYPES: Final = {"chat": "chat_completions", "responses": "responses"}
# What was said, which is opt-in.
_INSTRUCTIONS: Final = "gen_ai.system_instructions"
_INPUT_MESSAGES: Final = "gen_ai.input.messages"
_OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
_TOOL_DEFINITIONS: Final = "gen_ai.tool.definitions"
_TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
_TOOL_RESULT: Final = "gen_ai.tool.call.result"
# Our own.
_RUN_ID: Final = "assistream.run.id"
_RUN_BEGUN: Final = "assistream.run.begun"
_RUN_STATUS: Final = "assistream.run.status"

# What an assistant's request may say, by the SDK's argument.
_ASKED: Final = {
    "temperature": ("gen_ai.request.temperature", float),
    "top_p": ("gen_ai.request.top_p", float),
    "frequency_penalty": ("gen_ai.request.frequency_penalty", float),
    "presence_penalty": ("gen_ai.request.presence_penalty", float),
    "seed": ("gen_ai.request.seed", int),
    "max_tokens": ("gen_ai.request.max_tokens", int),
    "max_completion_tokens": ("gen_ai.request.max_tokens", int),
    "max_output_tokens": ("gen_ai.request.max_tokens", int),
}
_REASONS: Final = {"max_tokens": "length", "content_filter": "content_filter"}
# Why a call has no output of its tool's, as a class of errors.
_TOOL_ERRORS: Final = {"timed out": "timeout", "bad arguments": "bad_arguments"}
_INTERRUPTED: Final = "interrupted"

# The form in which W3C's Trace Context names a span.
_PARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


class _Api(NamedTuple):
    """OpenTelemetry's modules, and our tracer."""

    context: Any
    trace: Any
    tracer: Any


def _api() -> _Api | None:
    try:
        # An extra.
        from opentelemetry import context, trace
    except ImportError:
        return None
    # The app may say only later where spans go: this one asks for that with its first span.
    return _Api(context, trace, trace.get_tracer(TRACER))


class Tracing:
    """Traces the runs of one worker; nothing where it is not ``is_on``, or OpenTelemetry is not installed."""

    def __init__(self, throttle: LogThrottle | None = None, *, is_on: bool = True) -> None:
        self._throttle = throttle or LogThrottle()
        self.api: _Api | None = None
        self.has_content = os.environ.get(CONTENT_VARIABLE, "").strip().lower() in _WITH_CONTENT
        if is_on:
            with self.quietly():
                self.api = _api()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Have what is done in it fail alone: a tracer is never a run's trouble."""
        try:
            yield
        except Exception as error:
            self._throttle.error(_log, error, "a span is lost, or a part of one")

    def run(self, begun: Begun) -> RunTrace:
        """Give what traces a part of a run. One that was ``taken_over`` belongs to no request; another to the present
        one, however late its turn comes."""
        present: Any = None
        if self.api is not None:
            with self.quietly():
                api = self.api.context
                present = api.Context() if begun == "taken_over" else api.get_current()
        return RunTrace(self, present, begun)


class _Span:
    """A span, or none. ``context`` is what its children are told as their parent's."""

    def __init__(self, tracing: Tracing, parent: Any) -> None:
        self.tracing, self.context = tracing, parent
        # Taken by who ends it: of two that do so at once one has it.
        self._spans: list[Any] = []

    def begin(self, name: str, attributes: Attributes, *, asks: bool = False, before: str = "") -> None:
        """Begin it: one that ``asks`` another server, linked to the span that ``before`` names."""
        api = self.tracing.api
        if api is None:
            return
        with self.tracing.quietly():
            kinds = api.trace.SpanKind
            kind = kinds.CLIENT if asks else kinds.INTERNAL
            links = _links(api, before)
            span = api.tracer.start_span(name, self.context, kind, attributes=_known(attributes), links=links)
            self._spans.append(span)
            self.context = api.trace.set_span_in_context(span, self.context)

    @property
    def is_recorded(self) -> bool:
        """Tell whether anybody has it, so that it is worth the trouble to say more of it."""
        with self.tracing.quietly():
            return any(span.is_recording() for span in self._spans)
        return False

    @property
    def has_content(self) -> bool:
        """Tell whether it is to have what was said."""
        return self.tracing.has_content and self.is_recorded

    @contextmanager
    def current(self) -> Iterator[None]:
        """Have it be the current span of this thread, greenlet or coroutine within."""
        api, token = self.tracing.api, None
        if api is not None and self.context is not None:
            with self.tracing.quietly():
                token = api.context.attach(self.context)
        try:
            yield
        finally:
            if api is not None and token is not None:
                with self.tracing.quietly():
                    api.context.detach(token)

    def say(self, attributes: Attributes) -> None:
        """Add to what it says."""
        with self.tracing.quietly():
            for span in self._spans:
                span.set_attributes(_known(attributes))

    def fail(self, kind: str) -> None:
        """Have it say that it failed, by a class of errors and no word of the error's own: that may be content."""
        api = self.tracing.api
        if api is None:
            return
        with self.tracing.quietly():
            for span in self._spans:
                span.set_attribute(_ERROR_TYPE, kind)
                span.set_status(api.trace.Status(api.trace.StatusCode.ERROR, kind))

    def end(self) -> None:
        """End it. Idempotent, from any thread."""
        while self._spans:
            with self.tracing.quietly():
                try:
                    span = self._spans.pop()
                except IndexError:
                    return
                span.end()


class ChatSpan(_Span):
    """One round of the model: a request, and its answer. What is asked again in the same round is of the same span."""

    def __init__(self, tracing: Tracing, parent: Any, used: list[int]) -> None:
        super().__init__(tracing, parent)
        self._used = used

    def reach(self, url: object) -> None:
        """Say which server is asked."""
        with self.tracing.quietly():
            if self.is_recorded:
                found = urlsplit(f"{url}")
                port = found.port or {"http": 80, "https": 443}.get(found.scheme)
                self.say({_SERVER_ADDRESS: found.hostname, _SERVER_PORT: port})

    def answered(self, end: End, source: Source | None, said: Callable[[], str]) -> None:
        """Say how the answer ended; ``said`` gives its text, and is asked only where that is wanted."""
        with self.tracing.quietly():
            _count(self._used, end.usage)
            if not self.is_recorded:
                return
            why = _REASONS[end.reason] if end.reason is not None else "tool_calls" if end.calls else "stop"
            self.say(
                {
                    _FINISH_REASONS: [why],
                    **_tokens(end.usage),
                    _RESPONSE_ID: source.id if source is not None else None,
                    _RESPONSE_MODEL: source.model if source is not None else None,
                }
            )
            if self.has_content:
                parts = [_text(text)] if (text := said()) else []
                parts += [_call(call.call_id, call.name, call.arguments) for call in end.calls]
                # The one word that messages have otherwise than finish_reasons.
                word = "tool_call" if why == "tool_calls" else why
                self.say({_OUTPUT_MESSAGES: dumps([{"role": "assistant", "parts": parts, "finish_reason": word}])})


class ToolSpan(_Span):
    """One execution of a server tool."""

    _raised: str | None = None
    _is_over = False

    def within(self, inner: Within) -> Within:
        """Give ``inner`` with this the current span in it, wherever the tool is executed."""
        if self.tracing.api is None:
            return inner

        @contextmanager
        def both() -> Iterator[None]:
            with self.current(), inner():
                try:
                    yield
                except BaseException as error:
                    self._raised = type(error).__qualname__
                    raise

        return both

    def over(self, output: str, error: str | None) -> None:
        """Say what became of it: ``error`` says in a few words why the output is none of the tool's own."""
        self._is_over = True
        if error is not None:
            named = self._raised if error == "failed" else None
            self.fail(named or _TOOL_ERRORS.get(error, error))
        if self.has_content:
            self.say({_TOOL_RESULT: output})

    def end(self) -> None:
        if not self._is_over:
            # Nobody waited for what would come of it.
            self.fail(_INTERRUPTED)
        super().end()


class RunTrace:
    """What traces one part of a run: from where a worker begins to work on it, or goes on, to where it ends, waits for
    a person, or is another worker's."""

    def __init__(self, tracing: Tracing | None = None, parent: Any = None, begun: Begun = "asked") -> None:
        self._tracing, self._begun = tracing or Tracing(is_on=False), begun
        self._span = _Span(self._tracing, parent)
        self._used: list[int] = []
        # Those below it that are not ended, in the order in which they began.
        self._open: list[_Span] = []
        self._run_id = self._thread_id = ""

    def begin(self, thread_id: str, run_id: str, assistant: Assistant, before: str) -> None:
        """Begin it; ``before`` is what :meth:`name` gave of the part before, as far as that was stored."""
        self._run_id, self._thread_id = run_id, thread_id
        if self._tracing.api is None:
            return
        attributes = {
            **self._of(_INVOKE_AGENT),
            _PROVIDER_NAME: _PROVIDER,
            _REQUEST_MODEL: assistant.model,
            _AGENT_ID: assistant.id,
            _AGENT_NAME: assistant.name,
            _AGENT_DESCRIPTION: assistant.description or None,
            _CONVERSATION_ID: thread_id,
            _RUN_BEGUN: self._begun,
        }
        self._span.begin(f"{_INVOKE_AGENT} {assistant.name}", attributes, before=before)

    def current(self) -> AbstractContextManager[None]:
        """Have it be the current span of this thread or greenlet within."""
        return self._span.current()

    def name(self) -> str:
        """Name it as W3C's Trace Context does, for the next part to link to; ``""`` where it is none."""
        api = self._tracing.api
        if api is not None:
            with self._tracing.quietly():
                found = api.trace.get_current_span(self._span.context).get_span_context()
                if found.is_valid:
                    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
        return ""

    @contextmanager
    def chat(self, assistant: Assistant, turns: Sequence[Turn]) -> Iterator[ChatSpan]:
        """Trace a request to the model and its answer. What is raised within is how it failed."""
        span = ChatSpan(self._tracing, self._span.context, self._used)
        if self._tracing.api is not None:
            name = f"{_CHAT} {assistant.model}" if assistant.model else _CHAT
            with self._tracing.quietly():
                span.begin(name, {**self._of(_CHAT), **self._request(assistant)}, asks=True)
                if span.has_content:
                    span.say(_content(assistant, turns))
        self._open.append(span)
        try:
            yield span
        except RunError as error:
            span.fail(error.code)
            raise
        except Exception as error:
            span.fail(type(error).__qualname__)
            raise
        finally:
            span.end()
            self._open.remove(span)

    @contextmanager
    def tool(self, tool: Tool, call_id: str, arguments: str) -> Iterator[ToolSpan]:
        """Trace the execution of a call."""
        span = ToolSpan(self._tracing, self._span.context)
        attributes = {
            **self._of(_EXECUTE_TOOL),
            _TOOL_NAME: tool.name,
            _TOOL_DESCRIPTION: tool.spec.description or None,
            _TOOL_TYPE: _FUNCTION,
            _TOOL_CALL_ID: call_id,
        }
        span.begin(f"{_EXECUTE_TOOL} {tool.name}", attributes)
        if span.has_content:
            span.say({_TOOL_ARGUMENTS: arguments})
        self._open.append(span)
        try:
            yield span
        finally:
            span.end()
            self._open.remove(span)

    def end(self, status: str, error: str | None) -> None:
        """End it, and what is below it: a thread that nothing can stop may be at it for a while. The run's ``status``
        is what it is now, ``error`` the code with which it failed. Idempotent."""
        for span in list(self._open):
            if error is not None and isinstance(span, ChatSpan):
                # Its thread may still wait for the model server.
                span.fail(error)
            span.end()
        if self._span.is_recorded:
            used = zip((_INPUT_TOKENS, _OUTPUT_TOKENS), self._used, strict=False)
            self._span.say({_RUN_STATUS: status, **dict(used)})
        if error is not None:
            self._span.fail(error)
        self._span.end()

    def _of(self, operation: str) -> Json:
        return {_OPERATION_NAME: operation, _RUN_ID: self._run_id}

    def _request(self, assistant: Assistant) -> Json:
        arguments = assistant.arguments
        numbers = {
            name: kind(arguments[given])
            for given, (name, kind) in _ASKED.items()
            if isinstance(arguments.get(given), int | float)
        }
        return {
            _PROVIDER_NAME: _PROVIDER,
            _REQUEST_MODEL: assistant.model,
            _REQUEST_STREAM: True,
            _CONVERSATION_ID: self._thread_id,
            _API_TYPE: _API_TYPES.get(assistant.upstream),
            **numbers,
        }


def _known(attributes: Attributes) -> Json:
    return {name: value for name, value in attributes.items() if value is not None}


def _links(api: _Api, before: str) -> list[Any]:
    found = _PARENT.fullmatch(before)
    if found is None:
        return []
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    trace = api.trace
    return [trace.Link(trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(flags)))]


def _count(used: list[int], usage: Usage | None) -> None:
    if usage is not None:
        before = used or [0, 0]
        used[:] = [before[0] + usage["prompt_tokens"], before[1] + usage["completion_tokens"]]


def _tokens(usage: Usage | None) -> Json:
    return {} if usage is None else {_INPUT_TOKENS: usage["prompt_tokens"], _OUTPUT_TOKENS: usage["completion_tokens"]}


# What was said, in the conventions' words: JSON, as an attribute holds no objects.


def _content(assistant: Assistant, turns: Sequence[Turn]) -> Json:
    tools = [{"type": _FUNCTION, **spec._asdict()} for spec in assistant.specs]
    system = assistant.instructions
    return {
        _INSTRUCTIONS: dumps([_text(system)]) if system else None,
        _INPUT_MESSAGES: dumps([message for turn in turns for message in _messages(turn)]),
        _TOOL_DEFINITIONS: dumps(tools) if tools else None,
    }


def _messages(turn: Turn) -> Iterator[Json]:
    if not turn.items:
        yield {"role": turn.role, "parts": [_text(turn.text)]}
    for item in turn.items:
        if item["type"] == "message":
            yield {"role": "assistant", "parts": [_text(part.get("text", "")) for part in item["content"]]}
        elif item["type"] == "function_call":
            yield {"role": "assistant", "parts": [_call(item["call_id"], item["name"], item["arguments"])]}
        elif item["type"] == "function_call_output":
            response = {"type": "tool_call_response", "id": item["call_id"], "response": item["output"]}
            yield {"role": "tool", "parts": [response]}


def _text(text: str) -> Json:
    return {"type": "text", "content": text}


def _call(call_id: str, name: str, arguments: str) -> Json:
    try:
        given: Any = json.loads(arguments)
    except ValueError:
        given = arguments
    return {"type": "tool_call", "id": call_id, "name": name, "arguments": given}
