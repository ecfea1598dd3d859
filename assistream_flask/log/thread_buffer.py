"""The newest records of one thread in this process, shared by all its readers."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from gevent import monkey

from ..platform.log_throttle import LogThrottle
from .protocol import EventId, PositionExpiredError, Record

_SWEEP_SECONDS: Final = 0.5
_RECORD_BYTES: Final = 140
"""What Python takes for a record beside its frame."""
Bell: TypeAlias = "queue.SimpleQueue[bool]"


def plain_lock() -> threading.RLock:
    """Give a lock for sections in which nothing waits: gevent's own costs more than most of them.

    It may be taken again, by what the garbage collector tidies up in the midst of one.
    """
    lock: threading.RLock = monkey.get_original("_thread", "RLock")()
    return lock


class Reader(Protocol):
    """Who waits for records."""

    def wake(self) -> None:
        """Have the reader go on. Must not wait."""


class ThreadBuffer:
    """Records without a gap up to ``event_id``.

    ``lock`` is the thread's lock, for changes that span store and log; ``held`` is how many times its holder took it,
    ``token`` proves to Redis that it is this worker's. ``guard`` is for the records, of which a thread that is ``gone``
    gets no more, and the ``claims``: of each run that had more than one holder, which is the present one. ``users`` and
    ``touched`` are the registry's.
    """

    def __init__(self, epoch: str) -> None:
        self.event_id = EventId(epoch, 0)
        # Time, name, key, frame. Exact tuples of such are nothing that the garbage collector would look at again:
        # half a million records as objects hold a worker up for 150 ms, these for 10.
        self.records: deque[tuple[float, str, str | None, bytes]] = deque()
        self.size = 0
        self.claims: dict[str, int] = {}
        self.users = 0
        self.touched = 0.0
        self.lock = threading.RLock()
        self.held = 0
        self.token = b""
        self.gone = False
        self.guard = plain_lock()
        self._readers: list[Reader] = []

    @property
    def memory(self) -> int:
        """Give about how many bytes of memory the records take."""
        return self.size + _RECORD_BYTES * len(self.records)

    def wait(self, reader: Reader) -> None:
        """Have ``reader`` woken at the next change. The caller holds ``guard``."""
        self._readers.append(reader)

    def wake(self) -> None:
        """Wake all who wait."""
        with self.guard:
            readers, self._readers = self._readers, []
        for reader in readers:
            reader.wake()

    def forget(self, reader: Reader) -> None:
        """Wake ``reader`` no more."""
        with self.guard:
            if reader in self._readers:
                self._readers.remove(reader)

    def restart(self, event_id: EventId) -> None:
        """Forget all records: the log begins anew, or goes on behind a gap."""
        self.records.clear()
        self.size = 0
        self.event_id = event_id

    def add(self, at: float, told: Sequence[tuple[str, str | None, bytes]]) -> None:
        """Add name, key and frame of the next records; ``at`` is their time."""
        for name, key, frame in told:
            self.records.append((at, name, key, frame))
            self.size += len(frame)
        epoch, offset = self.event_id
        self.event_id = EventId(epoch, offset + len(told))

    def trim(self, max_events: int, max_bytes: int, oldest: float) -> None:
        """Keep the newest records: so many, of so many bytes, none older."""
        records = self.records
        while records and (len(records) > max_events or self.size > max_bytes or records[0][0] < oldest):
            self.size -= len(records.popleft()[3])

    def has(self, event_id: EventId) -> bool:
        """Tell whether all records after ``event_id`` are here."""
        return event_id.epoch == self.event_id.epoch and 0 <= self.event_id.offset - event_id.offset <= len(
            self.records
        )

    def since(self, event_id: EventId, size: float = float("inf")) -> list[Record]:
        """Give the records after ``event_id``, up to about ``size`` bytes. Raises :class:`PositionExpiredError`."""
        if not self.has(event_id):
            raise PositionExpiredError
        epoch, offset = self.event_id
        if event_id.offset == offset - 1:
            _, name, key, frame = self.records[-1]
            return [Record(self.event_id, name, key, frame)]
        # From the right: the newest few are what nearly every reader wants.
        newest = list(islice(reversed(self.records), offset - event_id.offset))[::-1]
        found: list[Record] = []
        for at, (_, name, key, frame) in enumerate(newest, event_id.offset + 1):
            found.append(Record(EventId(epoch, at), name, key, frame))
            size -= len(frame)
            if size <= 0:
                break
        return found


T = TypeVar("T", bound=ThreadBuffer)


class ThreadBuffers(Generic[T]):
    """The thread buffers of a process. A thread that is in use is never dropped."""

    def __init__(self, make: Callable[[], T], clock: Callable[[], float], throttle: LogThrottle | None = None) -> None:
        self._make, self.clock = make, clock
        self.throttle = throttle or LogThrottle()
        self._buffers: dict[str, T] = {}
        self._guard = plain_lock()
        self._sleepers: dict[Bell, float] = {}
        self._sweeping = False
        self.closed = False

    def enter(self, thread_id: str) -> T:
        """Give the thread's buffer, for :meth:`leave` to give back."""
        with self._guard:
            buffer = self._buffers.get(thread_id)
            if buffer is None:
                buffer = self._buffers[thread_id] = self._make()
            buffer.users += 1
            buffer.touched = self.clock()
            return buffer

    def leave(self, buffer: T) -> None:
        """Count a user out."""
        with self._guard:
            buffer.users -= 1

    @contextmanager
    def using(self, thread_id: str) -> Iterator[T]:
        """Enter, and leave at the end."""
        buffer = self.enter(thread_id)
        try:
            yield buffer
        finally:
            self.leave(buffer)

    def get(self, thread_id: str) -> T | None:
        """Give the buffer of a thread in use."""
        return self._buffers.get(thread_id)

    def all(self) -> list[tuple[str, T]]:
        """Give all buffers by thread."""
        with self._guard:
            return list(self._buffers.items())

    def used(self) -> list[str]:
        """Give the threads whose buffers are in use."""
        return [thread_id for thread_id, buffer in self.all() if buffer.users]

    def drop(self, thread_id: str, unless: Callable[[T], bool]) -> bool:
        """Drop a buffer that nobody uses."""
        with self._guard:
            buffer = self._buffers.get(thread_id)
            if buffer is None or buffer.users or unless(buffer):
                return False
            del self._buffers[thread_id]
            return True

    def sleep(self, bell: Bell, seconds: float) -> bool:
        """Wait for ``bell``; give whether it rang within ``seconds``; it may end half a second early."""
        if seconds <= 2 * _SWEEP_SECONDS:
            self._sleepers.pop(bell, None)
            try:
                return bell.get(timeout=seconds)
            except queue.Empty:
                return False
        # A timer for each wait would cost more than all else that a viewer does for an event.
        self._sleepers[bell] = time.monotonic() + seconds - _SWEEP_SECONDS
        if not self._sweeping:
            self._begin_to_sweep()
        return bell.get()

    def _begin_to_sweep(self) -> None:
        with self._guard:
            begin, self._sweeping = not self._sweeping, True
        if begin:
            threading.Thread(target=self._sweep, daemon=True, name="assistream-sweeper").start()

    def awake(self, bell: Bell) -> None:
        """Ring ``bell`` no more: nobody sleeps by it."""
        self._sleepers.pop(bell, None)

    def _sweep(self) -> None:
        while not self.closed:
            time.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            for bell, due in list(self._sleepers.items()):
                if due <= now and self._sleepers.pop(bell, 0):
                    bell.put(False)

    def wake(self) -> None:
        """End all waits, now and later."""
        self.closed = True
        for _, buffer in self.all():
            buffer.wake()
