"""Stops a wait on the network from outside, under gevent and under threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import gevent
from gevent import get_hub, getcurrent, monkey
from greenlet import greenlet

from . import reliances

T = TypeVar("T")


class Interrupted(BaseException):
    """The wait was stopped. Not an :class:`Exception`: the SDK must not take it for a network error."""


class Interruptible:
    """Waits of one thread or greenlet that :meth:`interrupt` ends.

    Under gevent the exception is thrown into the wait itself, whatever it waits for. A thread cannot
    be stopped so: there ``close`` is called, which closes the connection once there is one.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._waiting = False
        self._interrupted = threading.Event()

    def wait(self, call: Callable[[], T]) -> T:
        """Give what ``call`` gives. Raises :class:`Interrupted` when :meth:`interrupt` was or is called."""
        if self._interrupted.is_set():
            raise Interrupted
        if monkey.is_module_patched("threading"):
            # Never of a plain thread: greenlet's tidying up after it would run in the midst of other code.
            self._greenlet = getcurrent()
        self._waiting = True
        try:
            return call()
        except Exception:
            if self._interrupted.is_set():
                raise Interrupted from None
            raise
        finally:
            self._waiting = False
            if self._interrupted.is_set():
                self._close()

    def interrupt(self) -> None:
        """End the present wait, and each later one at once. Idempotent."""
        self._interrupted.set()
        if monkey.is_module_patched("threading"):
            get_hub().loop.run_callback(self._throw)
        else:
            self._close()

    def _throw(self) -> None:
        # In the hub nothing else runs, so a greenlet that still waits cannot have gone on meanwhile.
        if not self._waiting:
            return
        if _tidying(self._greenlet):
            gevent.spawn_later(0.01, self.interrupt)
            return
        # Once: a second throw would break off the cleaning up after the first.
        self._waiting = False
        self._greenlet.throw(Interrupted)


def _tidying(waiting: greenlet) -> bool:
    """Tell whether it waits while it closes something, or for a lock. Both are short, and a connection pool
    that is stopped there never gets its connection back."""
    if not hasattr(waiting, "gr_frame"):
        missing = reliances.Missing("greenlet", "greenlet.gr_frame")
        reliances.miss("interrupt", missing, "a run that is cancelled as it closes a connection may lose that")
        return False
    frame = waiting.gr_frame
    if frame is not None and frame.f_code.co_name in ("acquire", "__enter__"):
        return True
    while frame is not None:
        if frame.f_code.co_name in ("close", "__exit__"):
            return True
        frame = frame.f_back
    return False
