"""Server-Sent Events: frames out, frames in. Knows neither Flask nor OpenAI.

The format is the WHATWG HTML standard, section 9.2 "Server-sent events".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

HEADERS: Final[dict[str, str]] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    # The one switch that stops nginx from buffering a response; no-transform does not.
    "X-Accel-Buffering": "no",
}
PING: Final = b"event: ping\ndata: {}\n\n"
# A browser that comes back by itself waits so long; the helper has its own, jittered, delays.
RETRY: Final = b"retry: 1000\n"
DONE: Final = b"event: done\ndata: [DONE]\n\n"


def encode(event: str, data: str, id: str | None = None) -> bytes:
    """Gives one frame. ``data`` may have any characters; each of its lines becomes a ``data:`` line.

    Raises ``ValueError`` when ``event`` or ``id`` has a line end, or ``id`` a NUL: neither can be written.
    """
    for field in (event, id or ""):
        if "\n" in field or "\r" in field or "\0" in field:
            raise ValueError(f"an event name or id holds one line without NUL, got {field!r}")
    head = f"id: {id}\nevent: {event}\n" if id is not None else f"event: {event}\n"
    # Only CR, LF and CRLF end a line here: str.splitlines() would also cut at U+2028 and drop "".
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(re.split("\r\n|\r|\n", data))
    return f"{head}data: {data}\n\n".encode()


class Frame(NamedTuple):
    """One dispatched event: ``event`` is "" where the stream named none."""

    event: str
    data: str


class Decoder:
    """Bytes in, frames out, whatever the chunk boundaries.

    An event whose stream ends before its blank line is dropped, as the standard says.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._event = ""
        self._data: list[str] = []
        self._first = True
        self._skip_lf = False

    def feed(self, chunk: bytes) -> list[Frame]:
        """Takes the next bytes, gives the events that they complete."""
        if self._skip_lf and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._skip_lf = False
        data = self._rest + chunk
        if self._first:
            if len(data) < 3 and b"\xef\xbb\xbf".startswith(data):
                self._rest = data
                return []
            data = data.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        # A CR at the very end ends its line now; an LF that follows in the next chunk belongs to it.
        self._skip_lf = data.endswith(b"\r") or (self._skip_lf and not data)
        lines = _LINE_END.split(data)
        self._rest = lines.pop()
        return list(self._lines(lines))

    def _lines(self, lines: Iterable[bytes]) -> Iterator[Frame]:
        for line in lines:
            if not line:
                if self._data:
                    yield Frame(self._event, "\n".join(self._data))
                self._event, self._data = "", []
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
            elif name == b"event":
                self._event = value.removeprefix(b" ").decode("utf-8", "replace")


_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
