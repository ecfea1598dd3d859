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
    """A reader's place in a thread buffer: a reader costs an integer, however many there are.

    ``older`` gives records that the buffer has no more.
    """

    def __init__(
        self,
        registry: ThreadBuffers[Any],
        buffer: ThreadBuffer,
        event_id: EventId,
        older: Callable[[EventId], list[Record]] | None = None,
    ) -> None:
        self._registry, self._buffer, self._event_id, self._older = registry, buffer, event_id, older
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
            with self._buffer.guard:
                self._take = None
        if not rang:
            self._buffer.forget(self)
            with suppress(queue.Empty):
                self._bell.get(block=False)
        return self._ready(waits=False) or []

    def wake(self) -> None:
        """Have what is new taken, or the reader go on."""
        try:
            if self._taken():
                return
        except Exception as error:
            self._registry.throttle.error(_log, error, "records could not be taken")
        self._bell.put(True)

    def interrupt(self) -> None:
        self._bell.put(False)

    def _taken(self) -> bool:
        buffer = self._buffer
        with buffer.guard:
            while self._take is not None and not self._registry.closed:
                try:
                    records = buffer.since(self._event_id, READ_BYTES)
                except PositionExpiredError:
                    # Or elsewhere: the reader's to find out.
                    return False
                if records:
                    taken = self._take(records)
                    if taken is not Receipt.NO:
                        self._event_id = records[-1].event_id
                    if taken is not Receipt.WHOLE:
                        return False
                if self._event_id == buffer.event_id:
                    buffer.wait(self)
                    return True
        return False

    def _ready(self, *, waits: bool) -> list[Record] | None:
        """Give what there is to read; where that is nothing, and ``waits``, it is woken when there is."""
        buffer = self._buffer
        with buffer.guard:
            # A reader can be ahead of what was heard, where it caught up from elsewhere.
            same = buffer.event_id.epoch == self._event_id.epoch
            if same and buffer.event_id.offset <= self._event_id.offset:
                if waits:
                    buffer.wait(self)
                return None
            older = same and not buffer.has(self._event_id)
            if self._older is None or not older:
                records = buffer.since(self._event_id, READ_BYTES)
        if self._older is not None and older:
            records = self._older(self._event_id)
        if records:
            self._event_id = records[-1].event_id
        return records

    def close(self) -> None:
        if self._open:
            self._open = False
            self._registry.awake(self._bell)
            self._registry.leave(self._buffer)
