"""Snapshots of threads for event streams: one for all who ask at about the same time, and few are read at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeAlias

from .. import events, sse
from ..log.protocol import EventId
from ..platform.once import SharedCall, UndoneError
from .snapshot import Page

_BYTES: Final = 393_216
"""What a snapshot of long messages has of them, about: the system takes it at once, however slow its viewer is."""
_APART_SECONDS: Final = 0.1
"""While a thread has a crowd, one of its snapshots begins so long after the other."""
_AT_ONCE: Final = 2
_WAIT_SECONDS: Final = 5.0


class ReadLimit:
    """Lets few read at once, so that a crowd's readers leave the rest of the database's connections to commands.

    No lock: who has waited for five seconds reads all the same, since a database may take longer to fail.
    """

    def __init__(self) -> None:
        self._free = threading.Semaphore(_AT_ONCE)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        is_counted = self._free.acquire(timeout=_WAIT_SECONDS)
        try:
            yield
        finally:
            if is_counted:
                self._free.release()


ReadPage: TypeAlias = Callable[[str, int, ReadLimit], Page | None]
"""Reads a page of a thread, so many bytes of it, and counts in the limit while it does."""


class Snapshot(NamedTuple):
    """A frame, the event id as of which it is exact, and how each of its runs was."""

    frame: bytes
    event_id: EventId
    runs: dict[str, str]


class _Reading(SharedCall[Snapshot | None]):
    began = 0.0


class SharedSnapshots:
    """Gives all event streams of a process their snapshots. Each is read after it was asked for, so none is older than
    what the asker has seen or done.

    The first of a crowd gets its own at once. Who comes while that is read shares the next one.
    """

    def __init__(self, page: ReadPage) -> None:
        self._page = page
        self._read_limit = ReadLimit()
        # By thread: what may still be joined, and what is being read.
        self._open: dict[str, _Reading] = {}
        self._begun: dict[str, _Reading] = {}

    def get(self, thread_id: str) -> Snapshot | None:
        """Give a snapshot, ``None`` when the thread is gone. Raises what reading a page raises."""
        while True:
            reading = self._open.get(thread_id) or self._open.setdefault(thread_id, _Reading())
            try:
                return reading.do(lambda: self._read(thread_id))
            except UndoneError:
                pass

    def _read(self, thread_id: str) -> Snapshot | None:
        try:
            other = self._begun.get(thread_id)
            if other is not None:
                other.over.wait()
                time.sleep(max(0.0, other.began + _APART_SECONDS - time.monotonic()))
            self._begun[thread_id] = self._open[thread_id]
            self._begun[thread_id].began = time.monotonic()
        finally:
            # Who asks from here on needs one that is read later.
            del self._open[thread_id]
        try:
            return self._made(thread_id)
        finally:
            del self._begun[thread_id]

    def _made(self, thread_id: str) -> Snapshot | None:
        found = self._page(thread_id, _BYTES, self._read_limit)
        if found is None:
            return None
        data, has_more, event_id = found
        event = events.snapshot(thread_id, data, has_more)
        frame = sse.encode(event.name, events.dumps(event.data), str(event_id))
        return Snapshot(frame, event_id, {one["run"]["id"]: one["run"]["status"] for one in data if one["run"]})
