"""The log in this process's memory: for one worker, and gone when it ends."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from .. import sse
from ..events import Event, dumps
from . import Lost, Place, Record


class _Thread:
    """One thread's records. ``lock`` is for changes that span store and log, ``changed`` for the records."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)
        self.records: deque[tuple[float, Record]] = deque()
        self.offset = 0
        self.users = 0
        self.touched = 0.0
        self.lock = threading.RLock()
        self.changed = threading.Condition(threading.Lock())

    def since(self, offset: int) -> list[Record]:
        first = self.offset - len(self.records)
        if not first <= offset <= self.offset:
            raise Lost
        # From the right: the newest few are what nearly every reader wants.
        newest = islice(reversed(self.records), self.offset - offset)
        return [record for _, record in newest][::-1]


class MemoryLog:
    """Keeps at most ``max_events`` a thread, none older than ``max_age`` seconds, see :class:`..Log`.

    ``clock`` gives seconds and is for tests.
    """

    def __init__(
        self, *, max_events: int = 10_000, max_age: float = 600, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_events, self._max_age, self._clock = max_events, max_age, clock
        self._threads: dict[str, _Thread] = {}
        self._guard = threading.Lock()
        self._closed = False

    def _enter(self, thread_id: str) -> _Thread:
        """Counts a user in, so that :meth:`trim` does not drop the thread under it."""
        with self._guard:
            thread = self._threads.get(thread_id)
            if thread is None:
                thread = self._threads[thread_id] = _Thread()
            thread.users += 1
            thread.touched = self._clock()
            return thread

    def _leave(self, thread: _Thread) -> None:
        with self._guard:
            thread.users -= 1

    def append(self, thread_id: str, events: Sequence[Event]) -> Place:
        thread = self._enter(thread_id)
        try:
            encoded = [(event, dumps(event.data)) for event in events]
            with thread.changed:
                at = self._clock()
                for event, data in encoded:
                    thread.offset += 1
                    place = Place(thread.epoch, thread.offset)
                    frame = sse.encode(event.name, data, str(place))
                    thread.records.append((at, Record(place, event.name, event.key, frame)))
                while len(thread.records) > self._max_events:
                    thread.records.popleft()
                thread.changed.notify_all()
                return Place(thread.epoch, thread.offset)
        finally:
            self._leave(thread)

    def end(self, thread_id: str) -> Place:
        thread = self._enter(thread_id)
        try:
            return Place(thread.epoch, thread.offset)
        finally:
            self._leave(thread)

    def since(self, thread_id: str, place: Place) -> list[Record]:
        thread = self._enter(thread_id)
        try:
            with thread.changed:
                if place.epoch != thread.epoch:
                    raise Lost
                return thread.since(place.offset)
        finally:
            self._leave(thread)

    def subscribe(self, thread_id: str, place: Place) -> MemorySubscription:
        thread = self._enter(thread_id)
        try:
            with thread.changed:
                if place.epoch != thread.epoch:
                    raise Lost
                thread.since(place.offset)
        except Lost:
            self._leave(thread)
            raise
        return MemorySubscription(self, thread, place.offset)

    def lock(self, thread_id: str) -> _Lock:
        return _Lock(self, thread_id)

    def trim(self) -> None:
        oldest = self._clock() - self._max_age
        with self._guard:
            for thread_id, thread in list(self._threads.items()):
                with thread.changed:
                    while thread.records and thread.records[0][0] < oldest:
                        thread.records.popleft()
                if not thread.users and not thread.records and thread.touched < oldest:
                    del self._threads[thread_id]

    def close(self) -> None:
        self._closed = True
        with self._guard:
            threads = list(self._threads.values())
        for thread in threads:
            with thread.changed:
                thread.changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called; readers end then."""
        return self._closed


class MemorySubscription:
    """A cursor in a thread's shared records: a reader costs an integer, however many there are."""

    def __init__(self, log: MemoryLog, thread: _Thread, offset: int) -> None:
        self._log, self._thread, self._offset = log, thread, offset
        self._open = True

    def read(self, timeout: float) -> list[Record]:
        thread = self._thread
        with thread.changed:
            if thread.offset == self._offset and not self._log.closed:
                thread.changed.wait(timeout)
            records = thread.since(self._offset)
            self._offset = thread.offset
            return records

    def close(self) -> None:
        if self._open:
            self._open = False
            self._log._leave(self._thread)


class _Lock:
    """A thread's lock, which also keeps its log from being dropped."""

    def __init__(self, log: MemoryLog, thread_id: str) -> None:
        self._log, self._thread_id = log, thread_id

    def __enter__(self) -> None:
        self._thread = self._log._enter(self._thread_id)
        self._thread.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._thread.lock.release()
        self._log._leave(self._thread)
