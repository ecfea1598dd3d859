"""The tool calls of one answer, whichever way a model server tells of them: in pieces, whole, late, or twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from ..errors import RunError
from ..events import Json, dumps
from .deltas import Call, Delta, WholeCall, is_object, may_leave, readable
from .items import message_item

FUNCTION: Final = "function"
_MOST: Final = 1_000
"""So many an answer may have: each that is told once more is looked for among all."""
_LONGEST_NAME: Final = 255
_LONGEST_HOSTED: Final = 64 << 10
"""So many characters are told of what a tool of the model server did: a search may give whole documents."""
_HOSTED: Final = re.compile(r"(web_search|file_search|code_interpreter|image_generation|mcp)_call")
# What says nothing of what was done; an image is megabytes.
_PLAIN: Final = frozenset({"id", "type", "status", "result", "name"})


class GrowingCall:
    """One call, as far as it is known."""

    __slots__ = ("_early", "_half", "_pieces", "_whole", "at", "call_id", "is_cut", "is_over", "kind", "name", "ways")

    def __init__(self, at: int, kind: str) -> None:
        self.at, self.kind = at, kind
        self.call_id = self.name = ""
        # Joined as they come, so that there are few however many came: neighbours are of very different lengths.
        self._pieces: list[str] = []
        self._half = ""
        self._whole = ""
        self._early = ""
        self.is_over = self.is_cut = False
        self.ways: set[str] = set()
        """The ways in which it was told as a whole."""

    def state(self) -> list[Any]:
        """Give all that :meth:`restored` needs, as JSON."""
        # A lone surrogate is no text that a database takes.
        half = ord(self._half or "\0")
        return [self.kind, self.call_id, self.name, list(self._pieces), half, self._whole, self._early, self.is_over]

    @classmethod
    def restored(cls, at: int, state: Sequence[Any], *, from_start: bool) -> GrowingCall:
        """Give what :meth:`state` is of; only who it is where its answer is told again ``from_start``."""
        kind, call_id, name, pieces, half, whole, early, is_over = state
        call = cls(at, kind)
        call.call_id, call.name = call_id, name
        # Those that were not begun once more wait for nothing.
        call.is_over = from_start
        if not from_start:
            call._pieces, call._half = list(pieces), chr(half) if half else ""
            call._whole, call._early, call.is_over = whole, early, is_over
        return call

    @property
    def told(self) -> str:
        """Give what was told of its arguments in pieces."""
        return "".join(self._pieces)

    @property
    def arguments(self) -> str:
        """Give its arguments as they were told last, as a whole where they were."""
        return self._whole or self.told or self._early

    def begun(self, arguments: object) -> None:
        """Take what stood there when the call began, which is the whole only where nothing comes later."""
        self._early, _ = readable(as_text(arguments))
        self.is_over = False

    def named(self, call_id: object, name: object) -> list[Delta]:
        """Take its id and its name, or a piece of that; give what is new."""
        before = self.call_id, self.name
        if isinstance(call_id, str) and not self.call_id:
            self.call_id = readable(call_id)[0][:_LONGEST_NAME]
        if isinstance(name, str) and name:
            self._add_name(readable(name)[0])
        return [] if (self.call_id, self.name) == before else [self._delta("")]

    def _add_name(self, name: str) -> None:
        if name.startswith(self.name):
            # Some tell it again with each piece of the arguments.
            self.name = name[:_LONGEST_NAME]
        elif not self._pieces:
            self.name = (self.name + name)[:_LONGEST_NAME]

    def grow(self, piece: str) -> list[Delta]:
        """Take a piece of the arguments."""
        piece, self._half = readable(self._half + piece)
        if not piece:
            return []
        pieces = self._pieces
        pieces.append(piece)
        while len(pieces) > 1 and len(pieces[-2]) < 2 * len(pieces[-1]):
            pieces[-2:] = ["".join(pieces[-2:])]
        return [self._delta(piece)]

    def complete(self, arguments: object) -> list[Delta]:
        """Take the whole arguments, a text or an object; give what of them was not told before."""
        text, _ = readable(as_text(arguments))
        self.is_over, self._half = True, ""
        if not text.strip():
            return []
        told = self.told
        rest = text.removeprefix(told) if text.startswith(told) else ""
        if is_object(text) or not is_object(self.arguments):
            self._whole = text
        return self.grow(rest) if rest else []

    def _delta(self, value: str) -> Call:
        return Call(self.at, self.call_id, self.name, self.kind, value)


class Calls:
    """Gives each tool call of an answer a number, and finds the one that something more is told of."""

    def __init__(self) -> None:
        self._all: list[GrowingCall] = []
        self._ids: dict[str, GrowingCall] = {}
        self._places: dict[object, GrowingCall] = {}

    def __bool__(self) -> bool:
        return any(call.kind == FUNCTION for call in self._all)

    def state(self) -> Json:
        """Give all that :meth:`restore` needs, as JSON."""
        return {
            "all": [call.state() for call in self._all],
            "ids": {name: call.at for name, call in self._ids.items()},
            "places": [[place, call.at] for place, call in self._places.items()],
        }

    def restore(self, state: Json, *, from_start: bool = False) -> None:
        """Take what :meth:`state` gave. Where the answer is told again ``from_start``, its calls are known by their
        ids and places."""
        self._all = [GrowingCall.restored(at, one, from_start=from_start) for at, one in enumerate(state["all"])]
        self._ids = {name: self._all[at] for name, at in state["ids"].items()}
        self._places = {place: self._all[at] for place, at in state["places"]}

    def of(self, *ids: object) -> GrowingCall | None:
        """Give the call that one of ``ids`` is of: a server may name it by its own id, or by that of its item."""
        return next((self._ids[one] for one in ids if isinstance(one, str) and one in self._ids), None)

    def at(self, place: object) -> GrowingCall | None:
        """Give the call that was begun last at ``place``."""
        return self._places.get(place)

    def begin(self, kind: str, place: object, *ids: object) -> GrowingCall:
        """Begin a call that is not known yet. Raises :class:`RunError` for the one that is too many."""
        if len(self._all) >= _MOST:
            raise RunError("answer_too_long", said=f"an answer has more than {_MOST} tool calls")
        call = GrowingCall(len(self._all), kind)
        self._all.append(call)
        self._places[place] = call
        self.know(call, *ids)
        return call

    def know(self, call: GrowingCall, *ids: object) -> None:
        """Note that ``call`` goes by ``ids`` too."""
        for one in ids:
            # Some servers make up a new one for each event.
            if isinstance(one, str) and one and len(self._ids) < 4 * _MOST:
                self._ids.setdefault(one, call)

    @property
    def functions(self) -> list[GrowingCall]:
        """Give the calls of functions, in the order in which they began."""
        return [call for call in self._all if call.kind == FUNCTION]

    def open(self, whole: object = None) -> GrowingCall | None:
        """Give the call of a function that arguments are of where the server names none: the first that is not whole,
        or the one whose ``whole`` arguments come."""
        functions = self.functions
        waiting = [call for call in functions if not call.is_over]
        if len(waiting) < 2:
            return waiting[0] if waiting else functions[-1] if functions else None
        text, _ = readable(as_text(whole))
        begun = [call for call in waiting if call.told and text.startswith(call.told)]
        return next(iter(begun or [call for call in waiting if not is_object(call.told)]), waiting[-1])

    def alike(
        self, way: str, place: object, name: object, arguments: object, but: Sequence[object]
    ) -> GrowingCall | None:
        """Give the call that is told as a whole under ids which nobody knows, if it is one that was told of before.

        Some servers make new ids each time. It is one that was not told in this ``way`` yet and that none of the ids
        ``but`` is of: the one at the same ``place``, or else with the same name and arguments.
        """
        text, _ = readable(as_text(arguments))
        free = [call for call in self.functions if way not in call.ways and call.call_id not in but]
        named = [call for call in free if name in (call.name, "", None) or not call.name]
        here = [call for call in named if call is self._places.get(place) and (not text or text.startswith(call.told))]
        same = [call for call in named if call.name and call.arguments == text]
        return next(iter(here or same), None)

    def whole(self, *, is_cut: bool = False) -> list[WholeCall]:
        """Give the functions that are called, without the last where the answer ``is_cut`` within its arguments."""
        found = self.functions
        if is_cut and found and (found[-1].is_cut or not is_object(found[-1].arguments)):
            found = found[:-1]
        return [WholeCall(call.call_id, call.name, call.arguments.strip() or "{}") for call in found]

    def hosted(self, item: Json, place: object, *, is_whole: bool) -> list[Delta]:
        """Give what is told of a tool that the model server executes itself, by an output item of the Responses API;
        nothing for another item, and for what was told before."""
        if (kind := hosted_kind(item)) == "":
            return []
        call = self.of(item.get("id")) or self._hosted_at(place, kind)
        call = call or self.begin(kind, place, item.get("id"))
        deltas = call.named(item.get("id"), item.get("name") or kind)
        if is_whole and not call.told:
            deltas += call.complete(_told(item))
        return deltas

    def _hosted_at(self, place: object, kind: str) -> GrowingCall | None:
        call = self._places.get(place)
        return call if call is not None and call.kind == kind else None


def hosted_kind(item: Json) -> str:
    """Give the word for the tool of the model server that an output item tells of, ``""`` for another item."""
    found = _HOSTED.fullmatch(f"{item.get('type')}")
    return found[1] if found else ""


def _told(item: Json) -> Json:
    told = {name: value for name, value in item.items() if name not in _PLAIN and may_leave(value, name)}
    while told and len(dumps(told)) > _LONGEST_HOSTED:
        told.pop(max(told, key=lambda name: len(dumps(told[name]))))
    return told


def as_text(arguments: object) -> str:
    """Give arguments as a text: some servers have an object there. What is neither is ``""``."""
    return arguments if isinstance(arguments, str) else dumps(arguments) if isinstance(arguments, dict) else ""


def called(calls: Sequence[WholeCall], said: str = "") -> Sequence[Json]:
    """Give what an answer is resent as that says something and then calls something; nothing where it calls nothing."""
    told = tuple(
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
        for call in calls
    )
    return (message_item("assistant", said), *told) if told and said.strip() else told
