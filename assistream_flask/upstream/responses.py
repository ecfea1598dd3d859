"""The Responses API: ``POST /v1/responses`` with ``stream=True``.

Events: https://platform.openai.com/docs/api-reference/responses-streaming. Other servers leave out
indexes and whole event types, so only ``type`` is relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

import openai

from ..errors import RunError
from ..events import Json
from ..platform import openai_sdk
from .calls import FUNCTION, Calls, GrowingCall, as_text, called, hosted_kind
from .deltas import (
    Cut,
    Delta,
    End,
    Failed,
    Slots,
    Source,
    WholeCall,
    as_object,
    indexed,
    inner,
    listed,
    reason,
    source,
    storable,
    usage,
    words,
)
from .errors import failure, tells_failure
from .event_reader import unpadded
from .items import Turn, followed, message_item, plain
from .protocol import UNREAD, ModelRequest, Reading, ToolSpec

_TEXT: Final = "response.output_text.delta"
# Calls that nobody here can answer.
_TOOLS: Final = (
    *("custom_tool_call", "computer_call", "local_shell_call", "shell_call", "apply_patch_call"),
    "mcp_approval_request",
)
_ARGUMENTS: Final = "response.function_call_arguments"
_ENCRYPTED: Final = "reasoning.encrypted_content"
# What is to be told of tools that the server executes, by the beginnings of their types: else their steps are empty.
_INCLUDES: Final = {
    "web_search": "web_search_call.action.sources",
    "file_search": "file_search_call.results",
    "code_interpreter": "code_interpreter_call.outputs",
}
_ITEMS: Final = 1_000
"""So many items an answer may have."""
_MODELS: Final = 1_000
"""Of so many models it is known whether they give their reasoning; then that is learned anew."""
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


def _input(turn: Turn) -> Sequence[Mapping[str, Any]]:
    return turn.items or [message_item(turn.role, turn.text)]


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
    """Events of one response to parts, as :meth:`.protocol.Dialect.translator` has it."""

    joins: ClassVar[bool] = True

    def __init__(self, reading: Reading = UNREAD, start: int = 0) -> None:
        self._limit, self._has_tools, self._learn = reading
        self._slots = Slots(start, keeps=self._has_tools)
        self.start = start
        self._calls = Calls()
        self.source: Source | None = None
        # What the answer is resent as, each with the place that the server gave it; a call, which stands where it
        # began, as its number among all.
        self._items: list[tuple[object, Json]] = []
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
            "start": self.start,
            "calls": self._calls.state(),
            "items": list(self._items),
        }

    def restore(self, state: Json, *, from_start: bool = False) -> None:
        """Go on from ``state`` with the next event, or with the first one ``from_start``."""
        self._slots.restore(state["slots"], state.get("sums", ()), from_start=from_start)
        # Workers of older releases know of no calls.
        if "calls" in state:
            self._calls.restore(state["calls"], from_start=from_start)
        if from_start:
            return
        self._items = [(place, item) for place, item in state.get("items", ())]
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
                return self._whole(kind, data.get("output_index"), data.get("item"), _Told(self._items))
            case "response.function_call_arguments.delta" if self._has_tools:
                return self._call_of(data).grow(as_text(data.get("delta")))
            case "response.function_call_arguments.done" if self._has_tools:
                call = self._call_of(data)
                return [*call.named(None, data.get("name")), *call.complete(data.get("arguments"))]
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
        self._look_at(item)
        index = data.get("output_index")
        before = self._item_index
        self._item_index = indexed(index) if index is not None else (before + 1 if isinstance(before, int) else 0)
        for number, content in enumerate(listed(item, "content") if item.get("type") == "message" else ()):
            self._added[self._item_index, number] = content
        return self._call_begins(item) if self._has_tools else []

    def _look_at(self, item: Json) -> None:
        """Raise for what nobody here can answer; learn what an item says of the model."""
        kind = item.get("type")
        if kind in _TOOLS or (kind == "function_call" and not self._has_tools):
            raise RunError("tools_not_supported")
        if kind == "reasoning" and self._learn is not None:
            self._learn()

    def _call_begins(self, item: Json) -> list[Delta]:
        if item.get("type") != "function_call":
            return self._calls.hosted(item, self._item_index, is_whole=False)
        ids = item.get("call_id"), item.get("id")
        call = self._calls.of(*ids) or self._calls.begin(FUNCTION, self._item_index)
        self._note(call, self._item_index, *ids)
        call.begun(item.get("arguments"))
        return call.named(item.get("call_id"), item.get("name"))

    def _call_of(self, data: Json) -> GrowingCall:
        """Give the call that arguments are of. Some servers name none."""
        ids, place = (data.get("item_id"), data.get("call_id")), indexed(data.get("output_index"))
        call = self._calls.of(*ids) or (self._calls.at(place) if place is not None else None)
        if call is None or call.kind != FUNCTION:
            call = self._calls.open(data.get("arguments")) or self._calls.begin(FUNCTION, self._key(place, None)[0])
        self._note(call, self._key(place, None)[0], *ids)
        return call

    def _note(self, call: GrowingCall, place: object, *ids: object) -> None:
        self._calls.know(call, *ids)
        if not any(item.get("at") == call.at for _, item in reversed(self._items)):
            self._items.append((place, {"type": "function_call", "at": call.at}))

    def _whole_call(self, way: str, place: object, item: Json, told: _Told) -> list[Delta]:
        """Give what of a whole call was not told before."""
        ids, name, arguments = (item.get("call_id"), item.get("id")), item.get("name"), item.get("arguments")
        call = self._calls.of(*ids) or self._calls.alike(way, place, name, arguments, told.call_ids)
        call = call or self._calls.begin(FUNCTION, place)
        self._note(call, place, *ids)
        call.ways.add(way)
        call.is_cut = item.get("status") == "incomplete"
        if told.items is not self._items:
            told.items.append((place, {"type": "function_call", "at": call.at}))
        return [*call.named(ids[0], name), *call.complete(arguments)]

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

    def _whole(self, way: str, index: object, item: Any, told: _Told) -> list[Delta]:
        """Give what of a whole item was not told before."""
        found = as_object(item)
        self._look_at(found)
        place = self._key(index, None)[0]
        parts: list[Delta] = []
        resent: Json | None = None
        if found.get("type") == "function_call":
            parts = self._whole_call(way, place, found, told)
        elif hosted_kind(found):
            resent = {"type": "hosted"}
            parts = self._calls.hosted(found, place, is_whole=True) if self._has_tools else []
        else:
            parts = self._words(way, index, found) if told.has_words else []
            resent = storable(plain(found))
        if resent is not None:
            told.items.append((place, resent))
        if len(told.items) > _ITEMS:
            raise RunError("answer_too_long", said=f"an answer has more than {_ITEMS} items")
        return parts

    def _words(self, way: str, index: object, item: Json) -> list[Delta]:
        parts: list[Delta] = []
        if item.get("type") == "message":
            content = item.get("content")
            # Some tell a text here as it is.
            told = [{"type": "output_text", "text": content}] if isinstance(content, str) else listed(item, "content")
            for number, one in enumerate(told):
                parts += self._content(way, index, number, one)
        elif item.get("type") == "reasoning":
            for kind, thoughts in (
                ("summary", item.get("summary")),
                ("content", item.get("content") or item.get("text")),
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
        # Some tell several items as one in their deltas.
        is_one = len(texts) > 1 and self._slots.says("".join(texts))
        told = _Told([], [as_object(item).get("call_id") for item in output], not is_one)
        parts: list[Delta] = []
        try:
            parts += self._missing(response, output)
            for index, item in enumerate(output):
                parts += self._whole("response", index, item, told)
        except RunError as error:
            return [*parts, Failed(error)]
        details = inner(response, "incomplete_details") or inner(response, "status_details")
        if broken := response.get("error") or details.get("error"):
            return [*parts, Failed(failure(broken))]
        if {"failed", "cancelled"} & {status, what}:
            self._failure = RunError("upstream_error", said=f"{data}")
            return parts
        tokens, self.source = usage(response.get("usage")), source(response)
        why: Cut | None = None
        if "incomplete" in (status, what) or inner(response, "incomplete_details").get("reason"):
            why = reason(details.get("reason"))
        elif self._limit is not None and tokens is not None and tokens["completion_tokens"] >= self._limit:
            # Some call an answer completed that they cut there.
            why = "max_tokens"
        calls = tuple(self._calls.whole(is_cut=why is not None))
        return [*parts, End(why, tokens, calls, self._resent(told.items, calls))]

    def _missing(self, response: Json, output: Sequence[Any]) -> list[Delta]:
        """Give what only the beginning of an item had, or the response itself."""
        parts: list[Delta] = []
        for (index, number), content in {} if self._slots.has_text() else self._added.items():
            parts += self._content("added", index, number, content)
        if not output and not self._slots.has_text() and response.get("output_text"):
            parts += self._text("response", None, None, {"text": response["output_text"]})
        return parts

    def _resent(self, told: Sequence[tuple[object, Json]], calls: Sequence[WholeCall]) -> Sequence[Json]:
        """Give what the answer is resent as: of what its items and its end told, that which has more."""
        known = self._items
        if all(isinstance(place, int) for place, _ in known):
            known = sorted(known, key=lambda one: int(f"{one[0]}"))
        less, more = sorted(([item for _, item in known], [item for _, item in told]), key=len)
        if len(less) == len(more):
            less, more = more, less
        # Calls in the order in which they were told, wherever each of them stands.
        resent, found = list(called(calls)), list[Json]()
        for item in more:
            if item["type"] != "function_call":
                found.append(item)
            elif resent:
                found.append(resent.pop(0))
        found += resent
        if not _says(found) and self._slots.has_text():
            if not (words := [item for item in less if _says([item])] or self._heard()) and not self._has_tools:
                # What it said is not known any more.
                return ()
            first = next((at for at, item in enumerate(found) if item["type"] == "function_call"), len(found))
            found[first:first] = words
        found = [item for item in followed(found) if item["type"] != "hosted"]
        return found if any(item["type"] != "message" or "phase" in item for item in found) else ()

    def _heard(self) -> list[Json]:
        said = self._slots.said()
        return [message_item("assistant", said)] if said.strip() else []


def _says(items: Sequence[Json]) -> bool:
    return any(item["type"] == "message" for item in items)


class _Told(NamedTuple):
    """What is told of whole items at one time: by the event of one, or by the answer's end."""

    items: list[tuple[object, Json]]
    call_ids: Sequence[object] = ()
    has_words: bool = True


def _keys(key: _Key) -> Sequence[_Key]:
    """Give those that a whole text may have been told under in pieces: a server may leave indexes out of its deltas."""
    at, number = key
    return key, (at, None), (None, number), (None, None)


class Responses:
    """The dialect, as :class:`.protocol.Dialect` has it."""

    name: ClassVar[str] = "responses"
    needs_model: ClassVar[bool] = True
    can_resume: ClassVar[bool] = True

    def __init__(self) -> None:
        # Whether a model gives its reasoning, by the server's URL and its name. Each change is one step: a lock that is
        # made at import is none of gevent's.
        self._reasons: dict[tuple[str, str], bool] = {}

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
        body = request.body(_tool, input=[item for turn in request.turns for item in _input(turn)])
        if "include" not in {*arguments, *body} and (include := self._include(client, request)):
            body["include"] = include
        arguments["extra_body"] = body
        return client.responses.create(
            model=request.model or "", input=[], stream=True, timeout=request.stall, **arguments
        )

    def _include(self, client: openai.OpenAI, request: ModelRequest) -> list[str]:
        kinds = [f"{tool.get('type')}" for tool in request.hosted]
        found = [word for begin, word in _INCLUDES.items() if any(kind.startswith(begin) for kind in kinds)]
        return [*found, _ENCRYPTED] if self._reasons.get(_model(client, request)) else found

    def instead(
        self, client: openai.OpenAI, request: ModelRequest, error: openai.APIStatusError
    ) -> ModelRequest | None:
        """Give a request without reasoning where the server takes none, or can't read what it gave once."""
        said = f"{error.body} {error}".lower()
        if error.status_code not in (400, 404, 422) or "encrypted" not in said:
            return None
        model = _model(client, request)
        turns = [turn._replace(items=_without_reasoning(turn.items)) for turn in request.turns]
        asked = bool(self._reasons.get(model)) and "include" not in request.arguments
        if asked and "not supported" in said:
            # For good: whether it reasons is no matter then.
            self._reasons[model] = False
        elif turns == list(request.turns):
            return None
        return request._replace(turns=turns)

    def learner(self, client: openai.OpenAI, request: ModelRequest) -> Callable[[], None]:
        """Give what has the model asked for its reasoning from now on."""
        return partial(self._learn, _model(client, request))

    def _learn(self, model: tuple[str, str]) -> None:
        if len(self._reasons) >= _MODELS:
            self._reasons.clear()
        self._reasons.setdefault(model, True)

    def translator(self, reading: Reading = UNREAD, start: int = 0) -> ResponsesTranslator:
        """Make a translator for one response. Some servers call an answer completed that they cut at ``most_tokens``:
        that is told by the number."""
        return ResponsesTranslator(reading, start)

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell it by the event's type."""
        return kind.startswith("response.")


def _tool(spec: ToolSpec) -> Json:
    return {"type": "function", **spec._asdict()}


def _model(client: openai.OpenAI, request: ModelRequest) -> tuple[str, str]:
    return f"{client.base_url}", request.model or ""


def _without_reasoning(items: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [item for item in items if item.get("type") != "reasoning"] if items else items
