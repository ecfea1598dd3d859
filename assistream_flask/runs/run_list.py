"""Runs that a command began, as a list that can be waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from ..errors import NotFoundError, WaitTimeoutError
from ..events import RUN_ENDS, TERMINAL
from ..log.protocol import EventId, LogUnavailableError, PositionExpiredError
from ..types import Entry, Run
from .runtime import Runtime

_LOOK_SECONDS: Final = 1.0
# Where nothing wakes who waits.
_PAUSE_SECONDS: Final = 0.25


class RunList(list[Run]):
    """The run objects that one command began, in the order of their assistants.

    ``message`` is the entry of the user's message that went before them, ``None`` where there was none. The objects
    are as they were when the list was made: :meth:`wait` gives them ended.
    """

    def __init__(
        self, runs: Sequence[Run], message: Entry | None, wait: Callable[[Sequence[Run], float | None], list[Run]]
    ) -> None:
        super().__init__(runs)
        self.message = message
        self._wait = wait

    def wait(self, timeout: float | None = None) -> RunList:
        """Wait until all of them have ended; give them as they are then, in the same order.

        ``timeout`` is in seconds, for all of them together; without it the wait lasts as long as they do. A run that
        fails ends too: look at ``status``, which is ``completed``, ``incomplete``, ``failed`` or ``cancelled``, and at
        ``last_error``. Whichever worker has a run, or takes it over, its end is seen, at the latest a second after.

        Raises :class:`.WaitTimeoutError`, a :class:`TimeoutError`, when the time is over, and the runs go on;
        :class:`.NotFoundError` when the thread was deleted meanwhile; SQLAlchemy's error when the database is still
        away when the time is over.
        """
        return RunList(self._wait(self, timeout), self.message, self._wait)


class RunWaiter:
    """Waits for runs of a thread: looks at the store, and has the thread's event log say when to look again."""

    def __init__(self, runtime: Runtime, thread_id: str) -> None:
        self._runtime, self._thread_id = runtime, thread_id

    def wait(self, runs: Sequence[Run], timeout: float | None) -> list[Run]:
        """Give the runs when they have ended. Raises what :meth:`RunList.wait` raises."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        waiting = {run["id"] for run in runs}
        ended: dict[str, Run] = {}
        while True:
            # Before the store is looked at: an end that is stored after that is told after this place.
            event_id = self._end_of_log()
            try:
                ended |= self._ended(waiting)
            except SQLAlchemyError:
                event_id = None
                if time.monotonic() >= until:
                    raise
            waiting -= ended.keys()
            if not waiting:
                return [ended[run["id"]] for run in runs]
            left = until - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(
                    f"{len(waiting)} of {len(runs)} runs have not ended within {timeout:g} s; they go on"
                )
            self._listen(event_id, min(left, _LOOK_SECONDS), waiting)

    def _ended(self, run_ids: Collection[str]) -> dict[str, Run]:
        found: dict[str, Run] = {}
        for run_id in run_ids:
            run = self._runtime.store.run(self._thread_id, run_id)
            if run is None:
                raise NotFoundError("run_not_found", "The thread was deleted, and its runs with it.")
            if run["status"] in TERMINAL:
                found[run_id] = run
        return found

    def _end_of_log(self) -> EventId | None:
        try:
            return self._runtime.log.end(self._thread_id)
        except LogUnavailableError:
            return None

    def _listen(self, event_id: EventId | None, seconds: float, run_ids: Collection[str]) -> None:
        """Wait for so many seconds at most, or until the log has an end of one of the runs after ``event_id``."""
        until = time.monotonic() + seconds
        try:
            # The log of a worker that leaves wakes all who read it, again and again.
            if event_id is not None and not self._runtime.stopping.is_set():
                with closing(self._runtime.log.subscribe(self._thread_id, event_id)) as reader:
                    while (left := until - time.monotonic()) > 0 and not self._runtime.stopping.is_set():
                        for record in reader.read(left):
                            if record.name == "thread.deleted" or (record.name in RUN_ENDS and record.key in run_ids):
                                return
                    return
        except (PositionExpiredError, LogUnavailableError):
            pass
        time.sleep(max(0.0, min(_PAUSE_SECONDS, until - time.monotonic())))
