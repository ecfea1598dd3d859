"""Chat Completions: ``POST /v1/chat/completions`` with ``stream=True``.

Chunks: https://platform.openai.com/docs/api-reference/chat-streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

import openai

from ..errors import RunError
from ..events import Json, dumps
from ..platform import openai_sdk
from ..types import Usage
from .calls import FUNCTION, Calls, GrowingCall, as_text, called
from .deltas import (
    STOP,
    TOOLS,
    Cut,
    Delta,
    End,
    Failed,
    Slots,
    Source,
    inner,
    is_object,
    is_said,
    listed,
    meaning,
    source,
    usage,
)
from .errors import failure, tells_failure
from .event_reader import DONE, unpadded
from .items import Turn
from .protocol import UNREAD, ModelRequest, Reading, ToolSpec

_ORDINARY: Final = frozenset({"content", "role"})
_STRANGE: Final = frozenset({"message", "messages", "text", "error"})
# Where servers put what the model thinks; one that fills several says the same in each.
_THOUGHTS: Final = (
    *("reasoning_content", "reasoning", "reasoning_text", "thinking", "reasoning_details", "thinking_blocks"),
)
# Fields of a delta that say nothing to a reader, or are looked at by name.
_KNOWN: Final = frozenset(_THOUGHTS) | {
    *("role", "content", "refusal", "annotations", "tool_calls", "function_call", "name", "id", "type", "error"),
    *("context", "provider_specific_fields", "reasoning_signature", "phase", "end_turn"),
}
# Of parts of a content: a field that names one of these has text of that kind.
_PIECES: Final = {
    "thinking": "thought",
    "reasoning": "thought",
    "summary": "thought",
    "refusal": "refusal",
    "text": "text",
    "content": "text",
}


class ChatTranslator:
    """Chunks of one completion to parts, see :meth:`.protocol.Dialect.translator`."""

    joins: ClassVar[bool] = False

    def __init__(self, start: int = 0, *, has_tools: bool = False) -> None:
        self._slots = Slots(start, keeps=has_tools)
        self._has_tools = has_tools
        self._calls = Calls()
        # Whether it ended for calls, and how many came in one delta before those of the present one.
        self._wants_calls = False
        self._finish: Literal["", "stop"] | Cut = ""
        self._usage: Usage | None = None
        self.source: Source | None = None
        self._has_spoken = self._has_deltas = self._are_pieces = False

    def settled(self) -> End | Failed | None:
        if not self._finish:
            return None
        why = None if self._finish == STOP else self._finish
        calls = tuple(self._calls.whole(is_cut=why is not None))
        if self._wants_calls and not self._calls:
            return Failed(RunError("upstream_error", said="finish_reason of tool calls, and there are none"))
        return End(why, self._usage, calls, called(calls, self._slots.said() if calls else ""))

    def texts(self, batch: Sequence[tuple[str, Json]]) -> list[Delta] | None:
        return None

    def feed(self, kind: str, data: Json) -> list[Delta]:
        if (text := _only_text(data)) is not None and kind == "":
            told = self._slots.text(0, text)
            self._has_spoken = self._has_spoken or bool(told)
            self._has_deltas = True
            return told
        if kind == DONE:
            # Usage comes after the finish reason, so only this ends the answer. Some servers give no reason; the mark
            # alone says that the connection is through, not that anything was answered.
            if not self._finish and self._has_spoken:
                self._finish = STOP
            end = self.settled()
            return [end if end is not None else Failed(RunError("upstream_ended_early"))]
        parts: list[Delta] = []
        self._usage = usage(data.get("usage")) or self._usage
        for choice in _choices(data):
            if not isinstance(choice, dict):
                self._slots.unread(choice)
            elif not choice.get("index"):
                parts += self._choice(choice)
        if self._finish and self.source is None:
            # Each piece says it: of the last ones it is taken.
            self.source = source(data)
        if tells_failure(kind, data):
            parts = [*(part for part in parts if not isinstance(part, Failed)), Failed(failure(data))]
        return parts

    def _choice(self, choice: Json) -> list[Delta]:
        delta, message = inner(choice, "delta"), inner(choice, "message")
        for text in (choice.get("text"), choice.get("delta")):
            # Of the older Completions API, and of who leaves the object out.
            delta = {"content": text, **delta} if isinstance(text, str) else delta
        parts = self._delta(delta)
        for one in listed(choice, "messages"):
            # Azure's, with data of one's own, which a tool's message has.
            more = inner(one, "delta")
            parts += self._delta(more) if more.get("role") != "tool" else []
        self._has_deltas = self._has_deltas or bool(parts)
        if message:
            parts += self._message(message)
        finish = choice.get("finish_reason")
        if broken := next((one["error"] for one in (choice, delta, message) if one.get("error")), None):
            return [*parts, Failed(failure(broken))]
        for one in (delta, message):
            if one.get("tool_calls") or one.get("function_call"):
                if not self._has_tools:
                    return [*parts, Failed(RunError("tools_not_supported"))]
                parts += self._called(one, is_whole=one is message)
        return parts + self._judge(finish)

    def _called(self, said: Json, *, is_whole: bool) -> list[Delta]:
        """Give what is new of the calls in a delta, or in a whole message. Raises :class:`RunError`."""
        found = said.get("tool_calls")
        calls = found if isinstance(found, list) else [found] if isinstance(found, dict) else []
        if not calls and isinstance(said.get("function_call"), dict):
            # As it was before tools, of which there can be one.
            calls = [{"id": "", "index": 0, "function": said["function_call"]}]
        parts: list[Delta] = []
        for number, one in enumerate(calls):
            if not isinstance(one, dict):
                self._slots.unread(one)
            elif one.get("type") == "custom":
                raise RunError("tools_not_supported")
            else:
                parts += self._call(one, number, is_whole=is_whole)
        self._has_spoken = self._has_spoken or bool(self._calls)
        return parts

    def _call(self, one: Json, number: int, *, is_whole: bool) -> list[Delta]:
        function, call_id = inner(one, "function") or one, one.get("id")
        name, arguments = function.get("name"), function.get("arguments")
        place = one["index"] if isinstance(one.get("index"), int) else None
        call = self._known(place, call_id, number, name)
        if call is None and is_whole:
            call = self._calls.alike("message", number, name, arguments, ())
        elif call is not None and not is_whole and self._is_another(call, call_id, name, arguments):
            call = None
        call = call or self._calls.begin(FUNCTION, number if place is None else place)
        self._calls.know(call, call_id)
        call.ways |= {"message"} if is_whole else set()
        parts = call.named(call_id, name)
        if is_whole or isinstance(arguments, dict):
            return [*parts, *call.complete(arguments)]
        text = as_text(arguments)
        # Some tell it whole once more at last. A piece that is no whole may be what all before it are.
        is_again = text.lstrip().startswith("{") and text == call.told and is_object(text)
        return parts if is_again else [*parts, *call.grow(text)]

    def _known(self, place: int | None, call_id: object, number: int, name: object) -> GrowingCall | None:
        """Give the call that a piece is of, as far as its id, its index or its place tells."""
        call = self._calls.of(call_id)
        if call is None and place is not None:
            return self._calls.at(place)
        if call is None and not call_id:
            # What has neither goes on with the last one, or in its place where several come in one delta.
            return (self._calls.at(number) if number or name else None) or (None if name else self._calls.open())
        return call

    def _is_another(self, call: GrowingCall, call_id: object, name: object, arguments: object) -> bool:
        """Tell whether a call begins here, though its index is that of ``call``: some servers give all the same."""
        if not (name and call.name):
            return False
        is_other = bool(call_id and call.call_id and call_id != call.call_id)
        if is_other and name != call.name:
            return True
        text = as_text(arguments)
        # One that is told again, by whichever id, is none: the tool would be executed twice.
        is_new = is_other or (not call_id and text != call.told)
        return is_new and bool(text.strip()) and is_object(call.arguments)

    def _judge(self, finish: Any) -> list[Delta]:
        """Take a reason for the end; give the failure that it means."""
        if isinstance(finish, dict):
            finish = finish.get("type") or finish.get("reason")
        if not is_said(finish):
            self._slots.unread(None if isinstance(finish, str) else finish)
            return []
        why = meaning(finish)
        if why == TOOLS:
            if not self._has_tools:
                return [Failed(RunError("tools_not_supported"))]
            why, self._wants_calls = STOP, True
        if not why:
            return [Failed(RunError("upstream_error", said=f"finish_reason {finish!r}"))]
        if why != STOP or not self._finish:
            # Some say at last that it stopped, whatever they said before.
            self._finish = why
        return []

    def _delta(self, delta: Json) -> list[Delta]:
        parts: list[Delta] = []
        content = delta.get("content")
        if (thought := next((delta[name] for name in _THOUGHTS if delta.get(name)), None)) is not None:
            # A block that is signed is whole, and was told in pieces before.
            parts += self._rest("thought", thought) if _is_signed(thought) else self._say(_pieces(thought, "thought"))
        if isinstance(content, str):
            parts += self._say([("text", content)])
        elif content:
            parts += self._say(_pieces(content, "text"))
        if delta.get("refusal"):
            parts += self._say(_pieces(delta["refusal"], "refusal"))
        for note in listed(delta, "annotations"):
            parts += self._slots.annotation(0, note)
        # Beside a text, a field that is not known is some server's own count or mark.
        for name in () if parts else delta.keys() - _KNOWN:
            self._slots.unread({name: delta[name]} if delta[name] else None)
        return parts

    def _message(self, message: Json) -> list[Delta]:
        """Give what of a whole message was not told in deltas."""
        content = message.get("content")
        thought = next((message[name] for name in _THOUGHTS if message.get(name)), None)
        pieces = [*_pieces(thought, "thought"), *_pieces(content, "text"), *_pieces(message.get("refusal"), "refusal")]
        parts: list[Delta] = []
        for kind in ("thought", "text", "refusal"):
            parts += self._rest(kind, [value for one, value in pieces if one == kind])
        parts += self._say((kind, value) for kind, value in pieces if not kind)
        return parts + self._slots.annotations(0, message.get("annotations"))

    def _rest(self, kind: str, value: Any) -> list[Delta]:
        """Give what of a whole text was not told before."""
        whole = "".join(one for found, one in _pieces(value, kind) if found == kind)
        self._are_pieces = self._are_pieces or not (self._has_deltas or self._slots.begins(kind, 0, whole))
        if self._are_pieces:
            # Each message has a piece: it is a delta by another name.
            return self._say([(kind, whole)])
        _, rest = self._slots.rest("message", kind, [0], whole) if whole else (0, "")
        return self._say([(kind, rest)]) if rest else []

    def _say(self, pieces: Any) -> list[Delta]:
        parts: list[Delta] = []
        for kind, value in pieces:
            if kind == "text":
                parts += self._slots.text(0, value)
            elif kind == "refusal":
                parts += self._slots.refusal(0, value)
            elif kind == "thought":
                parts += self._slots.reasoning(0, value)
            else:
                self._slots.unread(value)
        self._has_spoken = self._has_spoken or bool(parts)
        return parts


def _choices(data: Json) -> list[Any]:
    """Give the choices, also where a server of another kind (Ollama's own API, llama.cpp's) has none."""
    if data.get("choices"):
        found = data["choices"]
        return found if isinstance(found, list) else [found]
    if "type" in data:
        # An event of the SDK's own, which tells once more what its chunks told.
        return []
    if isinstance(data.get("message"), dict) and "model" in data:
        return [{"delta": data["message"], "finish_reason": data.get("done_reason")}]
    return [{"delta": {"content": data["content"]}}] if isinstance(data.get("content"), str) else []


def _only_text(data: Json) -> str | None:
    """Give the text of an ordinary chunk, of which nearly all are; ``None`` for another."""
    choices = data.get("choices")
    if type(choices) is not list or len(choices) != 1 or data.get("usage") is not None or data.get("error"):
        return None
    choice = choices[0]
    delta = choice.get("delta") if type(choice) is dict else None
    if type(delta) is not dict or choice.get("finish_reason") is not None or choice.get("index"):
        return None
    text = delta.get("content")
    # Whatever else there is may mean something.
    return text if type(text) is str and delta.keys() <= _ORDINARY and _STRANGE.isdisjoint(choice) else None


def _is_signed(value: Any) -> bool:
    return any(
        isinstance(one, dict) and one.get("signature") for one in (value if isinstance(value, list) else [value])
    )


def _pieces(value: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Give the texts in a content with their kinds, whether it is one text, a list of parts, or parts of parts; with
    the kind ``""`` what is none."""
    if isinstance(value, str):
        yield kind, value
    elif isinstance(value, list):
        for one in value:
            yield from _pieces(one, kind)
    elif isinstance(value, dict):
        found = [name for name in _PIECES if value.get(name)]
        typed = str(value.get("type"))
        if kind == "text" and (value.get("thought") is True or "thinking" in typed or "reasoning" in typed):
            kind = "thought"
        for name in found[:1]:
            yield from _pieces(value[name], kind if kind != "text" else _PIECES[name])
        if not found and isinstance(value.get("value"), str):
            yield kind, value["value"]
        elif not found and set(value) - {"type", "index", "id", "format", "signature", "data", *_PIECES}:
            yield "", value
    elif value is not None:
        yield "", value


class Chat:
    """The dialect, as :class:`.protocol.Dialect` has it."""

    name: ClassVar[str] = "chat"
    needs_model: ClassVar[bool] = True
    can_resume: ClassVar[bool] = False

    def keywords(self) -> frozenset[str] | None:
        """Name what ``client.chat.completions.create`` takes."""
        # The SDK imports it when it is first asked for.
        from openai.resources.chat import Completions

        return openai_sdk.keywords(Completions.create)

    def create(self, client: openai.OpenAI, request: ModelRequest) -> Any:
        """Start a completion, and give the SDK's stream."""
        messages = [message for turn in request.turns for message in _messages(turn)]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        arguments: Json = {"stream_options": {"include_usage": True, **unpadded(client)}, **request.arguments}
        arguments["extra_body"] = request.body(ToolSpec.function, messages=messages)
        return client.chat.completions.create(
            model=request.model or "", messages=[], stream=True, timeout=request.stall, **arguments
        )

    def instead(self, client: openai.OpenAI, request: ModelRequest, error: openai.APIStatusError) -> None:
        """Give nothing: what is sent has nothing that could be left out."""

    def learner(self, client: openai.OpenAI, request: ModelRequest) -> None:
        """Give nothing: reasoning is not resent."""

    def translator(self, reading: Reading = UNREAD, start: int = 0) -> ChatTranslator:
        """Make a translator for one completion, which says itself why it ended."""
        return ChatTranslator(start, has_tools=reading.has_tools)

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell it by what is in a chunk, which has no type; what has the name of an Assistants event is one."""
        return "choices" in data and not kind.startswith("thread.")


def _messages(turn: Turn) -> list[Json]:
    if not turn.items:
        return [{"role": turn.role, "content": turn.text}]
    found: list[Json] = []
    for item in turn.items:
        if item["type"] == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": _output(item["output"])})
        elif item["type"] in ("message", "function_call"):
            if not found or found[-1]["role"] == "tool":
                found.append({"role": "assistant", "content": None})
            _add(found[-1], item)
    return found


def _add(message: Json, item: Mapping[str, Any]) -> None:
    """Add what a model said in one answer to its message."""
    if item["type"] == "message":
        texts = [message["content"], *(part["text"] for part in item["content"])]
        message["content"] = "\n\n".join(text for text in texts if text)
        return
    function = {"name": item["name"], "arguments": item["arguments"]}
    message.setdefault("tool_calls", []).append({"id": item["call_id"], "type": FUNCTION, "function": function})


def _output(output: Any) -> str:
    return output if isinstance(output, str) else dumps(output)
