"""The newest records of one thread in this process, shared by all its readers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from . import Lost, Place, Record

READ_BYTES: Final = 65_536
"""One read gives records up to about so many bytes: what a slow viewer holds besides its socket's buffer."""


class Tail:
    """Records without a gap up to ``offset``. ``lock``, ``held`` so often, is for changes that span store and log,
    ``changed`` for the records. ``users`` and ``touched`` are the registry's."""

    def __init__(self, epoch: str, offset: int = 0) -> None:
        self.epoch, self.offset = epoch, offset
        self.records: deque[tuple[float, Record]] = deque()
        self.size = 0
        self.users = 0
        self.touched = 0.0
        self.lock = threading.RLock()
        self.held = 0
        self.changed = threading.Condition(threading.Lock())

    @property
    def place(self) -> Place:
        """The place after the newest record."""
        return Place(self.epoch, self.offset)

    def restart(self, epoch: str, offset: int) -> None:
        """Forgets all records: the log begins anew, or goes on behind a gap."""
        self.records.clear()
        self.size = 0
        self.epoch, self.offset = epoch, offset

    def add(self, at: float, records: Sequence[Record]) -> None:
        """Adds the next records; ``at`` is their time."""
        for record in records:
            self.records.append((at, record))
            self.size += len(record.frame)
        self.offset += len(records)

    def trim(self, max_events: int, max_bytes: int, oldest: float) -> None:
        """Keeps the newest records: so many, of so many bytes, none older."""
        records = self.records
        while records and (len(records) > max_events or self.size > max_bytes or records[0][0] < oldest):
            self.size -= len(records.popleft()[1].frame)

    def has(self, place: Place) -> bool:
        """Whether all records after ``place`` are here."""
        return place.epoch == self.epoch and 0 <= self.offset - place.offset <= len(self.records)

    def since(self, place: Place, size: float = float("inf")) -> list[Record]:
        """Gives the records after ``place``, up to about ``size`` bytes. Raises :class:`Lost`."""
        if not self.has(place):
            raise Lost
        # From the right: the newest few are what nearly every reader wants.
        newest = [record for _, record in islice(reversed(self.records), self.offset - place.offset)][::-1]
        for at, record in enumerate(newest):
            size -= len(record.frame)
            if size <= 0:
                return newest[: at + 1]
        return newest


T = TypeVar("T", bound=Tail)


class Registry(Generic[T]):
    """The tails of a process. A thread that is in use is never dropped."""

    def __init__(self, make: Callable[[], T], clock: Callable[[], float]) -> None:
        self._make, self.clock = make, clock
        self._tails: dict[str, T] = {}
        self._guard = threading.Lock()
        self.closed = False

    def enter(self, thread_id: str) -> T:
        """Gives the thread's tail, for :meth:`leave` to give back."""
        with self._guard:
            tail = self._tails.get(thread_id)
            if tail is None:
                tail = self._tails[thread_id] = self._make()
            tail.users += 1
            tail.touched = self.clock()
            return tail

    def leave(self, tail: T) -> None:
        """Counts a user out."""
        with self._guard:
            tail.users -= 1

    @contextmanager
    def using(self, thread_id: str) -> Iterator[T]:
        """Enters, and leaves at the end."""
        tail = self.enter(thread_id)
        try:
            yield tail
        finally:
            self.leave(tail)

    def get(self, thread_id: str) -> T | None:
        """Gives the tail of a thread in use."""
        return self._tails.get(thread_id)

    def all(self) -> list[tuple[str, T]]:
        """Gives all tails by thread."""
        with self._guard:
            return list(self._tails.items())

    def drop(self, thread_id: str, unless: Callable[[T], bool]) -> bool:
        """Drops a tail that nobody uses."""
        with self._guard:
            tail = self._tails.get(thread_id)
            if tail is None or tail.users or unless(tail):
                return False
            del self._tails[thread_id]
            return True

    def wake(self) -> None:
        """Ends all waits, now and later."""
        self.closed = True
        for _, tail in self.all():
            with tail.changed:
                tail.changed.notify_all()


class Cursor:
    """A reader's place in a shared tail: a reader costs an integer, however many there are.

    ``older`` gives records that the tail has no more.
    """

    def __init__(
        self,
        registry: Registry[Any],
        tail: Tail,
        place: Place,
        older: Callable[[Place], list[Record]] | None = None,
    ) -> None:
        self._registry, self._tail, self._place, self._older = registry, tail, place, older
        self._open = True

    def read(self, timeout: float) -> list[Record]:
        tail = self._tail
        with tail.changed:
            # A reader can be ahead of what was heard, where it caught up from elsewhere.
            behind = tail.epoch == self._place.epoch and tail.offset <= self._place.offset
            if behind and not self._registry.closed:
                tail.changed.wait(timeout)
            older = tail.epoch == self._place.epoch and not tail.has(self._place)
            if self._older is None or not older:
                records = tail.since(self._place, READ_BYTES)
        if self._older is not None and older:
            records = self._older(self._place)
        if records:
            self._place = records[-1].place
        return records

    def close(self) -> None:
        if self._open:
            self._open = False
            self._registry.leave(self._tail)
