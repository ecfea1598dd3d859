"""What is done once for all who ask for it at the same time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class UndoneError(Exception):
    """Whoever did it was stopped in the midst of it."""


class SharedCall(Generic[T]):
    """What the first who asks does, and the others wait for."""

    def __init__(self) -> None:
        self._first = threading.Lock()
        self.over = threading.Event()
        self._found: list[T] = []
        self._error: Exception | None = None

    def do(self, work: Callable[[], T]) -> T:
        """Give what the first one's ``work`` gives. Raises what that raises, and :class:`UndoneError`."""
        if self._found:
            return self._found[0]
        if self._first.acquire(blocking=False):
            return self._work(work)
        self.over.wait()
        if self._error is not None:
            # Each who raises it would add to its traceback.
            raise self._error.with_traceback(self._traceback)
        if not self._found:
            raise UndoneError
        return self._found[0]

    def _work(self, work: Callable[[], T]) -> T:
        try:
            self._found.append(work())
        except Exception as error:
            self._error, self._traceback = error, error.__traceback__
            raise
        finally:
            self.over.set()
        return self._found[0]


class _Slot(Generic[T]):
    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.errand: SharedCall[T] | None = None


class PerProcess(Generic[T]):
    """What a process has one of: made when it is first asked for, and anew after a fork.

    All who ask meanwhile wait for it. Where it can't be made, they fail with the same error, and the next one tries.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        # A lock is made where it is needed: after gevent's patching, and no fork copies one that is held.
        self._slots: dict[int, _Slot[T]] = {}

    def get(self) -> T:
        """Give what is made once. Raises what making it raises."""
        slot = self._slot()
        while True:
            errand = slot.errand
            if errand is None:
                with slot.guard:
                    errand = slot.errand = slot.errand or SharedCall()
            try:
                return errand.do(self._make)
            except Exception as error:
                with slot.guard:
                    if slot.errand is errand:
                        slot.errand = None
                if not isinstance(error, UndoneError):
                    raise

    def pop(self) -> T | None:
        """Give what there is, if anything; the next who asks has another one made."""
        slot = self._slot()
        with slot.guard:
            errand, slot.errand = slot.errand, None
        try:
            return errand.do(self._none) if errand else None
        except Exception:
            return None

    def _slot(self) -> _Slot[T]:
        pid = os.getpid()
        return self._slots.get(pid) or self._slots.setdefault(pid, _Slot())

    def _none(self) -> T:
        raise UndoneError
