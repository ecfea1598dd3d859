"""What of an answer was delivered before, and is left out where the model server tells it once more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from ..events import Json
from ..types import Message, Step, ToolCall
from .deltas import Annotation, Begun, Call, Delta, End, Failed, Reasoning

_REASONING: Final = None
_Where: TypeAlias = int | tuple[str, int] | None
"""A content part by its index, the annotations of one, the arguments of a tool call, or the reasoning."""


class Shown(NamedTuple):
    """What viewers have of an answer: at least what its state counts, and more where a worker was lost before it
    stored the state. The message may have parts of earlier answers, before part ``start``; ``steps`` are its own."""

    message: Message
    steps: Sequence[Step]
    start: int = 0

    def counts(self) -> Counter[_Where]:
        """Count its characters and annotations."""
        counts: Counter[_Where] = Counter()
        for at, part in list(enumerate(self.message["content"]))[self.start :]:
            if part["type"] == "refusal":
                counts[at] = len(part["refusal"])
            else:
                counts[at] = len(part["text"]["value"])
                counts["notes", at] = len(part["text"]["annotations"])
        for details in (step["step_details"] for step in self.steps):
            if details["type"] == "reasoning":
                counts[_REASONING] += len(details["reasoning"]["text"])
        for at, call in enumerate(self._calls()):
            counts["call", at] = len(call["function"]["arguments"])
        return counts

    def named(self) -> set[int]:
        """Give the numbers of the calls that have a name."""
        return {at for at, call in enumerate(self._calls()) if call["function"]["name"]}

    def _calls(self) -> list[ToolCall]:
        calls: list[ToolCall] = []
        for details in (step["step_details"] for step in self.steps):
            if details["type"] == "tool_calls":
                calls += details["tool_calls"]
        return calls


def _counted(state: Json) -> Counter[_Where]:
    """Count what was given out behind a state of :meth:`.AnswerStream.state`."""
    counts: Counter[_Where] = Counter()
    for kind, _, at, told, notes, _ in state["slots"]:
        if kind == "reasoning":
            counts[_REASONING] += told
        elif at is not None:
            counts[at] += told
            counts["notes", at] += notes
    for at, call in enumerate(_calls(state)):
        counts["call", at] = sum(map(len, call[3]))
    mark = state.get("mark")
    if mark is not None and mark["at"] is not None:
        # Counted as told, and given to nobody.
        counts[mark["at"]] -= mark["cut"] + len(mark["held"])
    return counts


def _calls(state: Json) -> list[list[Any]]:
    # Workers of older releases know of none.
    found: list[list[Any]] = state.get("calls", {}).get("all", [])
    return found


class Delivered:
    """Leaves out what was delivered of an answer, by counting the characters of each part.

    The answer is told behind ``state``, or :meth:`from_start`. ``shown`` is what was delivered; without it that is what
    the state counts.
    """

    def __init__(self, state: Json, shown: Shown | None) -> None:
        counted = _counted(state)
        # All that was delivered, and how much of it is to come once more.
        self._all = shown.counts() if shown is not None else counted.copy()
        self._left = self._all.copy()
        self._left.subtract(counted)
        # The calls of which more than their arguments was delivered.
        self._named = shown.named() if shown is not None else {at for at, one in enumerate(_calls(state)) if one[2]}
        self.characters = sum(count for where, count in self._all.items() if not _is_note(where))
        """How many characters were delivered, when the answer was gone on with."""
        self.is_past = False
        """Whether anything new came."""

    def from_start(self, state: Json) -> None:
        """Take note that the answer is told from its start now, whose mark is taken off as far as ``state`` says."""
        self._left = self._all.copy()
        mark = state.get("mark")
        if mark is not None and mark["over"] and mark["at"] is not None:
            self._left[mark["at"]] += mark["cut"]

    def rest(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Give what is new in ``deltas``."""
        found = [new for delta in deltas if (new := self._new(delta)) is not None]
        self.is_past = self.is_past or bool(found)
        return found

    def _new(self, delta: Delta) -> Delta | None:
        if isinstance(delta, End | Begun | Failed):
            return delta
        if isinstance(delta, Annotation):
            return None if self._skip(("notes", delta.at), 1) else delta
        if isinstance(delta, Call):
            skipped = self._skip(("call", delta.at), len(delta.value))
            is_known = delta.at in self._named and skipped == len(delta.value)
            return None if is_known else delta._replace(value=delta.value[skipped:])
        skipped = self._skip(_REASONING if isinstance(delta, Reasoning) else delta.at, len(delta.value))
        return delta._replace(value=delta.value[skipped:]) if skipped < len(delta.value) else None

    def _skip(self, where: _Where, count: int) -> int:
        """Count what comes; give how much of it was delivered before."""
        skipped = max(0, min(self._left[where], count))
        self._left[where] -= skipped
        self._all[where] += count - skipped
        return skipped


def _is_note(where: _Where) -> bool:
    return isinstance(where, tuple) and where[0] == "notes"
