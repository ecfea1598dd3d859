"""Stores how far the runs of this worker have come, while they grow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from ..log.protocol import EventId, Log
from ..platform.log_throttle import LogThrottle
from ..store.sql import State, ThreadStore
from .active_run import ActiveRun
from .log_appender import LogAppender

_log = logging.getLogger(__name__)

_BATCH: Final = 20
_PAUSE_SECONDS: Final = 0.02


class Checkpointer:
    """Stores the runs of one ``worker``. ``lost`` is called for one that is not the worker's any more."""

    def __init__(
        self,
        store: ThreadStore,
        log: Log,
        teller: LogAppender,
        worker: str,
        lost: Callable[[ActiveRun], None],
        complaints: LogThrottle | None = None,
    ) -> None:
        self._store, self._log, self._teller = store, log, teller
        self._worker, self._lost = worker, lost
        self._complaints = complaints or LogThrottle()

    def keep(self, live: ActiveRun, anew: bool = False) -> None:
        """Stores what the run is now; ``anew``, as of the log's end. Failures are for the next time."""
        with live.saving:
            found = self._look(live, anew)
            if found is None:
                return
            state, place = found
            try:
                mine = self._store.save(self._worker, *state)
                is_gone = not mine and self._store.run(live.thread_id, live.id) is None
            except SQLAlchemyError as error:
                self._complaints.error(_log, error, "the text of run %s cannot be stored yet", live.id)
                live.dirty = True
                return
            live.kept = place.epoch if place else ""
        if not mine and not live.reply.over:
            # Another worker took the run for lost, or the thread is gone; what was told since is to go.
            self._teller.untell(live.thread_id, keep=not is_gone)
            self._lost(live)

    def _look(self, live: ActiveRun, anew: bool = False) -> tuple[State, EventId | None] | None:
        """Gives what to store, and as of when; ``None`` when the run is over. Its ``saving`` is held."""
        with live.lock:
            if live.reply.over:
                return None
            if anew:
                # Nothing of this run is appended meanwhile, so what it is now is exact there, if nothing was missed.
                live.place = None if self._teller.lacks(live.thread_id) else self._log.end(live.thread_id)
            live.dirty = False
            return live.now(), live.place

    def keep_all(self, lives: Sequence[ActiveRun]) -> None:
        """Does so for many: a few in a transaction, with time between for all else."""
        for at in range(0, len(lives), _BATCH):
            if at:
                time.sleep(_PAUSE_SECONDS)
            for live in self._left(lives[at : at + _BATCH]):
                self.keep(live)

    def _left(self, lives: Sequence[ActiveRun]) -> list[ActiveRun]:
        """Stores those that have grown; gives those that may be another's."""
        with ExitStack() as stack:
            states, grown = [], []
            for live in lives:
                stack.enter_context(live.saving)
                found = self._look(live)
                if found is not None:
                    states.append(found[0])
                    grown.append((live, found[1]))
            try:
                mine = self._store.save_grown(self._worker, states)
            except (DataError, IntegrityError):
                # What one of them has shall not keep the others.
                mine = set()
            except Exception as error:
                self._complaints.error(_log, error, "the text of %d runs cannot be stored yet", len(grown))
                for live, _ in grown:
                    live.dirty = True
                return []
            for live, place in grown:
                if live.id in mine:
                    live.kept = place.epoch if place else ""
        return [live for live, _ in grown if live.id not in mine]
