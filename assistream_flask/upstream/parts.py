"""What an answer consists of, the same for the three dialects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from ..errors import RunError
from ..events import Json, clean, dumps


class Turn(NamedTuple):
    """One message of the history. ``role`` is ``user`` or ``assistant``."""

    role: str
    text: str


class Begun(NamedTuple):
    """A background response has its id: :meth:`Upstream.state` is there from now on. Alone in its list, and no text
    came before it."""


class Text(NamedTuple):
    """``value`` goes to the end of content part ``at``."""

    at: int
    value: str


class Refusal(NamedTuple):
    """``value`` goes to the end of the refusal that is content part ``at``."""

    at: int
    value: str


class Annotation(NamedTuple):
    """A citation in text part ``at``."""

    at: int
    value: Json


class Reasoning(NamedTuple):
    """``value`` goes to the end of the summary of the model's reasoning."""

    value: str


class End(NamedTuple):
    """The answer is over. ``reason`` is ``None`` for a complete one, else ``max_tokens`` or ``content_filter``.
    ``usage`` counts tokens, in the words of the Assistants API."""

    reason: str | None
    usage: Json | None


Part = Begun | Text | Refusal | Annotation | Reasoning | End


def merged(parts: Sequence[Part]) -> Sequence[Part]:
    """Gives the same with neighbours joined that go to the same place: one event for what one read brought."""
    if len(parts) < 2:
        return parts
    found: list[Part] = []
    for _, group in groupby(parts, lambda part: (type(part), *part[:-1])):
        first, *more = group
        if more and isinstance(first, Text | Refusal | Reasoning):
            rest = [part.value for part in more if isinstance(part, Text | Refusal | Reasoning)]
            found.append(first._replace(value="".join([first.value, *rest])))
        else:
            found += [first, *more]
    return found


class Translator(Protocol):
    """One dialect's way from events to parts."""

    def feed(self, kind: str, data: Json) -> list[Part]:
        """Takes one event, gives its parts. Raises :class:`RunError`. Ignores what it doesn't know."""
        ...

    def settled(self) -> End | None:
        """Gives the end of an answer whose stream stopped: ``None`` while it is not known to be whole."""
        ...


class Slots:
    """Gives every content part of the upstream an index of ours: dense, in the order of arrival.

    Where a text is cut inside a surrogate pair, the first half waits for the second. What was given is
    counted, so that another process can go on behind it.
    """

    def __init__(self) -> None:
        self._index: dict[tuple[str, object], int] = {}
        self._half: dict[tuple[str, object], str] = {}
        self._told: dict[tuple[str, object], int] = {}
        self._notes: dict[tuple[str, object], int] = {}
        self._skip: dict[tuple[str, object], int] = {}
        self._skip_notes: dict[tuple[str, object], int] = {}

    def state(self) -> list[list[Any]]:
        """Gives all that :meth:`restore` needs, as JSON."""
        return [
            # A lone surrogate is no text that a database takes.
            [*slot, self._index.get(slot), told, self._notes.get(slot, 0), ord(self._half.get(slot, "\0"))]
            for slot, told in self._told.items()
        ]

    def restore(self, state: list[list[Any]], again: bool) -> None:
        """Takes what :meth:`state` gave. With ``again`` the answer will be told from its start, and what was
        given already is left out."""
        for kind, key, at, told, notes, half in state:
            slot = kind, tuple(key) if isinstance(key, list) else key
            if at is not None:
                self._index[slot] = at
            self._told[slot], self._notes[slot] = told, notes
            if again:
                self._skip[slot], self._skip_notes[slot] = told, notes
            elif half:
                self._half[slot] = chr(half)

    def known(self, kind: str, *keys: object) -> object:
        """Gives that of ``keys`` under which something was told, else the first."""
        return next((key for key in keys if (kind, key) in self._told), keys[0])

    def text(self, key: object, value: object) -> list[Part]:
        """Gives the text for the part that ``key`` names."""
        whole = self._whole(("text", key), value)
        return [Text(self._place(("text", key)), whole)] if whole else []

    def refusal(self, key: object, value: object) -> list[Part]:
        """Gives the refusal for the part that ``key`` names."""
        whole = self._whole(("refusal", key), value)
        return [Refusal(self._place(("refusal", key)), whole)] if whole else []

    def annotation(self, key: object, value: object) -> list[Part]:
        """Gives the annotation for the text part that ``key`` names."""
        if not isinstance(value, dict):
            return []
        try:
            # As pages and every database can read it.
            whole: Json = json.loads(dumps(value).replace("\\u0000", "\\ufffd"))
        except (ValueError, TypeError):
            return []
        slot = ("text", key)
        if self._skip_notes.get(slot):
            self._skip_notes[slot] -= 1
            return []
        self._told.setdefault(slot, 0)
        self._notes[slot] = self._notes.get(slot, 0) + 1
        return [Annotation(self._place(slot), whole)]

    def reasoning(self, value: object) -> list[Part]:
        """Gives a piece of the reasoning's summary, of which there is one."""
        whole = self._whole(("reasoning", None), value)
        return [Reasoning(whole)] if whole else []

    def _place(self, slot: tuple[str, object]) -> int:
        return self._index.setdefault(slot, len(self._index))

    def _whole(self, slot: tuple[str, object], value: object) -> str:
        if not isinstance(value, str):
            return ""
        if self._half:
            value = self._half.pop(slot, "") + value
        if not value.isascii() or "\0" in value:
            if "\ud800" <= value[-1] <= "\udbff":
                self._half[slot] = value[-1]
                value = value[:-1]
            # PostgreSQL stores no NUL, and no reader wants one.
            value = clean(value).replace("\0", "\ufffd")
        if self._skip and (skip := self._skip.get(slot)):
            self._skip[slot] = max(0, skip - len(value))
            value = value[skip:]
        self._told[slot] = self._told.get(slot, 0) + len(value)
        return value


def code_of(error: Any) -> str:
    """Gives our code for an upstream's error object (``code``, ``type``)."""
    told = error if isinstance(error, dict) else {}
    words = f"{told.get('code')} {told.get('type')}"
    if "rate_limit" in words or "quota" in words or "429" in words:
        return "rate_limit_exceeded"
    if "api_key" in words or "auth" in words or "permission" in words:
        return "upstream_unauthorized"
    if "context_length" in words:
        return "context_length_exceeded"
    if "invalid" in words or "not_found" in words:
        return "upstream_rejected"
    return "upstream_error"


def failure(data: Any) -> RunError:
    """Gives the error for an ``error`` event, nested (``{"error": {...}}``) or flat."""
    nested = data.get("error") if isinstance(data, dict) else None
    return RunError(code_of(nested if nested is not None else data))


def usage(value: Any) -> Json | None:
    """Gives token counts in the Assistants API's words, from any dialect's."""
    if not isinstance(value, dict):
        return None
    prompt = value.get("prompt_tokens", value.get("input_tokens"))
    completion = value.get("completion_tokens", value.get("output_tokens"))
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    total = value.get("total_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total if isinstance(total, int) else prompt + completion,
    }


REASONS = {"max_output_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "length": "max_tokens"}


def reason(value: Any) -> str:
    """Gives the Assistants API's word for why a message is incomplete."""
    return REASONS.get(value, value) if value in (*REASONS, "content_filter", "max_tokens") else "max_tokens"
