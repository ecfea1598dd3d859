"""The log in this process's memory: for one worker, and gone when it ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .. import sse
from ..events import Event, dumps
from . import Lost, Place, Record
from .tail import Cursor, Registry, Tail


class MemoryLog:
    """Keeps at most ``max_events`` and ``max_bytes`` a thread, none older than ``max_age`` seconds, see :class:`..Log`.

    ``clock`` gives seconds and is for tests.
    """

    shared = False

    def __init__(
        self,
        *,
        max_events: int = 10_000,
        max_bytes: int = 8 << 20,
        max_age: float = 600,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_events, self._max_bytes, self._max_age = max_events, max_bytes, max_age
        self._threads = Registry(lambda: Tail(_epoch()), clock)

    def append(self, thread_id: str, events: Sequence[Event]) -> Place:
        tail = self._threads.enter(thread_id)
        try:
            with tail.guard:
                epoch, offset = tail.place
                told = []
                for name, data, key in events:
                    offset += 1
                    told.append((name, key, sse.encode(name, dumps(data), f"{epoch}-{offset}")))
                tail.add(self._threads.clock(), told)
                tail.trim(self._max_events, self._max_bytes, 0)
                place = tail.place
            tail.wake()
            return place
        finally:
            self._threads.leave(tail)

    def append_all(self, told: Sequence[tuple[str, Sequence[Event]]]) -> list[Place]:
        return [self.append(thread_id, events) for thread_id, events in told]

    def end(self, thread_id: str) -> Place:
        with self._threads.using(thread_id) as tail:
            return tail.place

    def quiet(self, thread_id: str) -> Place | None:
        with self._threads.using(thread_id) as tail, tail.guard:
            return None if tail.held else tail.place

    def since(self, thread_id: str, place: Place) -> list[Record]:
        with self._threads.using(thread_id) as tail, tail.guard:
            return tail.since(place)

    def subscribe(self, thread_id: str, place: Place) -> Cursor:
        tail = self._threads.enter(thread_id)
        with tail.guard:
            found = tail.has(place)
        if not found:
            self._threads.leave(tail)
            raise Lost
        return Cursor(self._threads, tail, place)

    @contextmanager
    def lock(self, thread_id: str) -> Iterator[None]:
        with self._threads.using(thread_id) as tail, tail.lock:
            tail.held += 1
            try:
                yield
            finally:
                tail.held -= 1

    def restart(self, thread_id: str) -> None:
        with self._threads.using(thread_id) as tail:
            with tail.guard:
                tail.restart(Place(_epoch(), 0))
            tail.wake()

    def signal(self, thread_id: str) -> None:
        """Nobody else hears."""

    def listen(self, attend: Callable[[str], None]) -> None:
        """Nobody else signals."""

    def tend(self) -> None:
        oldest = self._threads.clock() - self._max_age
        for thread_id, tail in self._threads.all():
            with tail.guard:
                tail.trim(self._max_events, self._max_bytes, oldest)
            self._threads.drop(thread_id, unless=lambda tail: bool(tail.records) or tail.touched >= oldest)

    def wake(self) -> None:
        self._threads.wake()

    def close(self) -> None:
        self.wake()


def _epoch() -> str:
    return secrets.token_hex(4)
