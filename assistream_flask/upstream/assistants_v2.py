"""The Assistants API v2: ``POST /v1/threads/runs`` with ``stream=True``, where a server still speaks it.

Events: https://platform.openai.com/docs/api-reference/assistants-streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import openai

from ..errors import RunError
from ..events import Json
from ..platform import openai_sdk
from .calls import FUNCTION, Calls, as_text, called
from .deltas import Delta, End, Failed, Slots, Source, as_object, indexed, inner, listed, reason, source, usage
from .errors import failure, tells_failure
from .items import GO_ON, in_words
from .protocol import UNREAD, ModelRequest, Reading, ToolSpec


class AssistantsTranslator:
    """Events of one run to parts, up to its end or to where it waits, see :meth:`.protocol.Dialect.translator`."""

    joins: ClassVar[bool] = False

    def __init__(self, start: int = 0, *, has_tools: bool = False) -> None:
        self._slots = Slots(start, keeps=has_tools)
        self._has_tools = has_tools
        self._calls = Calls()
        self.source: Source | None = None
        # A run says of a content filter nothing, its message does.
        self._why: Any = None

    def settled(self) -> End | Failed | None:
        return None

    def texts(self, batch: Sequence[tuple[str, Json]]) -> list[Delta] | None:
        return None

    def feed(self, kind: str, data: Json) -> list[Delta]:
        match kind:
            case "thread.message.delta":
                return self._delta(indexed(data.get("id")), _content(inner(data, "delta")))
            case "thread.message.completed" | "thread.message.incomplete":
                self._why = inner(data, "incomplete_details").get("reason")
                return self._whole(indexed(data.get("id")), _content(data))
            case "thread.run.completed" | "thread.run.incomplete" if not _is_failed(kind, data):
                # A run may say that it is whole of a message that is not.
                why = inner(data, "incomplete_details").get("reason") or self._why
                cut = reason(why) if why or kind.endswith("incomplete") else None
                self.source = source(data)
                return [End(cut, usage(data.get("usage")))]
            case "thread.run.requires_action":
                return self._waits(data)
            case "thread.run.step.delta" | "thread.run.step.completed" if self._has_tools:
                return self._steps(indexed(data.get("id")), data, is_whole=kind.endswith("completed"))
            case "thread.run.completed" | "thread.run.failed" | "thread.run.cancelled" | "thread.run.expired":
                return [Failed(failure(data.get("last_error") or {}))]
        if tells_failure(kind, data):
            raise failure(data)
        return []

    def _waits(self, data: Json) -> list[Delta]:
        """Give the end of an answer whose run waits for the outputs of calls. Raises :class:`RunError`."""
        found = listed(inner(inner(data, "required_action"), "submit_tool_outputs"), "tool_calls")
        if not self._has_tools or any(as_object(one).get("type", FUNCTION) != FUNCTION for one in found):
            raise RunError("tools_not_supported")
        if not found:
            raise RunError("upstream_malformed", said=f"a run waits for nothing: {data}")
        self.source = source(data)
        parts: list[Delta] = []
        ids: dict[int, Any] = {}
        for number, one in enumerate(found):
            function = inner(one, "function")
            name, arguments = function.get("name"), function.get("arguments")
            call = self._calls.of(one.get("id")) or self._calls.alike("run", None, name, arguments, ())
            call = call or self._calls.begin(FUNCTION, ("run", number), one.get("id"))
            call.ways.add("run")
            ids[call.at] = one.get("id")
            parts += [*call.named(one.get("id"), name), *call.complete(arguments)]
        calls = tuple(self._calls.whole())
        waits = [ids.get(call.at) for call in self._calls.functions]
        followup = {"thread_id": data.get("thread_id"), "run_id": data.get("id"), "calls": waits}
        return [*parts, End(None, usage(data.get("usage")), calls, called(calls, self._slots.said()), followup)]

    def _steps(self, step_id: object, data: Json, *, is_whole: bool) -> list[Delta]:
        """Give what is new of the calls of a step."""
        details = inner(data if is_whole else inner(data, "delta"), "step_details")
        parts: list[Delta] = []
        for number, found in enumerate(listed(details, "tool_calls")):
            one = as_object(found)
            place = (step_id, indexed(one.get("index", number)))
            if one.get("type", FUNCTION) != FUNCTION:
                item = {**one, "type": f"{one.get('type')}_call"}
                parts += self._calls.hosted(item, place, is_whole=is_whole)
            elif not is_whole:
                # A whole step tells of calls that were answered before, too.
                parts += self._grown(place, one)
        return parts

    def _grown(self, place: object, one: Json) -> list[Delta]:
        function = inner(one, "function")
        call = self._calls.of(one.get("id")) or self._calls.at(place)
        if call is None and not function.get("name") and not function.get("arguments"):
            # The output of one that was called in an answer before this.
            return []
        call = call or self._calls.begin(FUNCTION, place)
        self._calls.know(call, one.get("id"))
        return [*call.named(one.get("id"), function.get("name")), *call.grow(as_text(function.get("arguments")))]

    def _delta(self, message_id: object, content: Sequence[Any]) -> list[Delta]:
        parts: list[Delta] = []
        for number, item in enumerate(content):
            key = message_id, indexed(as_object(item).get("index", number))
            text = inner(item, "text")
            if text.get("value") is not None:
                parts += self._slots.text(key, text["value"])
            for found in listed(text, "annotations"):
                parts += self._slots.annotation(key, found)
            if refusal := as_object(item).get("refusal"):
                parts += self._slots.refusal(key, refusal)
            elif not text:
                self._slots.unread(item)
        return parts

    def _whole(self, message_id: object, content: Sequence[Any]) -> list[Delta]:
        """Give what of a whole message was not told in deltas, which may have left out its id."""
        parts: list[Delta] = []
        for number, item in enumerate(content):
            text, refusal = inner(item, "text"), as_object(item).get("refusal")
            keys = (message_id, number), (None, number)
            if text:
                key, rest = self._slots.rest("message", "text", keys, text.get("value"))
                parts += self._slots.text(key, rest) if rest else []
                parts += self._slots.annotations(key, text.get("annotations"))
            elif refusal:
                key, rest = self._slots.rest("message", "refusal", keys, refusal)
                parts += self._slots.refusal(key, rest) if rest else []
            else:
                self._slots.unread(item)
        return parts


def _is_failed(kind: str, data: Json) -> bool:
    """Tell whether a run that is called completed failed."""
    return kind.endswith("completed") and (bool(data.get("last_error")) or data.get("status") == "failed")


def _content(data: Json) -> list[Any]:
    """Give the parts of a message's content, also where a server has mere texts there."""
    content = data.get("content")
    parts = content if isinstance(content, list) else [{"text": content}] if isinstance(content, str) else []
    found = []
    for part in parts:
        text = as_object(part).get("text")
        found.append({**part, "text": {"value": text}} if isinstance(text, str) else part)
    return found


class Assistants:
    """The dialect, as :class:`.protocol.Dialect` has it."""

    name: ClassVar[str] = "assistants"
    # An assistant of the server has one.
    needs_model: ClassVar[bool] = False
    can_resume: ClassVar[bool] = False

    def keywords(self) -> frozenset[str] | None:
        """Name what ``client.beta.threads.create_and_run`` takes."""
        # The SDK imports it when it is first asked for.
        from openai.resources.beta.threads import Threads

        return openai_sdk.keywords(Threads.create_and_run)

    def create(self, client: openai.OpenAI, request: ModelRequest) -> Any:
        """Start a run on a thread of its own that holds the history, or go on with one that waits for outputs, and give
        the SDK's stream."""
        if outputs := _outputs(request):
            return self._submit(client, request, outputs)
        arguments: Json = {"assistant_id": request.assistant_id, **request.arguments}
        if request.model is not None:
            arguments["model"] = request.model
        if request.system is not None:
            arguments["instructions"] = request.system
        messages: list[Any] = [{"role": turn.role, "content": in_words(turn)} for turn in request.turns]
        if request.turns[-1].role != "user":
            # It is told of its calls in words, behind which it would have nothing to answer.
            messages.append({"role": "user", "content": GO_ON})
        if body := request.body(ToolSpec.function):
            arguments["extra_body"] = body
        thread: Any = {"messages": messages}
        return client.beta.threads.create_and_run(thread=thread, stream=True, timeout=request.stall, **arguments)

    def _submit(self, client: openai.OpenAI, request: ModelRequest, outputs: list[Any]) -> Any:
        run = request.followup or {}
        arguments = {name: request.arguments[name] for name in _OF_REQUESTS if name in request.arguments}
        return client.beta.threads.runs.submit_tool_outputs(
            run_id=run["run_id"],
            thread_id=run["thread_id"],
            tool_outputs=outputs,
            stream=True,
            timeout=request.stall,
            **arguments,
        )

    def instead(
        self, client: openai.OpenAI, request: ModelRequest, error: openai.APIStatusError
    ) -> ModelRequest | None:
        """Give a request for a new run where the one that waited for outputs is gone, or does not wait any more."""
        if error.status_code not in (400, 404, 409) or not _outputs(request):
            return None
        return request._replace(followup=None)

    def learner(self, client: openai.OpenAI, request: ModelRequest) -> None:
        """Give nothing: this API tells no reasoning."""

    def translator(self, reading: Reading = UNREAD, start: int = 0) -> AssistantsTranslator:
        """Make a translator for one run, which says itself why it ended."""
        return AssistantsTranslator(start, has_tools=reading.has_tools)

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell it by the event's name."""
        return kind.startswith("thread.")


_OF_REQUESTS: Final = ("extra_headers", "extra_query")


def _outputs(request: ModelRequest) -> list[Json]:
    """Give what a run that waits is sent; nothing where there is none, or it waits for other calls."""
    run = request.followup or {}
    ids, outputs = run.get("calls", []), run.get("outputs", [])
    # A run that goes on calls what it likes.
    if not (run.get("thread_id") and run.get("run_id") and request.may_call and len(ids) == len(outputs)):
        return []
    told = zip(ids, outputs, strict=True)
    return [{"tool_call_id": one, "output": output} for one, output in told if one is not None]
