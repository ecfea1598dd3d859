"""The Responses API: ``POST /v1/responses`` with ``stream=True``.

Events: https://platform.openai.com/docs/api-reference/responses-streaming. Other servers leave out
indexes and whole event types, so only ``type`` is relied on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai

from ..assistants import Assistant
from ..errors import RunError
from ..events import Json
from .parts import End, Part, Slots, Turn, code_of, failure, reason, usage
from .wire import unpadded

_TEXT = "response.output_text.delta"
_TOOLS = ("function_call", "custom_tool_call", "computer_call", "local_shell_call", "mcp_approval_request")


def create(client: openai.OpenAI, assistant: Assistant, turns: Sequence[Turn], stall: float) -> Any:
    """Starts a response; gives the SDK's stream."""
    arguments: Json = {"store": False, **assistant.arguments}
    if assistant.background:
        arguments.update(background=True, store=True)
    if assistant.instructions is not None:
        arguments["instructions"] = assistant.instructions
    if options := unpadded(client):
        arguments.setdefault("stream_options", options)
    # The SDK looks through typed arguments, at more cost than all else that a request needs; this it sends as it is.
    arguments["extra_body"] = {**(arguments.get("extra_body") or {}), "input": [_item(turn) for turn in turns]}
    return client.responses.create(model=assistant.model or "", input=[], stream=True, timeout=stall, **arguments)


def _item(turn: Turn) -> Any:
    # llama.cpp takes an assistant's turn in this form only; OpenAI takes both.
    kind = "output_text" if turn.role == "assistant" else "input_text"
    return {"type": "message", "role": turn.role, "content": [{"type": kind, "text": turn.text}]}


class ResponsesTranslator:
    """Events of one response to parts."""

    def __init__(self) -> None:
        self._slots = Slots()
        # Where a text is told more than once (as deltas, when done, with its item, with the response),
        # the way it came first counts.
        self._told_by = ""
        self._paragraph = False

    def state(self) -> Json:
        """Gives all that :meth:`restore` needs, as JSON."""
        return {"told_by": self._told_by, "paragraph": self._paragraph, "slots": self._slots.state()}

    def restore(self, state: Json, again: bool) -> None:
        """Goes on from ``state``: with the next event, or with ``again`` from the first, where what was told
        before is not told again."""
        self._slots.restore(state["slots"], again)
        if not again:
            self._told_by, self._paragraph = state["told_by"], state["paragraph"]

    def settled(self) -> End | None:
        return None

    def missing(self, response: Json) -> list[Part]:
        """Gives all of a whole response that was not told; its end is for :meth:`feed`. Raises :class:`RunError`."""
        self._told_by = "poll"
        parts: list[Part] = []
        output = response.get("output")
        for index, item in enumerate(output if isinstance(output, list) else ()):
            if isinstance(item, dict) and item.get("type") in _TOOLS:
                raise RunError("tools_not_supported")
            if isinstance(item, dict) and item.get("type") == "reasoning":
                for thought in (*(item.get("summary") or ()), *(item.get("content") or ())):
                    parts += self._reasoning(thought.get("text"))
                    self._paragraph = True
            parts += self._whole(index, item, "poll")
        return parts

    def texts(self, batch: Sequence[tuple[str, Json]]) -> list[Part] | None:
        """Does for a batch of nothing but pieces of one text what :meth:`feed` does, in one step; gives ``None``, and
        does nothing, for another."""
        if self._told_by != "delta":
            return None
        at, content = batch[0][1].get("output_index"), batch[0][1].get("content_index")
        found: list[Any] = [
            data.get("delta")
            for kind, data in batch
            if kind == _TEXT and data.get("output_index") == at and data.get("content_index") == content
        ]
        try:
            return self._slots.text((at, content), "".join(found)) if len(found) == len(batch) else None
        except TypeError:
            return None

    def feed(self, kind: str, data: Json) -> list[Part]:
        key = (data.get("output_index"), data.get("content_index"))
        match kind:
            case "response.output_text.delta":
                return self._slots.text(key, data.get("delta")) if self._first("delta") else []
            case "response.refusal.delta":
                return self._slots.refusal(key, data.get("delta")) if self._first("delta") else []
            case "response.output_text.done":
                return self._slots.text(key, data.get("text")) if self._first("done") else []
            case "response.refusal.done":
                return self._slots.refusal(key, data.get("refusal")) if self._first("done") else []
            case "response.output_text.annotation.added":
                return self._slots.annotation(key, data.get("annotation"))
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                return self._reasoning(data.get("delta"))
            case "response.reasoning_summary_text.done" | "response.reasoning_text.done":
                self._paragraph = True
            case "response.output_item.added" | "response.output_item.done":
                return self._item(kind, data)
            case "response.completed" | "response.incomplete" | "response.failed" | "response.cancelled":
                return self._end(kind, data)
            case "error":
                raise failure(data)
        return []

    def _first(self, way: str) -> bool:
        self._told_by = self._told_by or way
        return self._told_by == way

    def _reasoning(self, value: object) -> list[Part]:
        if not isinstance(value, str) or not value:
            return []
        gap, self._paragraph = "\n\n" if self._paragraph else "", False
        return self._slots.reasoning(gap + value)

    def _item(self, kind: str, data: Json) -> list[Part]:
        item = data.get("item")
        if not isinstance(item, dict):
            return []
        if item.get("type") in _TOOLS:
            raise RunError("tools_not_supported")
        done = kind == "response.output_item.done"
        return self._whole(data.get("output_index"), item, "item") if done else []

    def _whole(self, index: object, item: Any, way: str) -> list[Part]:
        """The texts of a whole message, where nothing told them before."""
        parts: list[Part] = []
        if not isinstance(item, dict) or item.get("type") != "message" or self._told_by not in ("", way):
            return parts
        for number, content in enumerate(item.get("content") or ()):
            # A server may leave indexes out of its deltas.
            keys = (index, number), (index, None), (None, number), (None, None)
            if isinstance(content, dict) and content.get("type") == "output_text":
                key = self._slots.known("text", *keys)
                parts += self._slots.text(key, content.get("text"))
                for note in (content.get("annotations") or ()) if way == "poll" else ():
                    parts += self._slots.annotation(key, note)
            elif isinstance(content, dict) and content.get("type") == "refusal":
                parts += self._slots.refusal(self._slots.known("refusal", *keys), content.get("refusal"))
        if parts:
            self._told_by = way
        return parts

    def _end(self, kind: str, data: Json) -> list[Part]:
        response = data.get("response")
        response = response if isinstance(response, dict) else {}
        status = response.get("status") or kind.removeprefix("response.")
        if status in ("failed", "cancelled"):
            raise RunError(code_of(response.get("error")))
        parts: list[Part] = []
        for index, item in enumerate(response.get("output") or ()):
            parts += self._whole(index, item, "response")
        why = None
        if "incomplete" in (status, kind.removeprefix("response.")):
            why = reason((response.get("incomplete_details") or {}).get("reason"))
        return [*parts, End(why, usage(response.get("usage")))]
