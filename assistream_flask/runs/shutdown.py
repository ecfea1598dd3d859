"""The end of a worker: what it answers ends first, or goes to the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from ..store.sql import RELEASED
from ..store.tables import runs
from .active_run import ActiveRun
from .checkpointer import Checkpointer
from .executor import Executor
from .message_accumulator import Stop
from .recovery import can_go_on
from .run_changes import RunChanges
from .worker import Worker

_log = logging.getLogger(__name__)

_HANDED_SECONDS: Final = 1.0
_CUT_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.25


class Shutdown:
    """Ends the work of one worker. It is a :class:`.worker_restart.Workload` too: of one that ends between answers."""

    def __init__(self, worker: Worker, executor: Executor, changes: RunChanges, checkpointer: Checkpointer) -> None:
        self._worker, self._executor, self._changes, self._checkpointer = worker, executor, changes, checkpointer

    def is_busy(self) -> bool:
        """Tell whether anything is under way that no other worker can go on with."""
        return any(
            active.resume_state is None or self._worker.adopt(active.owner, active.run["assistant_id"]) is None
            for active in self._worker.runs.all()
        )

    def rest(self) -> None:
        """Have nothing begin here any more."""
        self._worker.resting.set()

    def resume(self) -> None:
        """Have what is asked begin again."""
        self._worker.resting.clear()

    def is_ignored(self, seconds: float) -> bool:
        """Tell whether nobody took, for so long, what was left."""
        return bool(self._worker.store.held(RELEASED, runs.c.created_at < time.time() - seconds))

    def leave(self) -> None:
        """Start nothing any more, and leave queued runs to the next worker."""
        self._worker.stopping.set()
        self.release()

    def stop(self, drain: float) -> None:
        """Give the runs under way ``drain`` seconds, then cut them off. Call :meth:`leave` before."""
        until = time.monotonic() + drain
        is_first = True
        while True:
            # Also those whose response is known of only now.
            self._hand_over(
                [one for one in self._worker.runs.all() if one.resume_state is not None and not one.is_over]
            )
            late = [active for active in self._worker.runs.all() if not active.is_queued]
            left = until - time.monotonic()
            if not late or left <= 0:
                break
            if is_first:
                _log.warning("shutting down: waiting up to %g s for the runs under way (%d)", drain, len(late))
            is_first = False
            _wait_for(late, min(left, _LOOK_SECONDS))
        # Asked for under a key, so that the next worker, which asks again, may get the same response.
        self._hand_over([active for active in late if can_go_on(active)])
        late = [active for active in late if not active.wait_done()]
        for active in late:
            active.interrupt(Stop.SHUTDOWN)
        _wait_for(late, _CUT_SECONDS)
        for active in late:
            self._executor.end(active, Stop.SHUTDOWN)
        self._executor.close()

    def _hand_over(self, handed: Sequence[ActiveRun]) -> None:
        """Leave background responses to the next worker, which goes on behind what is stored here."""
        for active in handed:
            self._changes.leave(active)
        _wait_for(handed, _HANDED_SECONDS)
        for active in handed:
            # Or the lease of one that nothing can stop would be renewed.
            self._executor.forget(active)
        self._checkpointer.store_all(handed)
        if handed:
            self.release([active.id for active in handed])

    def release(self, run_ids: Sequence[str] = ()) -> None:
        """Let other workers take the runs, or, where none are named, those that are queued."""
        try:
            self._worker.store.release(self._worker.name, *run_ids)
        except SQLAlchemyError as error:
            self._worker.throttle.error(_log, error, "runs that are left wait until their lease ends")


def _wait_for(runs: Sequence[ActiveRun], seconds: float) -> None:
    """Wait until they are done, at most so long for all of them."""
    until = time.monotonic() + seconds
    for active in runs:
        active.wait_done(max(0.0, until - time.monotonic()))
