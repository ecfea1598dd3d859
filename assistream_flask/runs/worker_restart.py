"""A worker that has served gunicorn's ``--max-requests`` ends between answers, not in the midst of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from ..platform import gunicorn

# With others beside it, so long is waited for a moment without an answer.
_PATIENCE_SECONDS: Final = 10.0
# What others take they take within a second or so.
_TAKEN_SECONDS: Final = 3.0


class Workload(Protocol):
    """What works in a worker, and has to be done before that ends."""

    def is_busy(self) -> bool:
        """Tell whether anything is under way that no other worker can go on with."""
        ...

    def rest(self) -> None:
        """Begin nothing any more, and leave it to another worker."""
        ...

    def resume(self) -> None:
        """Begin what is asked again."""
        ...

    def is_ignored(self, seconds: float) -> bool:
        """Tell whether nobody took, for so long, what was left."""
        ...


class WorkerRestart:
    """The end of one worker. It serves all requests until the last moment, and waits for one without an answer.

    With others beside it, which take what is asked meanwhile, that comes when the answers under way are over. One that
    is alone goes on answering; only where such a moment does not come for as long as an answer may take, what is asked
    waits for its successor. ``clock`` gives seconds and is for tests.
    """

    def __init__(self, request_limit: gunicorn.RequestLimit, clock: Callable[[], float] = time.monotonic) -> None:
        self._request_limit, self._clock = request_limit, clock
        self._guard = threading.Lock()
        self._workloads: list[Workload] = []
        self._has_others, self._run_seconds = True, 0.0
        # Since when it is to end, has the turn for that, and begins nothing any more.
        self._due: float | None = None
        self._ready: float | None = None
        self._rested: float | None = None

    def join(self, workload: Workload, run_seconds: float, has_others: bool) -> None:
        """Have the worker wait for ``workload``, whose answers take ``run_seconds`` at most; ``has_others`` says
        whether other workers can take what it leaves."""
        self._workloads.append(workload)
        self._run_seconds = max(self._run_seconds, run_seconds)
        self._has_others = self._has_others and has_others

    def look(self) -> None:
        """End the worker where it is time. Called a few times a second, by each workload."""
        if self._request_limit.is_over() and self._guard.acquire(blocking=False):
            try:
                self._look(self._clock())
            finally:
                self._guard.release()

    def _look(self, now: float) -> None:
        if self._due is None:
            self._due = now
        if self._ready is None:
            # Somebody who has the turn for longer than it can take has it no more.
            if not self._request_limit.has_turn() and now - self._due < 3 * self._run_seconds:
                return
            self._ready = now
        waited = now - self._ready
        is_patient = waited < (_PATIENCE_SECONDS if self._has_others else self._run_seconds)
        if self._rested is None:
            if is_patient and self._is_busy():
                return
            self._rested = now
            for workload in self._workloads:
                workload.rest()
        if not self._is_busy() or now - self._rested > self._run_seconds:
            self._request_limit.end()
        elif is_patient or self._is_ignored():
            # Something had begun before the rest did; or the others do not work yet.
            self._rested = None
            for workload in self._workloads:
                workload.resume()

    def _is_busy(self) -> bool:
        return any(workload.is_busy() for workload in self._workloads)

    def _is_ignored(self) -> bool:
        if self._has_others and any(workload.is_ignored(_TAKEN_SECONDS) for workload in self._workloads):
            self._has_others = False
            return True
        return False
