"""What arrives for a run goes to its reply and to the log: the first of it at once, the rest a tick at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from .errors import RunError
from .events import Event
from .interrupt import Interrupted
from .live import Live
from .pace import Pacer
from .teller import Teller
from .upstream.parts import Part

_log = logging.getLogger(__name__)

_FEW: Final = 20
"""A worker with no more answers under way, and no more viewers, has time to tell of each delta as it comes."""


class Publisher:
    """Tells what the runs of one worker grow by; ``seconds`` is a tick, 0 is for telling all at once. ``viewers()`` are
    the event streams that the worker has open."""

    def __init__(self, teller: Teller, seconds: float, viewers: Callable[[], int]) -> None:
        self._teller, self._viewers = teller, viewers
        # Those that have begun to speak and are not over.
        self._speaking: set[str] = set()
        self._due: dict[str, Live] = {}
        self._seconds = seconds
        self._pacer = Pacer(seconds, self._tick) if seconds else None

    def wait(self, live: Live, connection: Any) -> None:
        """Returns when the run's ``connection`` is to be read: for its first words, at once."""
        pacer = self._pacer_of(live)
        if pacer is not None:
            pacer.wait(connection, live.bell)

    def _pacer_of(self, live: Live) -> Pacer | None:
        many = len(self._speaking) > _FEW or self._viewers() > _FEW
        return self._pacer if live.begun and many else None

    def add(self, live: Live, parts: Sequence[Part]) -> None:
        """Takes what arrived. Raises :class:`Interrupted` when the run is over, or another worker's."""
        with live.lock:
            if live.reply.over or live.left:
                raise Interrupted
            live.pending += live.ahead.rest(parts) if live.ahead else parts
            if live.upstream is not None:
                live.pending_state = live.upstream.state()
            pacer = self._pacer_of(live)
            if pacer is None:
                self._tell([(live, live.grow())])
        if pacer is not None:
            self._due[live.id] = live
            pacer.want()

    def flush(self, live: Live) -> None:
        """Tells what arrived by now."""
        with live.lock:
            if live.pending and not live.reply.over and not live.left:
                self._tell([(live, live.grow())])

    def forget(self, live: Live) -> None:
        """The run is over, or another worker's."""
        self._speaking.discard(live.id)

    def close(self) -> None:
        """Ticks no more."""
        if self._pacer is not None:
            self._pacer.close()

    def _tick(self) -> None:
        due, self._due = self._due, {}
        locked: list[Live] = []
        grown: list[tuple[Live, list[Event]]] = []
        try:
            # What was read in a turn of the pacer's is told in it; what came otherwise waits for one of its own.
            late = time.monotonic() - self._seconds * 0.75
            for live in due.values():
                if live.told > late or not live.lock.acquire(blocking=False):
                    self._due[live.id] = live
                    continue
                locked.append(live)
                if live.pending and not live.reply.over and not live.left:
                    try:
                        grown.append((live, live.grow()))
                    except Exception:
                        _log.exception("run %s failed", live.id)
                        live.stop = lambda reply: reply.fail(RunError("server_error"))
                        live.waits.interrupt()
            self._tell(grown)
        finally:
            for live in locked:
                live.lock.release()
        if self._due and self._pacer is not None:
            self._pacer.want()

    def _tell(self, grown: Sequence[tuple[Live, list[Event]]]) -> None:
        """Their locks are held."""
        told = [(live, events) for live, events in grown if events]
        if told:
            places = self._teller.tell_all([(live.thread_id, events) for live, events in told])
            now = time.monotonic()
            for (live, _), place in zip(told, places, strict=True):
                live.place = place or live.place
                live.dirty, live.told = True, now
                if not live.begun:
                    live.begun = True
                    self._speaking.add(live.id)
