"""Where a stream stops before each read, for many streams to be read together."""

from __future__ import annotations

import queue
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from select import POLLIN
from typing import Any, Final, NamedTuple

from gevent import monkey

from ..platform.threads import loop_turn, take_turns
from .switches import SWITCHES

READ_BYTES: Final = 65_536
_SLICE_SECONDS: Final = 0.002
_FLOOD_BYTES: Final = 16_384
_AHEAD_SECONDS: Final = 0.01
_AHEAD: Final = 256
"""So many reads may wait for a stream that is fed: those of sixteen megabytes."""


def in_use(gate: ReadGate | None) -> ReadGate | None:
    """Give the gate where a stream is to stop at it: nowhere while reading in batches is off, so that nothing asks the
    batch scheduler for a turn."""
    return gate if gate is not None and SWITCHES.is_on("batched_reading") else None


def through(source: Iterator[Any], gate: ReadGate | None) -> Iterator[list[Any]]:
    """Give what ``source`` gives in lists, and an empty one before each read where there is a ``gate``."""
    return gate.through(source) if gate is not None else ([item] for item in source)


def readable(numbers: Sequence[int]) -> set[int]:
    """Give those file descriptors that something can be read from, or that are at their end. Does not wait."""
    if not numbers:
        return set()
    # gevent's own lets the whole worker go on before it answers; this one only looks.
    poll = monkey.get_original("select", "poll")()
    for number in numbers:
        poll.register(number, POLLIN)
    return {number for number, _ in poll.poll(0)}


class TimeSlice:
    """Has those take turns of two milliseconds that never have to wait for their next byte: one of them would keep all
    others waiting, and several would if all of them went on before the others do."""

    def __init__(self) -> None:
        self._since, self._turn = time.monotonic(), loop_turn()

    def share(self, *, is_flood: bool = False) -> None:
        """Let the others go on, where it was long ago that they could; for what ``is_flood`` also where it has waited
        itself meanwhile, as for Redis: many of those would go on together."""
        now, turn = time.monotonic(), loop_turn()
        if turn != self._turn and not is_flood:
            self._since, self._turn = now, turn
        elif now - self._since > _SLICE_SECONDS:
            take_turns()
            self._since, self._turn = time.monotonic(), loop_turn()


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
        self.is_flooded = False
        """Whether the last read got as much as only comes of a stream that is faster than it is read."""
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
            self.take(self.socket.recv(READ_BYTES))
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
        self.take(data)
        return True

    def take(self, data: bytes) -> None:
        """Keep what was read, for the stream to go on with."""
        self.data, self.is_flooded = data, len(data) >= _FLOOD_BYTES

    def taken_or(self, read: Callable[[int], bytes]) -> bytes:
        """Give what :meth:`read` read, once, or what ``read`` does now."""
        if self.data is None:
            was_flooded = self.is_flooded
            self.take(read(READ_BYTES))
            # One of TLS gives a record, which may be small.
            self.is_flooded = self.is_flooded or (was_flooded and self._has_more())
        data, self.data = self.data or b"", None
        return data

    def _has_more(self) -> bool:
        number = -1 if self.socket is None else self.socket.fileno()
        return self.pending() or (number >= 0 and bool(readable([number])))

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
                    time.sleep(_AHEAD_SECONDS)
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
