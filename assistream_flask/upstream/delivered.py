"""What of an answer was delivered before, and is left out where the model server tells it once more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from ..events import Json
from ..types import Message, Step
from .deltas import Annotation, Begun, Delta, End, Failed, Reasoning

_REASONING: Final = None
_Slot: TypeAlias = int | tuple[str, int] | None
"""A content part by its index, the annotations of one, or the reasoning."""


class Shown(NamedTuple):
    """What viewers have of an answer: at least what its state counts, and more where a worker was lost before it
    stored the state."""

    message: Message
    steps: Sequence[Step]

    def _counts(self) -> Counter[_Slot]:
        counts: Counter[_Slot] = Counter()
        for at, part in enumerate(self.message["content"]):
            if part["type"] == "refusal":
                counts[at] = len(part["refusal"])
            else:
                counts[at] = len(part["text"]["value"])
                counts["notes", at] = len(part["text"]["annotations"])
        counts[_REASONING] = sum(len(step["step_details"]["reasoning"]["text"]) for step in self.steps)
        return counts


def _counted(state: Json) -> Counter[_Slot]:
    """Count what was given out behind a state of :meth:`.AnswerStream.state`."""
    counts: Counter[_Slot] = Counter()
    for kind, _, at, told, notes, _ in state["slots"]:
        if kind == "reasoning":
            counts[_REASONING] += told
        elif at is not None:
            counts[at] += told
            counts["notes", at] += notes
    mark = state.get("mark")
    if mark is not None and mark["at"] is not None:
        # Counted as told, and given to nobody.
        counts[mark["at"]] -= mark["cut"] + len(mark["held"])
    return counts


class Delivered:
    """Leaves out what was delivered of an answer behind ``state``, by counting the characters of each part.

    The model server tells the answer ``from_start``, or goes on behind the state. ``shown`` is what was delivered;
    without it that is what the state counts.
    """

    def __init__(self, state: Json, shown: Shown | None, *, from_start: bool) -> None:
        counted = _counted(state)
        self._left = shown._counts() if shown is not None else counted.copy()
        if not from_start:
            self._left.subtract(counted)
        self.is_past = False
        """Whether anything new came."""

    def rest(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Give what is new in ``deltas``."""
        found = [new for part in deltas if (new := self._new(part)) is not None]
        self.is_past = self.is_past or bool(found)
        return found

    def _new(self, part: Delta) -> Delta | None:
        if isinstance(part, End | Begun | Failed):
            return part
        if isinstance(part, Annotation):
            return None if self._skip(("notes", part.at), 1) else part
        skipped = self._skip(_REASONING if isinstance(part, Reasoning) else part.at, len(part.value))
        return part._replace(value=part.value[skipped:]) if skipped < len(part.value) else None

    def _skip(self, slot: _Slot, most: int) -> int:
        skipped = max(0, min(self._left[slot], most))
        self._left[slot] -= skipped
        return skipped
