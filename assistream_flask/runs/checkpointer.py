"""Stores how far the runs of this worker have come, while they grow."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from ..log.protocol import EventId
from ..store.sql import State
from .active_run import ActiveRun
from .message_accumulator import Stop
from .worker import Worker

_log = logging.getLogger(__name__)

_BATCH: Final = 20
_PAUSE_SECONDS: Final = 0.02


class Checkpointer:
    """Stores the runs of one worker, and has it leave those that are not its own any more."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def store(self, active: ActiveRun, *, rebased: bool = False) -> None:
        """Store what the run is now; ``rebased``, as of the end of the thread's log. Failures are for the next time."""
        store, appender = self._worker.store, self._worker.appender
        checkpoint = active.checkpoint
        with checkpoint.saving:
            found = self._look(active, rebased=rebased)
            if found is None:
                return
            state, event_id = found
            try:
                is_ours = store.save(self._worker.name, *state)
                is_gone = not is_ours and store.run(active.thread_id, active.id) is None
            except SQLAlchemyError as error:
                self._worker.throttle.error(_log, error, "the text of run %s cannot be stored yet", active.id)
                checkpoint.fail()
                return
            checkpoint.done(event_id)
        if not is_ours and not active.is_over:
            # Another worker took the run for lost, or the thread is gone; what was told since is to go.
            appender.mark_incomplete(active.thread_id, keep=not is_gone)
            if is_gone:
                # A response that goes on in the background is cancelled as the run ends.
                active.interrupt(Stop.CANCELLED)
                return
            with active.lock:
                active.leave()

    def _look(self, active: ActiveRun, *, rebased: bool = False) -> tuple[State, EventId | None] | None:
        """Give what to store, and as of which event; ``None`` where the run is over. ``saving`` is held."""
        checkpoint = active.checkpoint
        with active.lock:
            if active.is_over:
                return None
            if rebased:
                # Nothing of this run is appended meanwhile, so what it is now is exact there, if nothing was missed.
                is_incomplete = self._worker.appender.is_incomplete(active.thread_id)
                checkpoint.rebase(None if is_incomplete else self._worker.log.end(active.thread_id))
            checkpoint.begin()
            return active.state(), checkpoint.event_id

    def store_all(self, runs: Sequence[ActiveRun]) -> None:
        """Store many: a few in a transaction, with time between for all else."""
        for at in range(0, len(runs), _BATCH):
            if at:
                time.sleep(_PAUSE_SECONDS)
            for active in self._store_grown(runs[at : at + _BATCH]):
                self.store(active)

    def _store_grown(self, runs: Sequence[ActiveRun]) -> list[ActiveRun]:
        """Store, in one transaction, those that are this worker's; give the others."""
        with ExitStack() as stack:
            states, grown = [], []
            for active in runs:
                stack.enter_context(active.checkpoint.saving)
                found = self._look(active)
                if found is not None:
                    states.append(found[0])
                    grown.append((active, found[1]))
            try:
                ours = self._worker.store.save_grown(self._worker.name, states)
            except (DataError, IntegrityError):
                # What one of them has shall not keep the others.
                ours = set()
            except Exception as error:
                self._worker.throttle.error(_log, error, "the text of %d runs cannot be stored yet", len(grown))
                for active, _ in grown:
                    active.checkpoint.fail()
                return []
            for active, event_id in grown:
                if active.id in ours:
                    active.checkpoint.done(event_id)
        return [active for active, _ in grown if active.id not in ours]
