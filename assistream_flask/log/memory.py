"""The log in this process's memory: for one worker, and gone when it ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from .. import sse
from ..events import Event, dumps
from ..platform.log_throttle import LogThrottle
from .cursor import Cursor
from .protocol import GONE_SECONDS, REFUSED, AppendRequest, Claim, EventId, PositionExpiredError, Record
from .thread_buffer import ThreadBuffer, ThreadBuffers


class MemoryLog:
    """Keeps at most ``max_events`` and ``max_bytes`` a thread, none older than ``max_age`` seconds, see :class:`..Log`;
    and of all threads together about ``max_memory`` bytes.

    ``clock`` gives seconds and is for tests.
    """

    shared = False

    def __init__(
        self,
        *,
        max_events: int = 10_000,
        max_bytes: int = 8 << 20,
        max_memory: int = 128 << 20,
        max_age: float = 600,
        clock: Callable[[], float] = time.monotonic,
        throttle: LogThrottle | None = None,
    ) -> None:
        self._max_events, self._max_bytes, self._max_age = max_events, max_bytes, max_age
        self._max_memory, self._unlooked = max_memory, 0
        self._threads = ThreadBuffers(lambda: ThreadBuffer(_epoch()), clock, throttle)

    def append(self, thread_id: str, events: Sequence[Event], claim: Claim | None = None) -> EventId:
        return self._append(thread_id, events, claim) or self.end(thread_id)

    def _append(
        self, thread_id: str, events: Sequence[Event], claim: Claim | None = None, is_last: bool = False
    ) -> EventId | None:
        buffer = self._threads.enter(thread_id)
        try:
            with buffer.guard:
                if claim is not None and claim.number < buffer.claims.get(claim.run_id, 0):
                    return REFUSED
                if buffer.gone:
                    return None
                epoch, offset = buffer.event_id
                told = []
                for name, data, key in events:
                    offset += 1
                    told.append((name, key, sse.encode(name, dumps(data), f"{epoch}-{offset}")))
                before = buffer.memory
                buffer.add(self._threads.clock(), told)
                self._unlooked += buffer.memory - before
                buffer.trim(1 if is_last else self._max_events, self._max_bytes, 0)
                buffer.gone, event_id = is_last, buffer.event_id
            buffer.wake()
            return event_id
        finally:
            self._threads.leave(buffer)
            # To look at all threads each time would cost more than all else.
            if self._unlooked > self._max_memory // 16:
                self._unlooked = 0
                self._shed()

    def _shed(self) -> None:
        """Drop records where there are too many bytes of them: of threads that nobody uses first, the longest unused
        before the others. Their viewers come back to a snapshot."""
        buffers = sorted((buffer for _, buffer in self._threads.all()), key=lambda one: (one.users > 0, one.touched))
        excess = sum(buffer.memory for buffer in buffers) - self._max_memory
        for buffer in buffers:
            if excess <= 0:
                return
            with buffer.guard:
                before = buffer.memory
                buffer.trim(self._max_events, max(0, buffer.size - excess) if buffer.users else 0, 0)
                excess -= before - buffer.memory

    def append_all(self, told: Sequence[AppendRequest]) -> Sequence[EventId | None]:
        # Nobody else can take a lock.
        return [self._append(*one[:3]) for one in told]

    def forget(self, thread_id: str, last: Event) -> None:
        self._append(thread_id, [last], is_last=True)

    def fence(self, thread_id: str, claim: Claim) -> None:
        with self._threads.using(thread_id) as buffer, buffer.guard:
            buffer.claims[claim.run_id] = max(claim.number, buffer.claims.get(claim.run_id, 0))

    def end(self, thread_id: str) -> EventId:
        with self._threads.using(thread_id) as buffer:
            return buffer.event_id

    def end_unless_locked(self, thread_id: str) -> EventId | None:
        with self._threads.using(thread_id) as buffer, buffer.guard:
            return None if buffer.held else buffer.event_id

    def since(self, thread_id: str, event_id: EventId) -> list[Record]:
        with self._threads.using(thread_id) as buffer, buffer.guard:
            return buffer.since(event_id)

    def recover(self, thread_id: str, event_id: EventId, run_id: str) -> tuple[list[Record], EventId]:
        # Whoever could lose a run has this log too.
        records = self.since(thread_id, event_id)
        end = records[-1].event_id if records else event_id
        return [record for record in records if record.key == run_id], end

    def subscribe(self, thread_id: str, event_id: EventId) -> Cursor:
        buffer = self._threads.enter(thread_id)
        with buffer.guard:
            found = buffer.has(event_id)
        if not found:
            self._threads.leave(buffer)
            raise PositionExpiredError
        return Cursor(self._threads, buffer, event_id)

    @contextmanager
    def lock(self, thread_id: str) -> Iterator[None]:
        with self._threads.using(thread_id) as buffer, buffer.lock:
            buffer.held += 1
            try:
                yield
            finally:
                buffer.held -= 1

    def viewed(self) -> list[str]:
        return self._threads.used()

    def restart(self, thread_id: str, *, keep: bool = False, holes: Collection[str] = ()) -> None:
        with self._threads.using(thread_id) as buffer:
            with buffer.guard:
                if not buffer.gone:
                    buffer.restart(EventId(_epoch(), 0))
            buffer.wake()

    def signal(self, thread_id: str) -> None:
        """Do nothing: nobody else hears."""

    def listen(self, attend: Callable[[str], None]) -> None:
        """Do nothing: nobody else signals."""

    def tend(self) -> None:
        now = self._threads.clock()
        for thread_id, buffer in self._threads.all():
            oldest = now - (GONE_SECONDS if buffer.gone else self._max_age)
            with buffer.guard:
                buffer.trim(self._max_events, self._max_bytes, oldest)
            self._threads.drop(
                thread_id,
                unless=lambda buffer, oldest=oldest: bool(buffer.records) or buffer.touched >= oldest,  # type: ignore[misc]
            )

    def wake(self) -> None:
        self._threads.wake()

    def close(self) -> None:
        self.wake()


def _epoch() -> str:
    return secrets.token_hex(4)
