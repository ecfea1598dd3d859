"""What arrives for a run goes to its reply and to the log: the first of it at once, the rest a tick at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

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
    """Tells what the runs of one worker grow by; ``seconds`` is a turn, 0 is for telling all at once. ``viewers()`` are
    the event streams that the worker has open; ``plain`` says of what arrived for a run that it is to be told, and that
    nothing else is to be done for it."""

    def __init__(
        self,
        teller: Teller,
        seconds: float,
        viewers: Callable[[], int],
        plain: Callable[[Live, Sequence[Part]], bool],
    ) -> None:
        self._teller, self._viewers, self._plain = teller, viewers, plain
        # Those that have begun to speak and are not over.
        self._speaking: set[str] = set()
        self._due: dict[str, Live] = {}
        self._seconds = seconds
        self._pacer: Pacer[Live] | None = Pacer(seconds, self._tick) if seconds else None

    def next(self, live: Live) -> Sequence[Part] | None:
        """Gives the run's next parts, without those that were told in its turns; ``None`` at the end. Raises what its
        stream does."""
        while (parts := next(live.batches, None)) is not None and not parts:
            if live.seat.socket is None or (pacer := self._pacer_of(live)) is None:
                continue
            left = pacer.wait(live)
            if isinstance(left, Exception):
                raise left
            if left is not None:
                return cast("Sequence[Part]", left)
        return parts

    def _pacer_of(self, live: Live) -> Pacer[Live] | None:
        many = len(self._speaking) > _FEW or self._viewers() > _FEW
        return self._pacer if live.begun and many else None

    def add(self, live: Live, parts: Sequence[Part]) -> None:
        """Takes what arrived. Raises :class:`Interrupted` when the run is over, or another worker's."""
        with live.lock:
            if live.reply.over or live.left:
                raise Interrupted
            live.take(parts)
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

    def _tick(self, ready: Sequence[Live]) -> None:
        assert self._pacer is not None
        due, self._due = self._due, {}
        locked: list[Live] = []
        try:
            for live in ready:
                if not live.lock.acquire(blocking=False):
                    live.seat.left.put(None)
                    continue
                locked.append(live)
                due.pop(live.id, None)
                if self._read(live):
                    self._pacer.again(live)
            # What was read elsewhere.
            late = time.monotonic() - self._seconds * 0.75
            for live in due.values():
                if live.told > late or not live.lock.acquire(blocking=False):
                    self._due[live.id] = live
                else:
                    locked.append(live)
            grown: list[tuple[Live, list[Event]]] = []
            for live in locked:
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
        if self._due:
            self._pacer.want()

    def _read(self, live: Live) -> bool:
        """Takes what the stream has; gives ``False`` where its own reader is to go on. Its lock is held."""
        left: object = None
        try:
            if not live.seat.read():
                return True
            while (parts := next(live.batches)) and self._plain(live, parts):
                live.take(parts)
            if not parts and live.seat.socket is not None:
                return True
            left = parts or None
        except (OSError, StopIteration):
            # The reader meets it too.
            pass
        except Exception as error:
            left = error
        live.seat.left.put(left)
        return False

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
