"""Chat Completions: ``POST /v1/chat/completions`` with ``stream=True``.

Chunks: https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai

from ..assistants import Assistant
from ..errors import RunError
from ..events import Json
from .parts import End, Part, Slots, Turn, failure, reason, usage
from .wire import DONE, unpadded


def create(client: openai.OpenAI, assistant: Assistant, turns: Sequence[Turn], stall: float) -> Any:
    """Starts a completion; gives the SDK's stream."""
    messages: list[Any] = [{"role": turn.role, "content": turn.text} for turn in turns]
    if assistant.instructions is not None:
        messages.insert(0, {"role": "system", "content": assistant.instructions})
    arguments: Json = {"stream_options": {"include_usage": True, **unpadded(client)}, **assistant.arguments}
    # As it is, see the Responses API.
    arguments["extra_body"] = {**(arguments.get("extra_body") or {}), "messages": messages}
    return client.chat.completions.create(
        model=assistant.model or "", messages=[], stream=True, timeout=stall, **arguments
    )


class ChatTranslator:
    """Chunks of one completion to parts."""

    def __init__(self) -> None:
        self._slots = Slots()
        self._finish: str | None = None
        self._usage: Json | None = None

    def settled(self) -> End | None:
        if self._finish is None:
            return None
        return End(None if self._finish == "stop" else reason(self._finish), self._usage)

    def feed(self, kind: str, data: Json) -> list[Part]:
        if kind == DONE:
            # Usage comes after the finish reason, so only this ends the answer; some servers give no reason.
            self._finish = self._finish or "stop"
            end = self.settled()
            return [end] if end else []
        if kind == "error" or data.get("error"):
            raise failure(data)
        self._usage = usage(data.get("usage")) or self._usage
        parts: list[Part] = []
        for choice in data.get("choices") or ():
            if isinstance(choice, dict) and not choice.get("index"):
                parts += self._choice(choice)
        return parts

    def _choice(self, choice: Json) -> list[Part]:
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        if delta.get("tool_calls") or delta.get("function_call"):
            raise RunError("tools_not_supported")
        parts: list[Part] = []
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        parts += self._slots.reasoning(thought)
        parts += self._slots.text(0, delta["content"]) if delta.get("content") else []
        parts += self._slots.refusal(0, delta["refusal"]) if delta.get("refusal") else []
        for note in delta.get("annotations") or ():
            parts += self._slots.annotation(0, note)
        finish = choice.get("finish_reason")
        if finish in ("tool_calls", "function_call"):
            raise RunError("tools_not_supported")
        if isinstance(finish, str):
            self._finish = finish if finish in ("length", "content_filter") else "stop"
        return parts
