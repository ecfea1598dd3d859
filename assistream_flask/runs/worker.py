"""What the parts of one worker share: where it stores and tells, its name, and the runs that it has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from ..log.protocol import Log
from ..platform.log_throttle import LogThrottle
from ..settings import Settings
from ..store.sql import Owner, ThreadStore
from .active_run import ActiveRun
from .log_appender import LogAppender
from .notifier import Notifier
from .thread_history import RunRequest


class ActiveRuns:
    """The runs that one worker has, by id. Reading needs no lock: each look is at a copy, or at one entry."""

    def __init__(self) -> None:
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        self._runs: dict[str, ActiveRun] = {}

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._runs

    def get(self, run_id: str) -> ActiveRun | None:
        """Give the run, ``None`` where this worker has none of that id."""
        return self._runs.get(run_id)

    def all(self) -> list[ActiveRun]:
        """Give all of them, in the order in which they came to this worker."""
        return list(self._runs.values())

    def of_thread(self, thread_id: str) -> list[ActiveRun]:
        """Give those of a thread."""
        return [active for active in self.all() if active.thread_id == thread_id]

    def add(self, runs: list[ActiveRun]) -> None:
        """Take more."""
        with self._guard:
            self._runs.update((active.id, active) for active in runs)

    def discard(self, active: ActiveRun) -> None:
        """Forget a run."""
        with self._guard:
            # What came back late may be of a run that this worker has anew.
            if self._runs.get(active.id) is active:
                del self._runs[active.id]


class Worker(NamedTuple):
    """``name`` is the worker's in the store.

    ``adopt`` gives the assistant for a run that another worker left behind, by the thread's owner and its id, or
    ``None``; ``is_steady`` tells whether all workers could renew their leases for as long as those are. Of the two
    events, ``resting`` says that it begins nothing any more, and ``stopping`` that it is about to end.
    """

    name: str
    store: ThreadStore
    log: Log
    settings: Settings
    appender: LogAppender
    runs: ActiveRuns
    notifier: Notifier
    throttle: LogThrottle
    adopt: Callable[[Owner, str], RunRequest | None]
    is_steady: Callable[[], bool]
    resting: threading.Event
    stopping: threading.Event
