"""What the parts of one worker share: where it stores and tells, its name, and the runs that it has."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import RequestError
from ..log.protocol import Log
from ..platform.log_throttle import LogThrottle
from ..settings import Settings
from ..store.sql import Owner, ThreadStore
from ..store.tool_calls import ToolCallStore
from .active_run import ActiveRun
from .log_appender import LogAppender
from .notifier import Notifier
from .thread_history import RunRequest
from .tracing import Tracing


class ActiveRuns:
    """The runs that one worker has, by id. Reading needs no lock: each look is at a copy, or at one entry."""

    def __init__(self) -> None:
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        self._runs: dict[str, ActiveRun] = {}
        # By address, those that are about to be stored.
        self._coming: Counter[str] = Counter()

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

    @contextmanager
    def room(self, address: str | None, count: int, most: int) -> Iterator[None]:
        """Keep room for ``count`` runs from ``address`` while they are stored, where it has fewer than ``most`` (0: no
        limit). Raises :class:`RequestError` where it has not."""
        if address is None or not most or not count:
            yield
            return
        with self._guard:
            # One that waits for a person is seen to wait before it is let go.
            theirs = sum(
                active.address == address and active.run["status"] != "requires_action"
                for active in self._runs.values()
            )
            if theirs + self._coming[address] + count > most:
                said = f"{most} answers may be waiting or under way from your address. Wait for one to end."
                raise RequestError(429, "too_many_address_runs", said, retry_after=5)
            self._coming[address] += count
        try:
            yield
        finally:
            with self._guard:
                self._coming[address] -= count
                # Zeros too.
                self._coming = +self._coming

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
    tool_calls: ToolCallStore
    log: Log
    settings: Settings
    appender: LogAppender
    runs: ActiveRuns
    notifier: Notifier
    throttle: LogThrottle
    tracing: Tracing
    adopt: Callable[[Owner, str], RunRequest | None]
    is_steady: Callable[[], bool]
    resting: threading.Event
    stopping: threading.Event
