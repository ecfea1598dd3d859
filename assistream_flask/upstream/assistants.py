"""The Assistants API v2: ``POST /v1/threads/runs`` with ``stream=True``, where a server still speaks it.

Events: https://platform.openai.com/docs/api-reference/assistants-streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai

from ..assistants import Assistant
from ..errors import RunError
from ..events import Json
from .parts import End, Part, Slots, Turn, code_of, failure, reason, usage


def create(client: openai.OpenAI, assistant: Assistant, turns: Sequence[Turn], stall: float) -> Any:
    """Starts a run on a thread of its own that holds the history; gives the SDK's stream."""
    arguments: Json = {"assistant_id": assistant.id, **assistant.arguments}
    if assistant.model is not None:
        arguments["model"] = assistant.model
    if assistant.instructions is not None:
        arguments["instructions"] = assistant.instructions
    messages: list[Any] = [{"role": turn.role, "content": turn.text} for turn in turns]
    return client.beta.threads.create_and_run(thread={"messages": messages}, stream=True, timeout=stall, **arguments)


class AssistantsTranslator:
    """Events of one run to parts."""

    def __init__(self) -> None:
        self._slots = Slots()
        self._told: set[object] = set()
        # A run says of a content filter nothing, its message does.
        self._why: Any = None

    def settled(self) -> End | None:
        return None

    def feed(self, kind: str, data: Json) -> list[Part]:
        match kind:
            case "thread.message.delta":
                self._told.add(data.get("id"))
                delta = data.get("delta")
                return self._content(data.get("id"), delta.get("content") if isinstance(delta, dict) else None)
            case "thread.message.completed" | "thread.message.incomplete":
                self._why = (data.get("incomplete_details") or {}).get("reason")
                # A server may leave the id out of its deltas.
                if not self._told & {data.get("id"), None}:
                    return self._content(data.get("id"), data.get("content"))
            case "thread.run.completed":
                return [End(None, usage(data.get("usage")))]
            case "thread.run.incomplete":
                why = (data.get("incomplete_details") or {}).get("reason") or self._why
                return [End(reason(why), usage(data.get("usage")))]
            case "thread.run.requires_action":
                raise RunError("tools_not_supported")
            case "thread.run.failed" | "thread.run.cancelled" | "thread.run.expired":
                raise RunError(code_of(data.get("last_error")))
            case "error":
                raise failure(data)
        return []

    def _content(self, message_id: object, content: Any) -> list[Part]:
        parts: list[Part] = []
        for number, item in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(item, dict):
                continue
            key = (message_id, item.get("index", number))
            text = item.get("text")
            if isinstance(text, dict):
                parts += self._slots.text(key, text.get("value"))
                for found in text.get("annotations") or ():
                    parts += self._slots.annotation(key, found)
            if item.get("refusal"):
                parts += self._slots.refusal(key, item["refusal"])
        return parts
