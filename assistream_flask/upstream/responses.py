"""The Responses API: ``POST /v1/responses`` with ``stream=True``.

Events: https://platform.openai.com/docs/api-reference/responses-streaming. Other servers leave out
indexes and whole event types, so only ``type`` is relied on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, TypeAlias

import openai

from ..errors import RunError
from ..events import Json
from ..platform import openai_sdk
from .deltas import Cut, Delta, End, Failed, Slots, as_object, indexed, inner, listed, reason, usage, words
from .errors import failure, tells_failure
from .event_reader import unpadded
from .items import Turn
from .protocol import ModelRequest

_TEXT: Final = "response.output_text.delta"
_TOOLS: Final = ("function_call", "custom_tool_call", "computer_call", "local_shell_call", "mcp_approval_request")
_Key: TypeAlias = tuple[object, object]
"""Those of an item, and of a part of it."""
# The kind of thought that an event tells of, and the field that counts those of an item.
_THOUGHTS: Final = {
    "response.reasoning_summary_text": ("summary", "summary_index"),
    "response.reasoning_summary": ("summary", "summary_index"),
    "response.reasoning_summary_part": ("summary", "summary_index"),
    "response.reasoning_text": ("content", "content_index"),
    "response.reasoning": ("content", "content_index"),
}


def _item(turn: Turn) -> Any:
    # llama.cpp takes an assistant's turn in this form only; OpenAI takes both.
    kind = "output_text" if turn.role == "assistant" else "input_text"
    return {"type": "message", "role": turn.role, "content": [{"type": kind, "text": turn.text}]}


class _Pieces:
    """Tells which text or thought a piece is of, by the keys that the server gives them."""

    def __init__(self) -> None:
        self._raw: _Key | None = None
        self._key: _Key = (None, None)
        self._count = 0
        self.has_ended = False
        self.is_steady = False
        """Whether two pieces had the same key."""

    def state(self) -> list[Any]:
        """Give all that :meth:`restore` needs, as JSON."""
        return [self._raw, self._key, self._count, self.is_steady, self.has_ended]

    def restore(self, state: Sequence[Any]) -> None:
        """Take what :meth:`state` gave."""
        raw, key, self._count, self.is_steady, self.has_ended = state
        self._raw, self._key = (tuple(raw) if raw is not None else None), tuple(key)

    def key(self, raw: _Key, *, many: bool = False) -> _Key:
        """Give the key for a piece, or for ``many``, that came under ``raw``."""
        if raw == self._raw:
            self.is_steady = True
            if not self.has_ended or raw[1] is not None:
                return self._key
            # Who names no part begins a new one when the last is whole.
            self._count += 1
            self._key = raw[0], f"+{self._count}"
        elif self._raw is None or not self._counts_up(self._raw, raw):
            self._key = raw
        self._raw, self.has_ended = raw, False
        self.is_steady = self.is_steady or many
        return self._key

    def known(self, raw: _Key) -> _Key:
        """Give the key for what is told of a part that is known."""
        return self._key if raw == self._raw or None in raw else raw

    def _counts_up(self, last: _Key, raw: _Key) -> bool:
        """Tell whether a part goes on under another number: vLLM counts ``content_index`` up with every delta."""
        (at, before), (index, number) = last, raw
        numbers = isinstance(before, int) and isinstance(number, int) and number > before
        return numbers and at == index and not self.has_ended and not self.is_steady


class ResponsesTranslator:
    """Events of one response to parts. ``limit`` is the number of tokens that the answer may have."""

    joins: ClassVar[bool] = True

    def __init__(self, limit: int | None = None) -> None:
        self._slots = Slots()
        self._limit = limit
        # Where events name no item, they are of the one that was begun last.
        self._item_index: object = None
        self._speaks = False
        self._pieces = {"text": _Pieces(), "summary": _Pieces(), "content": _Pieces()}
        # Where the last piece of a text came, and its key, until something else comes.
        self._last: object = None
        self._last_key: _Key = (None, None)
        # What it is if nothing more comes: some say that it failed, and only then why.
        self._failure: RunError | None = None
        # The thought that was told last, whether it was whole, and by which event each kind of thought is told.
        self._thought: object = None
        self._paragraph = False
        self._thought_events: dict[str, str] = {}
        self._knows_thoughts = True
        # Contents of messages as they began.
        self._added: dict[_Key, Any] = {}

    def state(self) -> Json:
        """Give all that :meth:`restore` needs, as JSON."""
        return {
            # For workers of older releases.
            "told_by": "delta" if self._slots.has_text() else "",
            "paragraph": self._paragraph,
            "slots": self._slots.state(),
            "sums": self._slots.sums(),
            "item": self._item_index,
            "thought": self._thought,
            "thought_events": dict(self._thought_events),
            "pieces": {kind: pieces.state() for kind, pieces in self._pieces.items()},
        }

    def restore(self, state: Json, *, from_start: bool = False) -> None:
        """Go on from ``state`` with the next event, or with the first one ``from_start``."""
        self._slots.restore(state["slots"], state.get("sums", ()), from_start=from_start)
        if from_start:
            return
        self._paragraph, self._item_index = state["paragraph"], state.get("item")
        thought = state.get("thought")
        self._thought = tuple(thought) if thought is not None else None
        # A worker of an older release tells none of these, nor which thoughts it told.
        self._knows_thoughts = "pieces" in state
        self._thought_events = dict(state.get("thought_events", {}))
        for kind, pieces in state.get("pieces", {}).items():
            self._pieces[kind].restore(pieces)

    def settled(self) -> End | Failed | None:
        return Failed(self._failure) if self._failure is not None else None

    def texts(self, batch: Sequence[tuple[str, Json]]) -> list[Delta] | None:
        if not self._speaks:
            return None
        at, content = batch[0][1].get("output_index"), batch[0][1].get("content_index")
        found: list[Any] = [
            data.get("delta")
            for kind, data in batch
            if kind == _TEXT and data.get("output_index") == at and data.get("content_index") == content
        ]
        try:
            if len(found) != len(batch):
                return None
            return self._slots.text(self._text_key(at, content, len(found) > 1), "".join(found))
        except TypeError:
            return None

    def feed(self, kind: str, data: Json) -> list[Delta]:
        match kind:
            case "response.output_text.delta":
                self._speaks = True
                key = self._text_key(data.get("output_index"), data.get("content_index"))
                delta = data.get("delta")
                return self._slots.text(key, delta if isinstance(delta, str) else words(delta) or delta)
            case "response.refusal.delta":
                return self._slots.refusal(self._key_of(data), data.get("delta"))
            case "response.output_text.annotation.added" | "response.output_text_annotation.added":
                return self._slots.annotation(self._pieces["text"].known(self._key_of(data)), data.get("annotation"))
        if kind.endswith((".added", ".done")):
            self._last = None
            for pieces in self._pieces.values():
                pieces.has_ended = True
        return self._feed(kind, data)

    def _feed(self, kind: str, data: Json) -> list[Delta]:
        match kind:
            case "response.output_item.added":
                return self._begin(data)
            case "response.content_part.added":
                self._added[self._key_of(data)] = data.get("part")
                return []
            case "response.output_text.done":
                return self._text(kind, data.get("output_index"), data.get("content_index"), data)
            case "response.refusal.done":
                return self._refusal(kind, data.get("output_index"), data.get("content_index"), data)
            case "response.content_part.done":
                return self._content(kind, data.get("output_index"), data.get("content_index"), data.get("part"))
            case "response.output_item.done":
                return self._whole(kind, data.get("output_index"), data.get("item"))
            case "error" | "response.error":
                raise failure(data)
        return self._told_else(kind, data)

    def _told_else(self, kind: str, data: Json) -> list[Delta]:
        event, _, what = kind.rpartition(".")
        if event in _THOUGHTS:
            return self._think(event, what, data)
        if event == "response" and what in ("created", "queued", "in_progress"):
            broken = inner(data, "response").get("error")
            self._failure = failure(broken) if broken else self._failure
            return []
        if event == "response" and what in ("completed", "incomplete", "failed", "cancelled", "done"):
            return self._end(what, data)
        if tells_failure(kind, data):
            raise failure(data)
        if what == "delta" and "arguments" not in event and "_call" not in event:
            self._slots.unread({kind: data.get("delta")})
        return []

    def _text_key(self, index: object, number: object, many: bool = False) -> _Key:
        last = index, number
        if last != self._last:
            self._last_key = self._pieces["text"].key(self._key(index, number), many=many)
            # The second of its kind says that numbers can be relied on.
            self._last = last if self._pieces["text"].is_steady else None
        return self._last_key

    def _key_of(self, data: Json) -> _Key:
        return self._key(data.get("output_index"), data.get("content_index"))

    def _key(self, index: object, number: object) -> _Key:
        return (self._item_index if index is None else indexed(index)), indexed(number)

    def _begin(self, data: Json) -> list[Delta]:
        item = inner(data, "item")
        if item.get("type") in _TOOLS:
            raise RunError("tools_not_supported")
        index = data.get("output_index")
        before = self._item_index
        self._item_index = indexed(index) if index is not None else (before + 1 if isinstance(before, int) else 0)
        for number, content in enumerate(listed(item, "content") if item.get("type") == "message" else ()):
            self._added[self._item_index, number] = content
        return []

    def _text(self, way: str, index: object, number: object, content: Json) -> list[Delta]:
        """Give what of a whole text was not told before, with its annotations."""
        key, rest = self._slots.rest(way, "text", _keys(self._key(index, number)), content.get("text"))
        parts = self._slots.text(key, rest) if rest else []
        return parts + self._slots.annotations(key, content.get("annotations"))

    def _refusal(self, way: str, index: object, number: object, content: Json) -> list[Delta]:
        key, rest = self._slots.rest(way, "refusal", _keys(self._key(index, number)), content.get("refusal"))
        return self._slots.refusal(key, rest) if rest else []

    def _content(self, way: str, index: object, number: object, content: Any) -> list[Delta]:
        match as_object(content).get("type"):
            case "output_text" | "text":
                return self._text(way, index, number, content)
            case "refusal":
                return self._refusal(way, index, number, content)
            case "reasoning_text":
                return self._thought_rest(way, "content", self._key(index, number), content.get("text"))
        self._slots.unread(content)
        return []

    def _whole(self, way: str, index: object, item: Any) -> list[Delta]:
        """Give what of a whole item was not told before."""
        found = as_object(item)
        if found.get("type") in _TOOLS:
            raise RunError("tools_not_supported")
        parts: list[Delta] = []
        if found.get("type") == "message":
            content = found.get("content")
            # Some tell a text here as it is.
            told = [{"type": "output_text", "text": content}] if isinstance(content, str) else listed(found, "content")
            for number, one in enumerate(told):
                parts += self._content(way, index, number, one)
        elif found.get("type") == "reasoning":
            for kind, thoughts in (
                ("summary", found.get("summary")),
                ("content", found.get("content") or found.get("text")),
            ):
                for number, one in enumerate(thoughts if isinstance(thoughts, list) else [thoughts]):
                    parts += self._thought_rest(way, kind, self._key(index, number), words(one))
        return parts

    def _think(self, event: str, what: str, data: Json) -> list[Delta]:
        kind, number = _THOUGHTS[event]
        key = self._key(data.get("output_index"), data.get(number))
        if what == "done":
            whole = data.get("text") or data.get("part") or data.get("reasoning")
            parts = self._thought_rest(event, kind, key, words(whole))
            self._paragraph = True
            return parts
        # Some tell each piece by two events, one of them for older clients.
        if what != "delta" or self._thought_events.setdefault(kind, event) != event:
            return []
        delta = data.get("delta")
        # Open Responses leaves open what it is.
        text = words(delta)
        return self._reason((kind, *self._pieces[kind].key(key)), delta if text is None else text)

    def _thought_rest(self, way: str, kind: str, key: _Key, value: object) -> list[Delta]:
        if not self._knows_thoughts:
            return []
        found, rest = self._slots.rest(way, "thought", [(kind, *one) for one in _keys(key)], value)
        return self._reason(found, rest) if rest else []

    def _reason(self, key: object, value: object) -> list[Delta]:
        is_new = self._paragraph or self._thought not in (None, key)
        parts = self._slots.reasoning(key, value, "\n\n" if is_new else "")
        if isinstance(value, str) and value:
            self._thought, self._paragraph = key, False
        return parts

    def _end(self, what: str, data: Json) -> list[Delta]:
        response = inner(data, "response") or data
        status = indexed(response.get("status")) or what
        output = listed(response, "output")
        texts = [f"{as_object(one).get('text')}" for item in output for one in listed(item, "content")]
        parts: list[Delta] = []
        for (index, number), content in {} if self._slots.has_text() else self._added.items():
            # What only the beginning of an item had.
            parts += self._content("added", index, number, content)
        if not output and not self._slots.has_text() and response.get("output_text"):
            parts += self._text("response", None, None, {"text": response["output_text"]})
        # Some tell several items as one in their deltas.
        if len(texts) < 2 or not self._slots.says("".join(texts)):
            try:
                for index, item in enumerate(output):
                    parts += self._whole("response", index, item)
            except RunError as error:
                return [*parts, Failed(error)]
        details = inner(response, "incomplete_details") or inner(response, "status_details")
        if broken := response.get("error") or details.get("error"):
            return [*parts, Failed(failure(broken))]
        if {"failed", "cancelled"} & {status, what}:
            self._failure = RunError("upstream_error", said=f"{data}")
            return parts
        tokens = usage(response.get("usage"))
        why: Cut | None = None
        if "incomplete" in (status, what) or inner(response, "incomplete_details").get("reason"):
            why = reason(details.get("reason"))
        elif self._limit is not None and tokens is not None and tokens["completion_tokens"] >= self._limit:
            # Some call an answer completed that they cut there.
            why = "max_tokens"
        return [*parts, End(why, tokens)]


def _keys(key: _Key) -> Sequence[_Key]:
    """Give those that a whole text may have been told under in pieces: a server may leave indexes out of its deltas."""
    at, number = key
    return key, (at, None), (None, number), (None, None)


class Responses:
    """The dialect, as :class:`.protocol.Dialect` has it."""

    name: ClassVar[str] = "responses"
    needs_model: ClassVar[bool] = True
    can_resume: ClassVar[bool] = True

    def keywords(self) -> frozenset[str] | None:
        """Name what ``client.responses.create`` takes."""
        # The SDK imports it when it is first asked for.
        from openai.resources.responses import Responses as Resource

        return openai_sdk.keywords(Resource.create)

    def create(self, client: openai.OpenAI, request: ModelRequest) -> Any:
        """Start a response, and give the SDK's stream."""
        arguments: Json = {"store": False, **request.arguments}
        if request.background:
            arguments.update(background=True, store=True)
        if request.system is not None:
            arguments["instructions"] = request.system
        if options := unpadded(client):
            arguments.setdefault("stream_options", options)
        # The SDK looks through typed arguments, at more cost than all else that a request needs; this it sends as it
        # is.
        sent = {"input": [_item(turn) for turn in request.turns]}
        arguments["extra_body"] = {**(arguments.get("extra_body") or {}), **sent}
        return client.responses.create(
            model=request.model or "", input=[], stream=True, timeout=request.stall, **arguments
        )

    def translator(self, most_tokens: int | None = None) -> ResponsesTranslator:
        """Make a translator for one response. Some servers call an answer completed that they cut at ``most_tokens``:
        that is told by the number."""
        return ResponsesTranslator(most_tokens)

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell it by the event's type."""
        return kind.startswith("response.")
