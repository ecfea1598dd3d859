"""One clock a worker: streams are read, and told, no more often than a screen can show.

A stream that is woken for each delta costs a switch, a poll and a timer each time; those of a tick share them. There
are several ticks to a turn of all streams, so that whatever else the worker does comes in between.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from ..platform.log_throttle import LogThrottle
from .read_gate import ReadGate, readable

_log = logging.getLogger(__name__)

_TICKS: Final = 10
_PATIENCE: Final = 0.3
"""A run that has nothing to read for so long leaves the scheduler, and its own thread blocks on the socket: an idle
run costs nothing then."""


class ReadSlot(ReadGate):
    """A read gate whose stream has turns. ``handed_back`` is for what a tick leaves to the run's own thread; ``None``:
    that thread reads."""

    def __init__(self) -> None:
        super().__init__()
        self.since = 0.0
        self.handed_back: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def number(self) -> int | None:
        """Give the file descriptor of its connection: -1 when that is closed, ``None`` when there is none."""
        return None if self.socket is None else self.socket.fileno()


class SlotOwner(Protocol):
    """An active run, which has a read slot."""

    @property
    def slot(self) -> ReadSlot:
        """Where its reader waits."""
        ...


T = TypeVar("T", bound=SlotOwner)


class BatchScheduler(Generic[T]):
    """Gives each stream a turn every ``seconds``. While there is something to do it calls ``tick``, every few
    milliseconds, with those that have a turn and something to read: for it to read, and to have each wait :meth:`again`
    or go on.
    """

    def __init__(
        self, seconds: float, tick: Callable[[Sequence[T]], None], throttle: LogThrottle | None = None
    ) -> None:
        self._seconds, self._call = seconds, tick
        self._throttle = throttle or LogThrottle()
        # In the order of their turns.
        self._waiting: dict[T, None] = {}
        self._wanted = threading.Event()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def wait(self, one: T) -> Any:
        """Give what is left to the reader, once it is its turn; ``None`` when it is to read for itself."""
        if self._closed or one.slot.number() == -1:
            return None
        self.again(one)
        if not self._wanted.is_set():
            self._wanted.set()
            if self._thread is None:
                self._start()
        try:
            return one.slot.handed_back.get()
        finally:
            self._waiting.pop(one, None)

    def again(self, one: T) -> None:
        """Give it its next turn; its reader waits. Call it in a tick."""
        one.slot.since = time.monotonic() + self._seconds
        self._waiting[one] = None

    def close(self) -> None:
        """End the ticks; who waits then reads at once."""
        self._closed = True
        self._wanted.set()

    def _start(self) -> None:
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="assistream-scheduler")
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
            except Exception as error:
                self._throttle.error(_log, error, "a tick failed")
            if self._waiting:
                self._wanted.set()
        for one in list(self._waiting):
            one.slot.handed_back.put(None)

    def _tick(self) -> None:
        now = time.monotonic()
        ready: list[T] = []
        turn: list[tuple[int | None, T]] = []
        for one in list(self._waiting):
            if one.slot.since > now:
                break
            turn.append((one.slot.number(), one))
        found = readable([number for number, _ in turn if number is not None and number >= 0])
        for number, one in turn:
            if number in found or (number != -1 and one.slot.pending()):
                self._waiting.pop(one, None)
                ready.append(one)
            elif number == -1 or one.slot.since + _PATIENCE <= now:
                self._waiting.pop(one, None)
                one.slot.handed_back.put(None)
        try:
            self._call(ready)
        except BaseException:
            for one in ready:
                one.slot.handed_back.put(None)
            raise
