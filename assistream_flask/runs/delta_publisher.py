"""Adds what arrives for a run to its message and to the log: the first of it at once, the rest a tick at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

from ..errors import RunError
from ..events import Event
from ..fast.batch_scheduler import BatchScheduler
from ..log.protocol import REFUSED, AppendRequest
from ..platform.interrupt import Interrupted
from ..platform.log_throttle import LogThrottle
from ..upstream.deltas import Delta
from .active_run import ActiveRun
from .log_appender import LogAppender

_log = logging.getLogger(__name__)

_FEW: Final = 20
"""A worker with no more answers under way, and no more viewers, has time to tell of each delta as it comes."""
_FLOODED: Final = 4
"""With no more answers under way it has time for that even where they are floods."""
_FLOOD_PIECES: Final = 50
"""An answer is a flood after so many deltas soon after each other: see :class:`.active_run.Pacing`."""
_FLOOD_LASTS: Final = 8
"""It is one while so many deltas come a turn."""


class DeltaPublisher:
    """Tells what the runs of one worker grow by; ``seconds`` is a turn, 0 is for telling all at once. ``viewers()`` are
    the event streams that the worker has open; ``only_grows`` tells of what arrived for a run whether it only has to
    be told: it is no beginning, no end, and needs no checkpoint at once."""

    def __init__(
        self,
        appender: LogAppender,
        seconds: float,
        viewers: Callable[[], int],
        only_grows: Callable[[ActiveRun, Sequence[Delta]], bool],
        throttle: LogThrottle | None = None,
    ) -> None:
        self._appender, self._viewers, self._only_grows = appender, viewers, only_grows
        self._throttle = throttle or LogThrottle()
        # Those that have begun to speak and are not over.
        self._speaking: set[str] = set()
        self._scheduler: BatchScheduler[ActiveRun] | None = (
            BatchScheduler(seconds, self._tick, self._throttle) if seconds else None
        )

    def next(self, active: ActiveRun) -> Sequence[Delta] | None:
        """Give the run's next deltas that :meth:`add` is to tell, ``None`` at the end; meanwhile ticks may read and
        tell others. Raises what its stream does."""
        reader = active.reader
        while True:
            # Before the read: an interrupt meets nothing that was read and not taken.
            reader.turn.share(is_flood=reader.slot.is_flooded)
            deltas = next(reader.batches, None)
            if deltas is None or deltas:
                return deltas
            if reader.slot.is_flooded:
                # A tick would read all of those, one after the other.
                continue
            if active.pacing.has_begun and self._scheduler is not None and (self._has_many() or self._floods(active)):
                if reader.slot.source is not None and not reader.slot.is_fed:
                    reader.feed()
                if reader.slot.can_wait:
                    left = self._scheduler.wait(active)
                    if isinstance(left, Exception):
                        raise left
                    if left is not None:
                        return cast("Sequence[Delta]", left)

    def _has_many(self) -> bool:
        return len(self._speaking) > _FEW or self._viewers() > _FEW

    def _floods(self, active: ActiveRun) -> bool:
        is_flood = active.pacing.in_a_row >= _FLOOD_PIECES and active.slot.source is not None
        return is_flood and len(self._speaking) > _FLOODED

    def add(self, active: ActiveRun, deltas: Sequence[Delta]) -> None:
        """Tell what arrived. Raises :class:`Interrupted` where the run is over, or another worker's."""
        with active.lock:
            active.pacing.arrived()
            self._tell([(active, active.add(deltas))])

    def tell(self, active: ActiveRun, change: Callable[[], list[Event]]) -> None:
        """Change what the run is, and tell the events that ``change`` gives for it. Raises :class:`Interrupted` where
        the run is over, or another worker's."""
        with active.lock:
            if active.is_over or active.is_left:
                raise Interrupted
            self._tell([(active, change())])

    def forget(self, active: ActiveRun) -> None:
        """Take note that the run is over, or another worker's."""
        self._speaking.discard(active.id)

    def close(self) -> None:
        """Have no more ticks."""
        if self._scheduler is not None:
            self._scheduler.close()

    def _tick(self, ready: Sequence[ActiveRun]) -> None:
        assert self._scheduler is not None
        many = self._has_many()
        locked: list[ActiveRun] = []
        try:
            for active in ready:
                # A tick holds many of these: it waits for none, so that no two can wait for each other.
                if not active.lock.acquire(blocking=False):
                    active.slot.handed_back.put(None)
                    continue
                locked.append(active)
                if self._read(active, many):
                    self._scheduler.again(active)
            grown: list[tuple[ActiveRun, list[Event]]] = []
            for active in locked:
                try:
                    grown.append((active, active.grow()))
                except Exception as error:
                    self._throttle.error(_log, error, "run %s failed", active.id)
                    active.interrupt(RunError("server_error", said=repr(error)))
            self._tell(grown)
        finally:
            for active in locked:
                active.lock.release()

    def _read(self, active: ActiveRun, many: bool) -> bool:
        """Take what the stream has; give ``False`` where its own thread is to go on. The run's lock is held."""
        left: object = None
        reader = active.reader
        slot = reader.slot
        try:
            if not slot.read():
                return True
            while (deltas := next(reader.batches)) and self._only_grows(active, deltas):
                active.take(deltas)
            if not deltas and slot.can_wait and not slot.is_flooded and (many or slot.taken >= _FLOOD_LASTS):
                return True
            left = deltas or None
        except (OSError, StopIteration):
            # Its own thread meets it too.
            pass
        except Exception as error:
            left = error
        slot.handed_back.put(left)
        return False

    def _tell(self, grown: Sequence[tuple[ActiveRun, list[Event]]]) -> None:
        """Append what the runs grew by. Their locks are held."""
        told = [(active, events) for active, events in grown if events]
        if told:
            requests = [AppendRequest(active.thread_id, events, active.claim) for active, events in told]
            event_ids = self._appender.append_all(requests)
            now = time.monotonic()
            for (active, _), event_id in zip(told, event_ids, strict=True):
                if event_id is REFUSED:
                    active.leave()
                    continue
                # Where it could not be appended, there is no event id for this text until the log is rebuilt.
                active.checkpoint.move(event_id)
                if active.pacing.told(now):
                    self._speaking.add(active.id)
