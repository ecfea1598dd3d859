"""What one worker process has: a store, a log, a runner, and the housekeeper that looks after them."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..events import new_id
from ..fast.install import install
from ..log.memory import MemoryLog
from ..log.protocol import Log
from ..platform import gunicorn, threaded
from ..platform.log_throttle import LogThrottle
from ..settings import Settings
from ..store.leases import Leases
from ..store.sql import Owner, ThreadStore
from .byte_budget import ByteBudget, MinuteBudget
from .notifier import Listener, Notifier
from .open_bodies import OpenBodies
from .open_streams import OpenStreams
from .runner import Runner
from .shared_snapshots import ReadLimit, SharedSnapshots
from .thread_history import RunRequest
from .worker_restart import WorkerRestart

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 24 * 3600
"""How long an Idempotency-Key is remembered."""
_LOOK_SECONDS: Final = 0.25
_PAUSES_SECONDS: Final = 600.0
# So long the app may take at the end for what it is told last.
_NOTICE_SECONDS: Final = 5.0


class Runtime:
    """Made in the worker: a fork or gevent's patching after it would break it."""

    def __init__(
        self,
        settings: Settings,
        adopt: Callable[[Owner, str], RunRequest | None],
        throttle: LogThrottle | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.settings = settings
        self._throttle = throttle or LogThrottle()
        self._notifier = Notifier(listener, self._throttle)
        self.pid = os.getpid()
        # One connection is for the leases.
        self.store = ThreadStore(settings.database_url, max(1, settings.database_pool - 1))
        self.worker = new_id("worker")
        try:
            self.log = _log_of(settings, self._throttle)
        except BaseException:
            self.store.close()
            raise
        self.runner = Runner(
            self.store,
            self.log,
            settings,
            self.worker,
            adopt,
            lambda: self.streams.count,
            lambda: self.leases.is_steady(),
            self._throttle,
            self._notifier,
        )
        self.leases = Leases(
            settings.database_url,
            self.worker,
            self.runner.held,
            is_shared=self.log.shared,
            throttle=self._throttle,
        )
        self.snapshots = SharedSnapshots(
            lambda thread_id, most_bytes, read_limit: self.runner.page(
                thread_id, 50, read_limit=read_limit, most_bytes=most_bytes
            )
        )
        self.log.listen(self.runner.attend)
        self.arrivals = ReadLimit()
        self.budget = ByteBudget(settings.max_bytes)
        self.sessions = MinuteBudget(settings.address_sessions)
        self.bodies = OpenBodies(settings.address_bodies)
        self.streams = OpenStreams(settings)
        self.stopping = threading.Event()
        self._stopped, self._closed = threading.Event(), False
        self._stop_guard = threading.Lock()
        # How late each look at the server was: that is how long nothing else could go on.
        self._pauses: deque[float] = deque(maxlen=int(_PAUSES_SECONDS / _LOOK_SECONDS))
        self._upkeep = [threading.Thread(target=self._keep_house, daemon=True, name="assistream-housekeeper")]
        # Each in a thread of its own: a store that is waited for holds up none of the others.
        for name, seconds, job, end in (
            ("flush", settings.flush_seconds, self.runner.flush, self._stopped),
            ("heed", 1.0, self.runner.heed, self._stopped),
            ("rebuild", 0.5, self.runner.rebuild, self._stopped),
            ("sweep", 1.0, self.runner.sweep, self.stopping),
            ("tend", 5.0, self._tend, self.stopping),
            ("forget", 600.0, self._forget, self.stopping),
        ):
            work = threading.Thread(
                target=self._repeat, args=(seconds, job, end), daemon=True, name=f"assistream-{name}"
            )
            self._upkeep.append(work)
        self._restart: WorkerRestart | None = None

    def start(self) -> None:
        """Start what keeps the worker's house."""
        install(self.settings.fast)
        self._restart = gunicorn.kept(WorkerRestart)
        if self._restart is not None:
            has_others = self.log.shared and (gunicorn.setting("workers") or 1) > 1
            self._restart.join(self.runner.shutdown, self.settings.run_seconds, has_others)
        self.leases.start()
        for work in self._upkeep:
            work.start()
        # A worker that exits by itself still lets its runs end, see Settings.drain_seconds.
        atexit.register(self.stop)
        # For the SDK: each request asks until one has the answer, and each time a process is forked.
        with suppress(Exception):
            platform.platform()

    def stop(self) -> None:
        """End streams at once and runs as the settings say; return when all have, and nothing is served any more.
        Idempotent."""
        if os.getpid() != self.pid:
            return
        self._end_work()
        with self._stop_guard:
            if not self._closed:
                self._closed = True
                self.runner.shutdown.leave()
                self.runner.rebuild()
                self.runner.executions.close()
                self._notifier.drain(_NOTICE_SECONDS)
                self.leases.stop(is_clean=self.runner.has_told_all())
                self.log.close()
                self.store.close()
        atexit.unregister(self.stop)

    def _end_work(self) -> None:
        """Do so, and leave log and store open: gunicorn serves for a while longer."""
        self._begin_stop()
        with self._stop_guard:
            if not self._stopped.is_set():
                # Who develops waits for the next process, and not for answers.
                self.runner.shutdown.stop(0 if threaded.is_reloaded() else self.settings.drain_seconds)
                # Only now: while runs drain, they are this worker's, and their text is stored.
                self._stopped.set()
                until = time.monotonic() + 5
                for work in self._upkeep:
                    if work.is_alive():
                        work.join(max(0.0, until - time.monotonic()))

    def _begin_stop(self) -> None:
        self.stopping.set()
        self.log.wake()
        self.runner.shutdown.leave()

    def _keep_house(self) -> None:
        while True:
            before = time.monotonic()
            if self.stopping.wait(_LOOK_SECONDS):
                return
            self._pauses.append(time.monotonic() - before - _LOOK_SECONDS)
            if self._restart is not None:
                self._restart.look()
            if not gunicorn.serving():
                # At once: gunicorn lets the process end only when the last request has, however long that takes.
                threading.Thread(target=self._end_work, daemon=True, name="assistream-stop").start()
                return

    def longest_pause(self) -> float:
        """Give for how many seconds, at most, nothing went on in this worker within the last ten minutes."""
        return max(self._pauses, default=0.0)

    def _repeat(self, seconds: float, job: Callable[[], object], end: threading.Event) -> None:
        while True:
            try:
                job()
            except Exception as error:
                self._throttle.error(_log, error, "housekeeping failed; it is tried again")
            if end.wait(seconds):
                return

    def _tend(self) -> None:
        self.log.tend()
        self._throttle.tend()

    def _forget(self) -> None:
        self.store.forget_answers(int(time.time()) - ANSWER_SECONDS)

    @property
    def open_streams(self) -> int:
        """Give how many event streams are open."""
        return self.streams.count

    def most_streams(self, server: threaded.ThreadedServer | None = None) -> int:
        """Give how many streams the worker can have, so that commands still find a connection, or one of the threads of
        a ``server`` that has few."""
        wanted = self.settings.worker_streams
        most = wanted or (gunicorn.setting("worker_connections") or 1_000_000) * 9 // 10
        return most if server is None else min(most, server.most_streams(wanted))


def _log_of(settings: Settings, throttle: LogThrottle) -> Log:
    if not settings.redis_url:
        return MemoryLog(
            max_events=settings.log_events,
            max_bytes=settings.log_bytes,
            max_memory=settings.log_memory,
            max_age=settings.log_seconds,
            throttle=throttle,
        )
    # Redis's client is an extra.
    from ..log.redis import RedisLog

    return RedisLog(
        settings.redis_url,
        max_events=settings.log_events,
        max_bytes=settings.log_bytes,
        max_memory=settings.log_memory,
        max_age=settings.log_seconds,
        throttle=throttle,
    )


def default_database(instance_path: str) -> str:
    """Give the URL of the SQLite file in the app's instance folder, which is created, for this user alone."""
    folder = Path(instance_path)
    folder.mkdir(0o700, parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'assistream.sqlite3'}"
