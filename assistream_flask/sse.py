"""Server-Sent Events: frames out, frames in. Knows neither Flask nor OpenAI.

The format is the WHATWG HTML standard, section 9.2 "Server-sent events".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

HEADERS: Final[dict[str, str]] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Content-Type-Options": "nosniff",
    # The one switch that stops nginx from buffering a response; no-transform does not.
    "X-Accel-Buffering": "no",
}
PING: Final = b"event: ping\ndata: {}\n\n"
# A browser that comes back by itself waits so long; the helper has its own, jittered, delays.
RETRY: Final = b"retry: 1000\n"
DONE: Final = b"event: done\ndata: [DONE]\n\n"


def encode(event: str, data: str, id: str | None = None) -> bytes:
    """Give one frame. ``data`` may have any characters; each of its lines becomes a ``data:`` line.

    Raises ``ValueError`` when ``event`` or ``id`` has a line end, or ``id`` a NUL: neither can be written.
    """
    if _UNFIT.search(f"{event}{id}"):
        raise ValueError(f"an event name or id holds one line without NUL, got {event!r} and {id!r}")
    # The id comes last: a reader that takes it when its line is read, as @microsoft/fetch-event-source does, and loses
    # the connection before the blank line, asks for what comes after an event that it never dispatched.
    end = f"\nid: {id}\n\n" if id is not None else "\n\n"
    # Only CR, LF and CRLF end a line here: str.splitlines() would also cut at U+2028 and drop "".
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(re.split("\r\n|\r|\n", data))
    return f"event: {event}\ndata: {data}{end}".encode()


class Frame(NamedTuple):
    """One dispatched event: ``event`` is "" where the stream named none."""

    event: str
    data: str


class TooLongError(ValueError):
    """An event has more bytes than it may have, and is not over."""


class Decoder:
    """Bytes in, frames out, whatever the chunk boundaries, in time and memory that grow with the bytes alone.

    An event whose stream ends before its blank line is dropped, as the standard says. ``longest`` is how many bytes are
    kept of one that is not whole, its lines counted as a little more than they are.
    """

    def __init__(self, longest: float = float("inf")) -> None:
        self._longest = longest
        # What no blank line, or no line end, came behind yet.
        self._rest = bytearray()
        self._event = b""
        self._data: list[bytes] = []
        # How much the lines have that were taken of an event.
        self._taken = 0
        self._first = True
        self._skip_lf = False
        self.between = False
        """Whether nothing of a frame has come."""

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take the next bytes, give the events that they complete. What is no UTF-8 becomes U+FFFD."""
        return [
            Frame(name.decode("utf-8", "replace"), data.decode("utf-8", "replace")) for name, data in self.split(chunk)
        ]

    def split(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        """Do the same, and give name and data as they came. Raises :class:`TooLongError`."""
        # Nearly all that is read is whole frames of the one form.
        frames = _whole_frames(chunk) if self.between else []
        if not frames:
            frames = self._split(chunk)
            if self.held > self._longest:
                raise TooLongError(f"an event has more than {self._longest} bytes")
            self.between = not (self._first or self._rest or self._event or self._data or self._skip_lf)
        return frames

    @property
    def held(self) -> int:
        """Give how many bytes are kept of an event that is not whole, its lines counted as a little more."""
        return len(self._rest) + self._taken

    def _split(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        if b"\n" not in chunk and b"\r" not in chunk and not self._first:
            # Looked through once, however many reads a long line takes.
            self._rest += chunk
            return []
        data = bytes(self._rest) + chunk if self._rest else chunk
        if self._first:
            if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                self._rest = bytearray(data)
                return []
            data = data.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        # A CR at the very end ends its line now; an LF that follows in the next chunk belongs to it.
        self._skip_lf = data.endswith(b"\r") or (self._skip_lf and not data)
        if b"\r" in data or self._data or self._event:
            return self._take(_LINE_END.split(data))
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            if len(data) > _WHOLE_BYTES:
                # It would be looked through anew with each read otherwise.
                return self._take(data.split(b"\n"))
            self._rest = bytearray(data)
            return []
        self._rest = bytearray(data[end:])
        return _whole_frames(data[:end]) or list(self._lines(data[:end].split(b"\n")[:-1]))

    def _take(self, lines: list[bytes]) -> list[tuple[bytes, bytes]]:
        """Take lines, of which the last has no end yet."""
        self._rest = bytearray(lines.pop())
        return list(self._lines(lines))

    def _lines(self, lines: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for line in lines:
            if not line:
                if self._data:
                    yield self._event, b"\n".join(self._data)
                self._event, self._data, self._taken = b"", [], 0
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._taken += len(line) + _LINE_BYTES
            elif name == b"event":
                self._taken += len(line)
                self._event = value.removeprefix(b" ")
            elif name and (others := self.other(line)):
                # What stands before it was no part of it.
                if self._data:
                    yield self._event, b"\n".join(self._data)
                    self._event, self._data, self._taken = b"", [], 0
                yield from others

    def other(self, line: bytes) -> Iterable[tuple[bytes, bytes]]:
        """Give the events that a line stands for which is no part of one; none, as the standard says."""
        return ()


def _whole_frames(data: bytes) -> list[tuple[bytes, bytes]]:
    """Give the frames of ``data`` where it is nothing but whole ones of a name and a line."""
    if b"\r" in data:
        return []
    frames: list[tuple[bytes, bytes]] = _FRAME.findall(data)
    # Each has three line ends and begins a line: with no other line end, nothing stands before, between or behind them.
    return frames if data.count(b"\n") == 3 * len(frames) and data.endswith(b"\n") else []


# An event that comes in several reads is looked through as a whole up to so many bytes, which is faster than by lines.
_WHOLE_BYTES: Final = 16_384
# What a line takes beside its bytes.
_LINE_BYTES: Final = 64
# Without CR in its sets this is five times as fast.
_FRAME: Final = re.compile(rb"^event: ([^\n]*)\ndata: ([^\n]*)\n\n", re.MULTILINE)
_UNFIT: Final = re.compile("[\r\n\0]")
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
