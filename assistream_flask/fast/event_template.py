"""Reads many events of a text at once: they differ in a word and a number."""

from __future__ import annotations

import re
from typing import Any, Final

from pydantic_core import from_json

from .switches import SWITCHES

_HOLE: Final = re.compile(rb'"delta": ?"(?P<text>[^"\\]*)"|"sequence_number": ?(?P<number>[0-9]+)')
# LF too, which parts the texts when this is looked for.
_NO_TEXT: Final = bytes(set(range(0x20)) - {0x0A}) + b'"\\'
# A stream whose events are never alike is given up on after so many templates.
_TRIES: Final = 5
# Those whose ``delta`` is a piece of a text.
_KINDS: Final = frozenset(
    f"response.{what}.delta" for what in ("output_text", "refusal", "reasoning_summary_text", "reasoning_text")
)


def for_stream(joined: bool) -> EventTemplate | None:
    """Give the template of a new stream; ``None`` where its events may not be ``joined``, or templates are off."""
    return EventTemplate() if joined and SWITCHES.is_on("event_template") else None


class EventTemplate:
    """An event of one stream, with a hole for its text and one for its number.

    That another text in the hole is nothing but another text is proven when it is learned; what has no quote, escape
    or control character can then be no more.
    """

    def __init__(self) -> None:
        self._tries = _TRIES
        # What stands before and behind the text, parted where the number is.
        self._head: list[bytes] = []
        self._tail: list[bytes] = []
        # A frame has two lines, and three with a name; which one is the data, and how long is what stands before it.
        self._line, self._lines, self._skip = 0, 2, 0
        # The length of an event without text and number.
        self._least = 0
        self._event: tuple[str, dict[str, Any]] = "", {}
        # That of the last event.
        self._number = 0

    def learn(self, frame: tuple[bytes, bytes], event: tuple[str, dict[str, Any]]) -> None:
        """Learn the last event: its name and text as they came, and what they say."""
        (name, text), (kind, data) = frame, event
        number, last = data.get("sequence_number"), self._number
        self._number = number if type(number) is int and 0 <= number < 1 << 53 else 0
        # A server may give all events the same number.
        counts = self._number != last
        # Data may have come in several lines.
        if not self._tries or kind not in _KINDS or not isinstance(data.get("delta"), str) or b"\n" in text:
            return
        before = b"event: %b\n" % name if name else b""
        digits, line = b"%d" % self._number, before + b"data: " + text + b"\n\n"
        is_known = self._head and line.startswith(digits.join(self._head)) and line.endswith(digits.join(self._tail))
        if is_known and (counts or len(self._head) + len(self._tail) == 2):
            return
        holes = [hole for hole in _HOLE.finditer(text) if counts or hole.lastgroup == "text"]
        names = [hole.lastgroup or "" for hole in holes]
        if names.count("text") != 1 or names.count("number") > 1:
            return
        self._tries -= 1
        ends = [0, *(at for hole in holes for at in hole.span(hole.lastgroup or "")), len(text)]
        fixed = [text[start:end] for start, end in zip(ends[::2], ends[1::2], strict=True)]
        at = names.index("text") + 1
        head, tail = fixed[:at], fixed[at:]
        probed = {**data, "delta": "x" + data["delta"]}
        if len(fixed) > 2:
            probed["sequence_number"] = self._number + 1
        digits = b"%d" % (self._number + 1)
        probe = digits.join(head) + b"x" + data["delta"].encode("utf-8", "replace") + digits.join(tail)
        try:
            if from_json(probe) != probed:
                return
        except ValueError:
            return
        head[0], tail[-1] = before + b"data: " + head[0], tail[-1] + b"\n\n"
        self._head, self._tail, self._event = head, tail, event
        self._line, self._lines, self._skip = (1, 3, len(before)) if name else (0, 2, 0)
        self._least = sum(map(len, head + tail))

    def read(self, data: bytes) -> tuple[str, dict[str, Any]] | None:
        """Give one event for all that ``data`` is, with their texts joined and the rest as in the one that was
        learned; ``None`` where it is anything else than whole events of its kind, numbered one by one."""
        if not self._head:
            return None
        number, skip = self._number, self._skip
        texts: list[bytes] = []
        frames: list[bytes] = []
        lines = data.split(b"\n")[self._line : -1 : self._lines]
        if len(lines) * self._least > len(data):
            return None
        for line in lines:
            number += 1
            digits = b"%d" % number
            head, tail = digits.join(self._head), digits.join(self._tail)
            text = line[len(head) - skip : 2 - len(tail)]
            texts.append(text)
            frames.append(head + text + tail)
        if b"".join(frames) != data:
            return None
        # A line end between them: what is no UTF-8 by itself is none with its neighbour either.
        joined = b"\n".join(texts)
        if len(joined.translate(None, _NO_TEXT)) != len(joined):
            return None
        try:
            whole = joined.decode().replace("\n", "")
        except UnicodeDecodeError:
            return None
        self._number, self._tries = number, _TRIES
        kind, learned = self._event
        return kind, {**learned, "delta": whole}
