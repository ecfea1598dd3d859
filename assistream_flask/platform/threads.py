"""Threads that begin at once, with names that logs and profilers show, and let others go on."""

from __future__ import annotations

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar, cast

from gevent import get_hub, monkey
from gevent.threadpool import ThreadPool

from .once import PerProcess

T = TypeVar("T")


def spawn(name: str, target: Callable[..., None], *args: object) -> None:
    """Start a daemon thread that is called ``name``: a greenlet once gevent has patched ``threading``."""
    if monkey.is_module_patched("threading"):
        # threading.Thread waits until it runs: once more behind all that the worker does.
        _thread.start_new_thread(_run, (name, target, args))
    else:
        threading.Thread(target=target, args=args, name=name, daemon=True).start()


def _run(name: str, target: Callable[..., None], args: tuple[object, ...]) -> None:
    # Gevent forgets it with the greenlet; of a plain thread it would be kept for good.
    threading.current_thread().name = name
    target(*args)


class RealThreads:
    """At most ``most`` threads of the system's for what computes, or blocks without gevent's knowing. No lock is shared
    with them: one of gevent's may never wake who waits for it in another thread."""

    def __init__(self, most: int) -> None:
        # A pool belongs to a process and to its hub.
        self._pool = PerProcess(lambda: ThreadPool(most))

    def call(self, work: Callable[[], T]) -> T:
        """Give what ``work`` gives, which raises nothing, in a thread: in the present one where that is one. Under
        gevent other greenlets go on; what is thrown into this wait leaves the thread at work."""
        if not monkey.is_module_patched("threading"):
            return work()
        return cast(T, self._pool.get().spawn(work).get())


class _Line:
    """Those that have work without end, in the order of their turns: one of them goes on in each turn of the event
    loop, which is the process's."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Event] = deque()
        self._is_moving = False

    def wait(self) -> None:
        """Go to its end, and wait for the turn."""
        turn = threading.Event()
        self._waiting.append(turn)
        if not self._is_moving:
            self._is_moving = True
            _thread.start_new_thread(self._move, ())
        turn.wait()

    def _move(self) -> None:
        while self._waiting:
            self._waiting.popleft().set()
            give_way()
        self._is_moving = False


_LINE: Final = _Line()


def take_turns() -> None:
    """Let all others go on, and go on when all who call this too have had a turn: however many there are, whoever has
    little to do waits for one of them."""
    if monkey.is_module_patched("threading"):
        _LINE.wait()
    else:
        # The system shares out the time.
        give_way()


def loop_turn() -> float:
    """Give what is another number once the event loop has gone round, so that all others could go on."""
    return float(get_hub().loop.now()) if monkey.is_module_patched("threading") else 0.0


def give_way() -> None:
    """Let all others go on before the caller does, those included whose bytes have just come."""
    # After a sleep of 0 gevent lets fifty greenlets go on, or one fifty times, before it looks at the network again.
    time.sleep(0.000_001)
