"""One clock a worker: streams are read, and told, no more often than a screen can show.

A stream that is woken for each delta costs a switch, a poll and a timer each time; those of a tick share them. There
are several ticks to a turn of all streams, so that whatever else the worker does comes in between.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from select import POLLIN
from typing import Any, Final

from gevent import monkey

_log = logging.getLogger(__name__)

_TICKS: Final = 8
_PATIENCE: Final = 0.3
"""Who has nothing to read for so long waits in its own way, which costs nothing while it lasts."""


class Pacer:
    """Lets each stream have a turn every ``seconds``; calls ``tell`` at each tick, while there is something to do."""

    def __init__(self, seconds: float, tell: Callable[[], None]) -> None:
        self._seconds, self._tell = seconds, tell
        self._waiting: dict[int, tuple[queue.SimpleQueue[None], float, float]] = {}
        self._wanted = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def wait(self, connection: Any, bell: queue.SimpleQueue[None]) -> None:
        """Returns at the next turn at which the socket ``connection`` has something to read, or after a while.

        ``bell`` is the caller's own, to be rung for it.
        """
        # What TLS has decrypted already does not show on the socket.
        pending = getattr(connection, "pending", None)
        number = connection.fileno()
        if number < 0 or self._closed or (pending is not None and pending()):
            return
        now = time.monotonic()
        self._waiting[number] = bell, now + self._seconds, now + self._seconds + _PATIENCE
        self.want()
        try:
            bell.get()
        finally:
            self._waiting.pop(number, None)

    def want(self) -> None:
        """Has the next tick come."""
        if not self._wanted.is_set():
            self._wanted.set()
            if self._thread is None:
                self._start()

    def close(self) -> None:
        """Ticks no more; who waits then reads at once."""
        self._closed = True
        self._wanted.set()

    def _start(self) -> None:
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="assistream-pacer")
                self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._closed:
            self._wanted.wait()
            now = time.monotonic()
            # Whoever is late is not in a hurry: others have a turn too.
            due = max(due + self._seconds / _TICKS, now + self._seconds / _TICKS / 4)
            time.sleep(due - now)
            self._wanted.clear()
            try:
                self._tick()
            except Exception:
                _log.exception("a tick failed")
            if self._waiting:
                self._wanted.set()
        for bell, *_ in list(self._waiting.values()):
            bell.put(None)

    def _tick(self) -> None:
        now = time.monotonic()
        turn = [(number, bell, until) for number, (bell, since, until) in list(self._waiting.items()) if since <= now]
        if turn:
            poll = _poll()
            for number, _, _ in turn:
                poll.register(number, POLLIN)
            ready = {number for number, _ in poll.poll(0)}
            for number, bell, until in turn:
                if number in ready or until <= now:
                    self._waiting.pop(number, None)
                    bell.put(None)
            # They read now, and what they read is told at once.
            time.sleep(0)
        self._tell()


def _poll() -> Any:
    # gevent's own waits; this one only looks.
    return monkey.get_original("select", "poll")()
