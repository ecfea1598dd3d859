"""What one worker process has: a store, a log, a runner, and the housekeeper that looks after them."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import server
from .events import new_id
from .live import Asked
from .log import Log
from .log.memory import MemoryLog
from .runner import Runner
from .settings import Settings
from .threads import ThreadStore

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 24 * 3600
"""How long an Idempotency-Key is remembered."""


class Runtime:
    """Made at the first request, in the worker: a fork or gevent's patching after it would break it."""

    def __init__(self, settings: Settings, adopt: Callable[[str, str], Asked | None]) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.store = ThreadStore(settings.database_url, settings.database_pool)
        self.worker = new_id("worker")
        self.log = _log_of(settings)
        self.runner = Runner(self.store, self.log, settings, self.worker, adopt, lambda: self.open_streams)
        self.log.listen(self.runner.attend)
        self.streams: dict[object, int] = {}
        self.open_streams = 0
        self.stopping = threading.Event()
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._stop_guard = threading.Lock()
        self._housekeeper = threading.Thread(target=self._keep_house, daemon=True, name="assistream-housekeeper")

    def start(self) -> None:
        """Starts the housekeeper."""
        self._housekeeper.start()
        # A worker that exits by itself still lets its runs end, see Settings.drain_seconds.
        atexit.register(self.stop)
        # For the SDK: each request asks until one has the answer, and each time a process is forked.
        with suppress(Exception):
            platform.platform()

    def discard(self) -> None:
        """Lets go of what was made, where it was never started."""
        self.log.close()
        self.store.close()

    def stop(self) -> None:
        """Ends streams at once and runs as the settings say; returns when all have. Idempotent."""
        if os.getpid() != self.pid:
            return
        self._begin_stop()
        with self._stop_guard:
            if not self._stopped.is_set():
                self.runner.stop(self.settings.drain_seconds)
                # Only now: while runs drain, the housekeeper keeps them this worker's.
                self._stopped.set()
                if self._housekeeper.is_alive():
                    self._housekeeper.join(5)
                self.runner.leave()
                self.runner.retell()
                self.log.close()
                self.store.close()
        atexit.unregister(self.stop)

    def _begin_stop(self) -> None:
        self.stopping.set()
        self.log.wake()
        self.runner.leave()

    def _keep_house(self) -> None:
        jobs: list[tuple[float, Callable[[], object]]] = [
            (self.settings.flush_seconds, self.runner.flush),
            (1.0, self.runner.renew),
            (1.0, self.runner.sweep),
            (0.5, self.runner.retell),
            (5.0, self.log.tend),
            (600.0, lambda: self.store.forget_answers(int(time.time()) - ANSWER_SECONDS)),
        ]
        due = [time.monotonic()] * len(jobs)
        while not self.stopping.wait(min(0.25, self.settings.flush_seconds)):
            if not server.serving():
                # At once: gunicorn lets the process end only when the last request has, however long that takes.
                threading.Thread(target=self.stop, daemon=True, name="assistream-stop").start()
                break
            for at, (every, job) in enumerate(jobs):
                if time.monotonic() >= due[at]:
                    due[at] = time.monotonic() + every
                    try:
                        job()
                    except Exception:
                        _log.exception("housekeeping failed; it is tried again")
        # While runs drain, their leases and their text still need looking after.
        while not self._stopped.wait(1):
            try:
                self.runner.renew()
                self.runner.flush()
                self.runner.retell()
            except Exception:
                _log.exception("housekeeping failed; it is tried again")

    def enter_stream(self, caller: object) -> bool:
        """Counts a stream in; ``False`` when ``caller`` has as many as allowed."""
        with self._guard:
            count = self.streams.get(caller, 0)
            if count >= self.settings.max_streams:
                return False
            self.streams[caller] = count + 1
            self.open_streams += 1
            return True

    def full(self) -> bool:
        """Whether the worker has as many streams as it can, so that commands still find a connection."""
        most = self.settings.worker_streams or (server.setting("worker_connections") or 1_000_000) * 9 // 10
        return self.open_streams >= most

    def leave_stream(self, caller: object) -> None:
        """Counts a stream out."""
        with self._guard:
            self.open_streams -= 1
            self.streams[caller] -= 1
            if not self.streams[caller]:
                del self.streams[caller]


def _log_of(settings: Settings) -> Log:
    if not settings.redis_url:
        return MemoryLog(max_events=settings.log_events, max_bytes=settings.log_bytes, max_age=settings.log_seconds)
    # Redis's client is an extra.
    from .log.redis import RedisLog

    return RedisLog(
        settings.redis_url,
        max_events=settings.log_events,
        max_bytes=settings.log_bytes,
        max_age=settings.log_seconds,
    )


def default_database(instance_path: str) -> str:
    """Gives the URL of the SQLite file in the app's instance folder, which is created."""
    folder = Path(instance_path)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'assistream.sqlite3'}"
