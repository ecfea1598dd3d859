"""Adds what arrives for a run to its message and to the log: the first of it at once, the rest a tick at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

from ..errors import RunError, masked
from ..events import Event
from ..fast.batch_scheduler import BatchScheduler
from ..log.protocol import REFUSED, AppendRequest
from ..platform.interrupt import Interrupted
from ..platform.log_throttle import LogThrottle
from ..upstream.deltas import Part
from .active_run import ActiveRun
from .log_appender import LogAppender

_log = logging.getLogger(__name__)

_FEW: Final = 20
"""A worker with no more answers under way, and no more viewers, has time to tell of each delta as it comes."""
_FLOODED: Final = 4
"""With no more, for a flood too: one that begins with so many pieces, less than so many seconds from each other, and
lasts while so many come a turn."""
_FLOOD_PIECES: Final = 50
_FLOOD_SECONDS: Final = 0.004
_FLOOD_LASTS: Final = 8


class DeltaPublisher:
    """Tells what the runs of one worker grow by; ``seconds`` is a turn, 0 is for telling all at once. ``viewers()`` are
    the event streams that the worker has open; ``only_grows`` says of what arrived for a run that it is to be told, and
    that nothing else is to be done for it."""

    def __init__(
        self,
        teller: LogAppender,
        seconds: float,
        viewers: Callable[[], int],
        only_grows: Callable[[ActiveRun, Sequence[Part]], bool],
        complaints: LogThrottle | None = None,
    ) -> None:
        self._teller, self._viewers, self._only_grows = teller, viewers, only_grows
        self._complaints = complaints or LogThrottle()
        # Those that have begun to speak and are not over.
        self._speaking: set[str] = set()
        self._pacer: BatchScheduler[ActiveRun] | None = (
            BatchScheduler(seconds, self._tick, self._complaints) if seconds else None
        )

    def next(self, live: ActiveRun) -> Sequence[Part] | None:
        """Gives the run's next parts, without those that a tick told or is to tell; ``None`` at the end. Raises what
        its stream does."""
        while True:
            # Before the read: an interrupt meets nothing that was read and not taken.
            live.turn.share()
            parts = next(live.batches, None)
            if parts is None or parts:
                return parts
            if live.begun and self._pacer is not None and (self._has_many() or self._floods(live)):
                if live.seat.source is not None and not live.seat.is_fed:
                    live.feed()
                if live.seat.can_wait:
                    left = self._pacer.wait(live)
                    if isinstance(left, Exception):
                        raise left
                    if left is not None:
                        return cast("Sequence[Part]", left)

    def _has_many(self) -> bool:
        return len(self._speaking) > _FEW or self._viewers() > _FEW

    def _floods(self, live: ActiveRun) -> bool:
        return live.in_a_row >= _FLOOD_PIECES and live.seat.source is not None and len(self._speaking) > _FLOODED

    def add(self, live: ActiveRun, parts: Sequence[Part]) -> None:
        """Tells what arrived. Raises :class:`Interrupted` when the run is over, or another worker's."""
        with live.lock:
            live.take(parts)
            if live.reply.over or live.left:
                if live.reply.over:
                    # A response that goes on in the background is cancelled by what is known of it. Who takes over
                    # one that is left goes on behind its state, which must not be ahead of the text.
                    live.state = live.pending_state or live.state
                raise Interrupted
            live.in_a_row = live.in_a_row + 1 if time.monotonic() - live.told < _FLOOD_SECONDS else 0
            self._tell([(live, live.grow())])

    def forget(self, live: ActiveRun) -> None:
        """The run is over, or another worker's."""
        self._speaking.discard(live.id)

    def close(self) -> None:
        """Ticks no more."""
        if self._pacer is not None:
            self._pacer.close()

    def _tick(self, ready: Sequence[ActiveRun]) -> None:
        assert self._pacer is not None
        many = self._has_many()
        locked: list[ActiveRun] = []
        try:
            for live in ready:
                if not live.lock.acquire(blocking=False):
                    live.seat.left.put(None)
                    continue
                locked.append(live)
                if self._read(live, many):
                    self._pacer.again(live)
            grown: list[tuple[ActiveRun, list[Event]]] = []
            for live in locked:
                if live.pending and not live.reply.over and not live.left:
                    try:
                        grown.append((live, live.grow()))
                    except Exception as error:
                        self._complaints.error(_log, error, "run %s failed", live.id)
                        live.said = masked(repr(error))
                        live.stop = lambda reply: reply.fail(RunError("server_error"))
                        live.waits.interrupt()
            self._tell(grown)
        finally:
            for live in locked:
                live.lock.release()

    def _read(self, live: ActiveRun, many: bool) -> bool:
        """Takes what the stream has; gives ``False`` where its own reader is to go on. Its lock is held."""
        left: object = None
        try:
            if not live.seat.read():
                return True
            while (parts := next(live.batches)) and self._only_grows(live, parts):
                live.take(parts)
            if not parts and live.seat.can_wait and (many or live.seat.taken >= _FLOOD_LASTS):
                return True
            left = parts or None
        except (OSError, StopIteration):
            # The reader meets it too.
            pass
        except Exception as error:
            left = error
        live.seat.left.put(left)
        return False

    def _tell(self, grown: Sequence[tuple[ActiveRun, list[Event]]]) -> None:
        """Their locks are held."""
        told = [(live, events) for live, events in grown if events]
        if told:
            places = self._teller.tell_all([AppendRequest(live.thread_id, events, live.claim) for live, events in told])
            now = time.monotonic()
            for (live, _), place in zip(told, places, strict=True):
                if place is REFUSED:
                    live.leave()
                    continue
                # Where it was missed no place is known as of which the text is exact, until the log began anew.
                live.place = place
                live.dirty, live.told = True, now
                if not live.begun:
                    live.begun = True
                    self._speaking.add(live.id)
