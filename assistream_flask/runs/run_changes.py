"""Changes what a run is: in the store, and then for its viewers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from ..events import Event
from ..log.protocol import REFUSED, LogUnavailableError
from ..platform.interrupt import Interrupted
from .active_run import ActiveRun
from .worker import Worker

_log = logging.getLogger(__name__)

T = TypeVar("T")


class RunChanges:
    """The changes of one worker's runs."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def patiently(self, active: ActiveRun, call: Callable[[], T]) -> T:
        """Give what ``call`` gives, as soon as store and log can be reached. Raises :class:`Interrupted`."""
        while True:
            try:
                return call()
            except (LogUnavailableError, SQLAlchemyError) as error:
                self._worker.throttle.warn(_log, "run %s waits for the store or the log: %r", active.id, error)
                if active.wait_done(1):
                    raise Interrupted from error
                if self._worker.stopping.is_set():
                    self.leave(active)
                    raise Interrupted from error

    def change(
        self, active: ActiveRun, change: Callable[[], list[Event]], store: Callable[[], bool] | None = None
    ) -> None:
        """Change what the run is, in the store and then for its viewers: ``change`` gives the events that tell of it,
        ``store`` stores it, as :meth:`.ThreadStore.save` does. Raises :class:`Interrupted` where it is another
        worker's, or over."""
        worker, checkpoint = self._worker, active.checkpoint
        with worker.log.lock(active.thread_id), checkpoint.saving, active.lock:
            # Another thread may be about to tell its end, with what it was then.
            if active.is_over or active.is_left:
                raise Interrupted
            told = change()
            is_ours = store() if store is not None else worker.store.save(worker.name, *active.state())
            if not is_ours:
                active.leave()
                raise Interrupted
            event_id = worker.appender.append(active.thread_id, told, active.claim)
            if event_id is REFUSED:
                # Taken between the two. Its next holder tells of what is stored with a snapshot.
                worker.appender.mark_incomplete(active.thread_id)
                active.leave()
                raise Interrupted
            checkpoint.rebase(event_id or checkpoint.event_id)

    def once(
        self, active: ActiveRun, change: Callable[[], list[Event]], store: Callable[[], bool] | None = None
    ) -> None:
        """Do as :meth:`change`, as soon as store and log can be reached: it is changed once, however often it takes to
        store that."""
        changed = cache(change)
        self.patiently(active, lambda: self.change(active, changed, store))

    def leave(self, active: ActiveRun) -> None:
        """Do no more for a run that another worker has, or may have."""
        with active.lock:
            active.leave()
