"""The Assistants API v2: ``POST /v1/threads/runs`` with ``stream=True``, where a server still speaks it.

Events: https://platform.openai.com/docs/api-reference/assistants-streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import openai

from ..errors import RunError
from ..events import Json
from ..platform import openai_sdk
from .deltas import Delta, End, Failed, Slots, as_object, indexed, inner, listed, reason, usage
from .errors import failure, tells_failure
from .protocol import ModelRequest


class AssistantsTranslator:
    """Events of one run to parts."""

    joins: ClassVar[bool] = False

    def __init__(self) -> None:
        self._slots = Slots()
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
            case "thread.run.completed" if data.get("last_error") or data.get("status") == "failed":
                return [Failed(failure(data.get("last_error") or {}))]
            case "thread.run.completed":
                # A run may say that it is whole of a message that is not.
                return [End(reason(self._why) if self._why else None, usage(data.get("usage")))]
            case "thread.run.incomplete":
                why = inner(data, "incomplete_details").get("reason") or self._why
                return [End(reason(why), usage(data.get("usage")))]
            case "thread.run.requires_action":
                raise RunError("tools_not_supported")
            case "thread.run.failed" | "thread.run.cancelled" | "thread.run.expired":
                return [Failed(failure(data.get("last_error") or {}))]
        if tells_failure(kind, data):
            raise failure(data)
        return []

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
        """Start a run on a thread of its own that holds the history, and give the SDK's stream."""
        arguments: Json = {"assistant_id": request.assistant_id, **request.arguments}
        if request.model is not None:
            arguments["model"] = request.model
        if request.system is not None:
            arguments["instructions"] = request.system
        messages: list[Any] = [{"role": turn.role, "content": turn.text} for turn in request.turns]
        thread: Any = {"messages": messages}
        return client.beta.threads.create_and_run(thread=thread, stream=True, timeout=request.stall, **arguments)

    def translator(self, most_tokens: int | None = None) -> AssistantsTranslator:
        """Make a translator for one run, which says itself why it ended."""
        return AssistantsTranslator()

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell it by the event's name."""
        return kind.startswith("thread.")
