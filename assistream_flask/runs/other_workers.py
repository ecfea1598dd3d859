"""Tells this worker's viewers what other workers store, where each worker has an event log of its own."""

from __future__ import annotations

import logging
import time
from typing import Final, NamedTuple

from ..log.protocol import EventId, Log, PositionExpiredError
from ..store.sql import ThreadStore
from .log_appender import LogAppender

_log = logging.getLogger(__name__)

_LIVES_SECONDS: Final = 5.0
# A message may be so old when it is stored: its database let it wait, or its worker's clock is behind.
_RECENT_SECONDS: Final = 30.0
_TOLD_SECONDS: Final = 60.0
_GONE: Final = -1


class _Known(NamedTuple):
    """The position of a thread's newest message that viewers here heard of, and the place in the log as of which."""

    position: int
    event_id: EventId


class OtherWorkers:
    """Follows the workers beside ``worker`` that do not read its log: two masters after a USR2, a reload, two machines.

    There is no warning of them for ``patience`` seconds: so long a worker that is replaced may end its runs.
    """

    def __init__(self, store: ThreadStore, log: Log, appender: LogAppender, worker: str, patience: float) -> None:
        self._store, self._log, self._appender = store, log, appender
        self._worker, self._patience = worker, patience + _LIVES_SECONDS
        self._known: dict[str, _Known] = {}
        self._lived = False
        # When the threads were looked at last, or there was no need to.
        self._looked = time.time()
        self._since: float | None = None
        self._told = float("-inf")

    def follow(self) -> None:
        """Have viewers here get a snapshot of each thread that another worker added to, or deleted; of a run that it
        goes on with, the runner tells. Called every second or so."""
        names = self._store.others(self._worker, _LIVES_SECONDS)
        now = time.time()
        # Once more when they are gone: for what they did last.
        if names or self._lived:
            viewed = self._log.viewed()
            newest = self._store.newest(viewed)
            known = ((thread_id, self._look(thread_id, *newest.get(thread_id, (_GONE, 0)))) for thread_id in viewed)
            self._known = {thread_id: one for thread_id, one in known if names and one is not None}
        self._lived, self._looked = bool(names), now
        self._warn(names)

    def _look(self, thread_id: str, position: int, created_at: int) -> _Known | None:
        known, event_id = self._known.get(thread_id), self._log.end_unless_locked(thread_id)
        if event_id is None:
            # Something is stored and not told yet.
            return known
        if known is None:
            # Nobody here can have come before what was there at the last look.
            is_new = position == _GONE or created_at >= self._looked - _RECENT_SECONDS
        elif position == _GONE:
            is_new = known.position != _GONE
        else:
            told = known.position + self._created(thread_id, known.event_id, event_id)
            is_new, position = position > told, max(position, told)
        if is_new:
            self._appender.mark_incomplete(thread_id)
        return _Known(position, event_id)

    def _created(self, thread_id: str, since: EventId, until: EventId) -> int:
        """Count the messages that were told of between: too few where the log lacks some, then one snapshot more."""
        if since.epoch != until.epoch:
            since = EventId(until.epoch, 0)
        try:
            records = self._log.since(thread_id, since)
        except PositionExpiredError:
            return 0
        return sum(one.name == "thread.message.created" and one.event_id <= until for one in records)

    def _warn(self, names: list[str]) -> None:
        now = time.monotonic()
        if not names:
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since > self._patience and now - self._told > _TOLD_SECONDS:
            self._told = now
            _log.warning(
                "the worker %s serves this database too, and each has an event log of its own in memory: what one "
                "adds shows late at the other. Set ASSISTREAM_REDIS_URL, or end one of them",
                ", ".join(names),
            )
