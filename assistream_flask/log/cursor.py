"""A reader's place among the records that a thread's readers share in this process."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from .protocol import EventId, PositionExpiredError, Receipt, Receive, Record
from .thread_buffer import Bell, ThreadBuffer, ThreadBuffers

_log = logging.getLogger(__name__)

READ_BYTES: Final = 65_536
"""One read gives records up to about so many bytes: what a slow viewer holds besides its socket's buffer."""


class Cursor:
    """A reader's place in a shared tail: a reader costs an integer, however many there are.

    ``older`` gives records that the tail has no more.
    """

    def __init__(
        self,
        registry: ThreadBuffers[Any],
        tail: ThreadBuffer,
        place: EventId,
        older: Callable[[EventId], list[Record]] | None = None,
    ) -> None:
        self._registry, self._tail, self._place, self._older = registry, tail, place, older
        self._bell: Bell = queue.SimpleQueue()
        # Only while the reader waits.
        self._take: Receive | None = None
        self._open = True

    def read(self, timeout: float, take: Receive | None = None) -> list[Record]:
        records = self._ready(waits=True)
        if records is not None or self._registry.closed:
            return records or []
        self._take = take
        try:
            rang = self._registry.sleep(self._bell, timeout)
        finally:
            with self._tail.guard:
                self._take = None
        if not rang:
            self._tail.forget(self)
            with suppress(queue.Empty):
                self._bell.get(block=False)
        return self._ready(waits=False) or []

    def wake(self) -> None:
        """Have what is new taken, or the reader go on."""
        try:
            if self._taken():
                return
        except Exception as error:
            self._registry.complaints.error(_log, error, "records could not be taken")
        self._bell.put(True)

    def _taken(self) -> bool:
        tail = self._tail
        with tail.guard:
            while self._take is not None and not self._registry.closed:
                try:
                    records = tail.since(self._place, READ_BYTES)
                except PositionExpiredError:
                    # Or elsewhere: the reader's to find out.
                    return False
                if records:
                    taken = self._take(records)
                    if taken is not Receipt.NO:
                        self._place = records[-1].place
                    if taken is not Receipt.WHOLE:
                        return False
                if self._place == tail.place:
                    tail.wait(self)
                    return True
        return False

    def _ready(self, *, waits: bool) -> list[Record] | None:
        """Give what there is to read; where that is nothing, and ``waits``, it is woken when there is."""
        tail = self._tail
        with tail.guard:
            # A reader can be ahead of what was heard, where it caught up from elsewhere.
            same = tail.place.epoch == self._place.epoch
            if same and tail.place.offset <= self._place.offset:
                if waits:
                    tail.wait(self)
                return None
            older = same and not tail.has(self._place)
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
            self._registry.awake(self._bell)
            self._registry.leave(self._tail)
