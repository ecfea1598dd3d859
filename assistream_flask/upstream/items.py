"""What a model is sent of a thread: turns that every server takes, whichever dialect it speaks.

Strict chat templates want a user's and an assistant's turns by turns, a user's first and last, and none without words
(``"Conversation roles must alternate user/assistant"``). A thread has several assistants, several messages in a row,
answers that failed or say nothing. :func:`turns_of` tells who said what, :func:`closed` makes of it what is sent.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from ..errors import ConfigurationError
from ..events import Said
from .deltas import Begun, Delta, Reasoning, Text

BEGIN: Final = "Begin."
"""What an assistant is asked that speaks before any user did: servers refuse an empty history."""
GO_ON: Final = "Go on."
"""What one is asked that spoke last itself."""
AGAIN: Final = "That answer was cut short. Give it again, whole."
"""The same, where its last answer was not whole."""

_TAG: Final = "other-assistant"
# Anyone could write such a mark; in what others than us wrote it is no mark.
_FORGED: Final = re.compile(rf"<(?=\s*/?\s*{_TAG}\b)", re.IGNORECASE)


class Turn(NamedTuple):
    """One turn of the history. ``role`` is ``user`` or ``assistant``."""

    role: str
    text: str


class Limit(NamedTuple):
    """So much of a history is sent, the oldest messages left out; the newest is sent in any case."""

    characters: int
    messages: int

    def within(self, asked: object) -> Limit:
        """Give the limit of an assistant's ``max_history``; what that does not limit is as in this one."""
        return self._replace(**asked) if isinstance(asked, Mapping) else self

    def of(self, said: Sequence[Said]) -> Sequence[Said]:
        """Give the newest of ``said`` that are within the limit."""
        left, start = self.characters, len(said)
        for at in range(len(said) - 1, max(-1, len(said) - 1 - self.messages), -1):
            left -= len(said[at].text)
            if left < 0 and start < len(said):
                break
            start = at
        return said[start:]


Shorten: TypeAlias = Callable[[list[dict[str, Any]]], Sequence[Mapping[str, Any]]]
"""An app's own way to shorten a history: takes ``[{"role", "assistant_id", "content"}...]``, oldest first, gives those
to send."""


def shortened(said: Sequence[Said], shorten: Shorten) -> list[Said]:
    """Give what the app's ``shorten`` leaves of ``said``.

    Raises :class:`ConfigurationError` for what is no history.
    """
    roles = {True: "user", False: "assistant"}
    given = [{"role": roles[one.speaker is None], "assistant_id": one.speaker, "content": one.text} for one in said]
    whole = {id(one): origin for one, origin in zip(given, said, strict=True)}
    found: list[Said] = []
    for one in shorten(list(given)):
        text = one.get("content") if isinstance(one, Mapping) else None
        if not isinstance(text, str):
            raise ConfigurationError(
                f"max_history gave {type(one).__name__!r} for a message: give those that it was called with, or "
                '{"role", "assistant_id", "content"} with a text for content'
            )
        if one.get("role", "user") != ("user" if one.get("assistant_id") is None else "assistant"):
            raise ConfigurationError(
                f"max_history gave a message with the role {one.get('role')!r} and the assistant_id "
                f"{one.get('assistant_id')!r}: give 'user' without, or 'assistant' with an assistant_id"
            )
        kept = whole.get(id(one))
        found.append(Said(one.get("assistant_id"), text, kept is None or kept.is_whole))
    return found


class Names(Protocol):
    """What assistants are called, by their ids."""

    def get(self, assistant_id: str, otherwise: str, /) -> str:
        """Give the name, ``otherwise`` where it is not known."""


def turns_of(said: Sequence[Said], assistant_id: str, names: Names, *, is_cut: bool = False) -> list[Turn]:
    """Give the turns that the assistant is to see: its own messages as an assistant's, all others as a user's, those
    of other assistants between marks with their name, and at the end something for it to answer.

    ``is_cut`` says that older messages were left out.
    """
    turns: list[Turn] = []
    last: Said | None = None
    for one in said:
        if not one.text.strip():
            continue
        last = one
        if one.speaker == assistant_id:
            turns.append(Turn("assistant", one.text))
        else:
            text = _FORGED.sub("&lt;", one.text)
            turns.append(
                Turn("user", text if one.speaker is None else marked(names.get(one.speaker, one.speaker), text))
            )
    if is_cut:
        # Half a conversation begins with a question.
        first = next((at for at, turn in enumerate(turns) if turn.role == "user"), 0)
        turns = turns[first:]
    if last is not None and last.speaker == assistant_id:
        turns.append(Turn("user", GO_ON if last.is_whole else AGAIN))
    return turns


def closed(turns: Sequence[Turn], system: str | None = None) -> list[Turn]:
    """Give ``turns`` as every server takes them: by turns, a user's first and last, none blank. ``system`` is folded
    into the first one."""
    said = [turn for turn in turns if turn.text.strip()]
    if not said or said[0].role != "user":
        said.insert(0, Turn("user", BEGIN))
    if said[-1].role != "user":
        said.append(Turn("user", GO_ON))
    if system is not None and system.strip():
        said.insert(0, Turn("user", system))
    return [
        Turn(role, "\n\n".join(turn.text for turn in group)) for role, group in groupby(said, lambda turn: turn.role)
    ]


def marked(name: str, text: str) -> str:
    """Give another assistant's message as a part of a user's turn: a model takes every assistant's turn for its own
    words, and some servers continue the last one."""
    return f'<{_TAG} name="{html.escape(name)}">\n{text}\n</{_TAG}>'


class Unmark:
    """Takes off the mark that a model puts before its answer, because it saw such before others'.

    What may be the beginning of one is held back until more of it comes.
    """

    def __init__(self, names: Sequence[str], state: Mapping[str, Any] | None = None) -> None:
        self._names = own = [name for name in names if name]
        # Behind the first kind comes a blank or a colon: a link is none, nor is "[x] " of a list of things to do.
        ends = ("\n", ":", " \n", "\r\n")
        self._marks = [f"[{name}]{end}" for name in own for end in (ends if len(name) < 3 else (*ends, " "))]
        self._marks += [f'<{_TAG} name="{html.escape(name)}">' for name in own]
        self._held = ""
        self._cut = 0
        self._at: int | None = None
        # Whether a mark was taken off, and whether anything was said behind it.
        self._is_within = self._has_begun = False
        self.is_over = False
        if state is not None:
            self._held, self._cut, self._at = state["held"], state["cut"], state["at"]
            self._is_within, self._has_begun, self.is_over = state["within"], state["begun"], state["over"]

    def state(self) -> dict[str, Any]:
        """Give how far this is, as JSON. ``cut`` and ``held`` are what was told to nobody."""
        return {
            # The assistant may have others by the time at which its answer is told again.
            "names": self._names,
            "held": self._held,
            "cut": self._cut,
            "at": self._at,
            "within": self._is_within,
            "begun": self._has_begun,
            "over": self.is_over,
        }

    def take(self, parts: Sequence[Delta]) -> list[Delta]:
        """Give ``parts`` without the mark."""
        found: list[Delta] = []
        for part in parts:
            if isinstance(part, Text) and not self.is_over and self._at in (None, part.at):
                self._at = part.at
                if text := self._text(part.value):
                    found.append(Text(part.at, text))
                continue
            if not isinstance(part, Reasoning | Begun):
                # Nothing comes any more that could make it a mark.
                found += self.rest()
            found.append(part)
        return found

    def rest(self) -> list[Delta]:
        """Give what was held back."""
        held, self._held, self.is_over = self._held, "", True
        return [Text(self._at, held)] if held and self._at is not None else []

    def _text(self, value: str) -> str:
        value, self._held = self._held + value, ""
        if not self._is_within:
            bare = value.lstrip()
            mark = next((mark for mark in self._marks if bare.startswith(mark)), None)
            if mark is None:
                if any(one.startswith(bare) for one in self._marks):
                    self._held = value
                    return ""
                self.is_over = True
                return value
            self._cut += len(value) - len(bare) + len(mark)
            value, self._is_within = bare[len(mark) :], True
        if not self._has_begun:
            bare = value.lstrip(": \t\r\n")
            self._cut += len(value) - len(bare)
            value, self._has_begun = bare, bool(bare)
        return self._ended(value)

    def _ended(self, value: str) -> str:
        """Give the text behind a mark without the mark's end, which may be cut."""
        end = f"</{_TAG}>"
        found = value.replace(end, "")
        self._cut += len(value) - len(found)
        at = found.rfind("<")
        if at >= 0 and end.startswith(found[at:]):
            found, self._held = found[:at], found[at:]
        return found
