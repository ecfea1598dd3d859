"""The order of a thread's runs: groups one after another, the runs of a group at once."""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable
from contextlib import closing

from sqlalchemy.exc import SQLAlchemyError

from ..events import RUN_ENDS
from ..log.protocol import LogUnavailableError, PositionExpiredError
from ..platform.threads import spawn
from .active_run import ActiveRun
from .worker import Worker

_log = logging.getLogger(__name__)


class RunQueue:
    """The queues of one worker's threads. ``perform`` does one run from beginning to end, in a thread of its own;
    ``go_on_without`` ends the runs before one that wait for a person, and are of other commands."""

    def __init__(
        self, worker: Worker, perform: Callable[[ActiveRun], None], go_on_without: Callable[[ActiveRun], None]
    ) -> None:
        self._worker, self._perform, self._go_on_without = worker, perform, go_on_without
        # Under it only ActiveRuns' own is taken.
        self._guard = threading.Lock()
        self._groups: dict[str, list[list[ActiveRun]]] = {}

    def add(self, thread_id: str, runs: list[ActiveRun], mode: str) -> None:
        """Take the runs of one command, which begin when all before them are over: together where ``mode`` is
        ``parallel``. Does nothing while the worker ends."""
        if not runs or self._worker.stopping.is_set():
            return
        with self._guard:
            self._worker.runs.add(runs)
            is_idle = thread_id not in self._groups
            groups = self._groups.setdefault(thread_id, [])
            for group in [runs] if mode == "parallel" else [[active] for active in runs]:
                insort(groups, group, key=lambda group: group[0].position)
        if is_idle:
            spawn(f"assistream-queue-{thread_id}", self._work, thread_id)

    def _work(self, thread_id: str) -> None:
        while True:
            with self._guard:
                if not self._groups[thread_id] or self._worker.stopping.is_set():
                    del self._groups[thread_id]
                    return
                group = self._groups[thread_id][0]
            if not self._is_behind_another(group[0]):
                break
        with self._guard:
            self._groups[thread_id].remove(group)
        spawn(f"assistream-queue-{thread_id}", self._go_on, thread_id, group)
        first, *more = group
        for active in more:
            spawn(f"assistream-{active.id}", self._perform, active)
        # Here, not behind all that the worker does.
        self._perform(first)

    def _go_on(self, thread_id: str, group: list[ActiveRun]) -> None:
        for active in group:
            active.wait_done(None)
        self._work(thread_id)

    def _is_behind_another(self, active: ActiveRun) -> bool:
        """Tell whether a run before it is not over, whichever worker has that; wait then, for a while, for its end."""
        log, stopping = self._worker.log, self._worker.stopping
        try:
            end = log.end(active.thread_id)
            if not self._worker.store.busy_before(active.thread_id, active.position, active.group_id):
                return False
            self._go_on_without(active)
            until = time.monotonic() + 1
            with closing(log.subscribe(active.thread_id, end)) as reader:
                while (left := until - time.monotonic()) > 0 and not stopping.is_set():
                    if any(record.name in RUN_ENDS for record in reader.read(left)):
                        break
        except (PositionExpiredError, LogUnavailableError):
            stopping.wait(0.25)
        except SQLAlchemyError as error:
            self._worker.throttle.error(_log, error, "the store failed")
            stopping.wait(1)
        return True
