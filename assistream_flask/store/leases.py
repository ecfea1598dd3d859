"""A worker's runs are its own as long as it renews their leases, which a thread does that nothing else holds up."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Collection
from typing import Final

from gevent import get_hub, monkey
from sqlalchemy.exc import SQLAlchemyError

from ..errors import masked
from ..platform.log_throttle import LogThrottle
from . import database
from .sql import ThreadStore

_log = logging.getLogger(__name__)

LEASE_SECONDS: Final = 10.0
"""A run whose worker has not renewed its lease for so long is another worker's to end, or to go on with."""
_RENEW_SECONDS: Final = 1.0
# So long a renewal may take: with the pauses, several are tried before a lease is over.
_PATIENCE_SECONDS: Final = 3.0
_GAP_SECONDS: Final = 5.0
SKEW_SECONDS: Final = 2.0
"""Clocks that differ by more are worth a word."""


class Leases:
    """Renews the leases of the runs that ``held`` gives, which ``worker`` has; and the worker's own sign of life.

    They are kept in a thread of the system, also under gevent, over a connection of their own: neither an app that
    computes nor a full pool holds it up. C code that keeps the GIL does; for longer than a lease, it costs the runs.
    """

    def __init__(
        self,
        url: str,
        worker: str,
        held: Callable[[], Collection[str]],
        *,
        is_shared: bool,
        throttle: LogThrottle | None = None,
    ) -> None:
        self._url, self._worker, self._held, self._is_shared = url, worker, held, is_shared
        # Nobody else can come for what is in this process's memory.
        self._is_needed = not database.is_private(url)
        # Of the system too: gevent's would not wake a thread of it.
        self._stop = monkey.get_original("_thread", "allocate_lock")()
        self._stop.acquire()
        self._is_running, self._is_clean = False, True
        self._kept = self._since = self._seen = float("-inf")
        self._throttle = throttle or LogThrottle()
        self.skew: float | None = None
        """By how many seconds this machine's clock is ahead of the database's, as far as that can be known."""

    def start(self) -> None:
        """Start the thread."""
        if self._is_needed:
            self._is_running = True
            monkey.get_original("_thread", "start_new_thread")(self._keep, ())

    def stop(self, *, is_clean: bool = True) -> None:
        """End the thread, and wait for that, at most as long as a renewal takes. Where that is not ``is_clean``, the
        worker stays known, as one that died: others look after what it left."""
        if not self._is_running:
            return
        self._is_clean = is_clean
        self._stop.release()
        until = time.monotonic() + 2 * _PATIENCE_SECONDS
        while self._is_running and time.monotonic() < until:
            time.sleep(0.01)

    def is_steady(self) -> bool:
        """Tell whether the database took what this worker wrote, for as long as a lease is, without a break: then each
        worker that lives had the time to renew its own. Always, where nobody else can have any."""
        now = time.monotonic()
        return not self._is_needed or (now - self._kept < _GAP_SECONDS and now - self._since >= LEASE_SECONDS)

    def _keep(self) -> None:
        store: ThreadStore | None = None
        try:
            while True:
                try:
                    store = store or ThreadStore(self._url, 1, _PATIENCE_SECONDS)
                    self._renew(store)
                except Exception as error:
                    self._fail(error)
                if self._stop.acquire(timeout=_RENEW_SECONDS):
                    break
            if store is not None:
                self._retire(store)
        finally:
            if monkey.is_module_patched("threading"):
                # Its driver may have waited by gevent's means, which are one a thread.
                get_hub().destroy()
            self._is_running = False

    def _renew(self, store: ThreadStore) -> None:
        before = time.time()
        # Something is written where there are no leases: a database that is only read from shows here.
        seen = store.beat(self._worker, f"{socket.gethostname()}/{os.getpid()}", is_shared=self._is_shared)
        self._compare(before - seen, time.time() - seen)
        store.renew(self._worker, self._held(), LEASE_SECONDS)
        now = time.monotonic()
        passed = now - self._kept
        # A clock that was set ends all leases at once.
        if passed > _GAP_SECONDS or abs(seen - self._seen - passed) > _GAP_SECONDS:
            self._since = now
        self._kept, self._seen = now, seen

    def _compare(self, least: float, most: float) -> None:
        """Say where the clocks differ, which is by something between the two."""
        self.skew = 0.0 if least <= 0 <= most else min(least, most, key=abs)
        if abs(self.skew) > SKEW_SECONDS:
            self._throttle.warn(
                _log,
                "this machine's clock is %.1f s %s the database's: set both by NTP",
                abs(self.skew),
                "ahead of" if self.skew > 0 else "behind",
            )

    def _fail(self, error: Exception) -> None:
        self._kept = float("-inf")
        self._throttle.warn(_log, "the leases of this worker's runs cannot be renewed: %s", error, level=logging.ERROR)

    def _retire(self, store: ThreadStore) -> None:
        try:
            if self._is_clean:
                store.retire(self._worker)
        except SQLAlchemyError as error:
            _log.warning("this worker is known until it is forgotten: %s", masked(str(error)))
        store.close()
