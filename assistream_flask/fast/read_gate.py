"""Where a stream stops before each read, for many streams to be read together."""

from __future__ import annotations

import queue
import ssl
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from .switches import SWITCHES

READ_BYTES: Final = 65_536
_TURN_SECONDS: Final = 0.01
_AHEAD: Final = 256
"""So many reads may wait for a stream that is fed: those of sixteen megabytes."""


def in_use(gate: ReadGate | None) -> ReadGate | None:
    """Give the gate where a stream is to stop at it: nowhere while reading in batches is off, so that nothing asks the
    batch scheduler for a turn."""
    return gate if gate is not None and SWITCHES.is_on("batched_reading") else None


def through(source: Iterator[Any], gate: ReadGate | None) -> Iterator[list[Any]]:
    """Give what ``source`` gives in lists, and an empty one before each read where there is a ``gate``."""
    return gate.through(source) if gate is not None else ([item] for item in source)


class TimeSlice:
    """Yields to other greenlets every ten milliseconds: one that never has to wait for its next byte would keep them
    all waiting."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def share(self) -> None:
        """Let the others go on, where it was long ago that they could."""
        if time.monotonic() - self._since > _TURN_SECONDS:
            time.sleep(0)
            self._since = time.monotonic()


class _End(NamedTuple):
    error: Exception | None


class ReadGate:
    """The reader of a stream stops here; the batch scheduler calls :meth:`read`, and the reader goes on with that data.
    It comes from the ``socket``, or, where the stream has a ``source`` of its own, from that, which :meth:`feed` reads
    in a thread. A reader that goes on without a :meth:`read` waits for the network itself."""

    def __init__(self) -> None:
        self.socket: Any = None
        self.data: bytes | None = None
        self.source: Iterator[Any] | None = None
        self.is_fed = False
        self.is_left = False
        """Whether nobody takes what is fed any more."""
        # How much of the source the stream took last.
        self.taken = 0
        self._fed: deque[Any] = deque()
        self._hungry = False
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def can_wait(self) -> bool:
        """Tell whether there is something that :meth:`read` can read now or later."""
        return self.is_fed or self.socket is not None

    def read(self) -> bool:
        """Read, for the stream to go on with, what a poll or :meth:`pending` saw; give ``False`` where that is less
        than TLS can decrypt. Does not wait."""
        if self.socket is None:
            return self.pending()
        if not isinstance(self.socket, ssl.SSLSocket):
            self.data = self.socket.recv(READ_BYTES)
            return True
        limit = self.socket.gettimeout()
        self.socket.settimeout(0)
        data = b""
        try:
            # One gives a record, and there may be one a token.
            while len(data) < READ_BYTES and (more := self.socket.recv(READ_BYTES)):
                data += more
        except OSError as error:
            if not data:
                if isinstance(error, ssl.SSLWantReadError):
                    return False
                raise
        finally:
            self.socket.settimeout(limit)
        self.data = data
        return True

    def pending(self) -> bool:
        """Tell whether there is something to read that a poll of the socket does not see."""
        if self.socket is None:
            return bool(self._fed)
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0

    def through(self, source: Iterator[Any]) -> Iterator[list[Any]]:
        """Give what ``source`` gives, and an empty list before each read. Raises what ``source`` does."""
        self.source = source
        while True:
            yield []
            if not self.is_fed:
                for item in source:
                    yield [item]
                    break
                else:
                    return
                continue
            found = self._take()
            end = found.pop() if isinstance(found[-1], _End) else None
            self.taken = len(found)
            if found:
                yield found
            if end is not None:
                # What comes behind the stream may wait: that is for its reader.
                self.source, self.is_fed = None, False
                yield []
                if end.error is not None:
                    raise end.error
                return

    def feed(self) -> None:
        """Read the source to its end, for the stream. Call it in a thread of its own, after ``is_fed`` is set."""
        assert self.source is not None
        turn = TimeSlice()
        try:
            for item in self.source:
                self._give(item)
                turn.share()
                # A model server may send faster than all of it is told.
                while len(self._fed) >= _AHEAD and not self.is_left:
                    time.sleep(_TURN_SECONDS)
        except Exception as error:
            self.stop(error)
        else:
            self.stop()

    def stop(self, error: Exception | None = None) -> None:
        """Tell the stream that nobody reads the source any more, because of ``error`` or at its end."""
        self._give(_End(error))

    def _give(self, item: object) -> None:
        self._fed.append(item)
        if self._hungry:
            self._hungry = False
            self._bell.put(None)

    def _take(self) -> list[Any]:
        while not self._fed:
            self._hungry = True
            # It may have come meanwhile.
            if not self._fed:
                self._bell.get()
        return [self._fed.popleft() for _ in range(len(self._fed))]
