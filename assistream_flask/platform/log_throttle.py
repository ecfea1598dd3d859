"""Logs what fails over and over once in whole, then in a line a minute, and once more when it is over."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

from gevent import monkey

from ..errors import masked, unsecret

_EVERY_SECONDS: Final = 60.0


class _Kind:
    """Complaints of one kind: how many there were, and how many of them the log does not have."""

    def __init__(self, now: float) -> None:
        self.began = self.said = self.last = now
        self.count = self.unsaid = 0
        self.newest = ""


class LogThrottle:
    """Keeps what fails by the second or by the request from flooding the log: that fills the disk, and hides all else.

    Of a kind the first is written, and then a line a minute that says how many there were. A kind is a message, with
    the classes of what it tells, or of its error, and where that was raised. ``clock`` gives seconds and is for tests.
    Any thread may call.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[tuple[logging.Logger, str, object, object], _Kind] = {}
        # Not gevent's, as nothing waits while it is held. It may be taken again, by what the garbage collector tidies
        # up in the midst of it.
        self._guard: threading.RLock = monkey.get_original("_thread", "RLock")()

    def warn(self, log: logging.Logger, message: str, *arguments: object, level: int = logging.WARNING) -> None:
        """Say it without a traceback."""
        kind = log, message, tuple(map(type, arguments)), None
        arguments = tuple(_Told(one) if isinstance(one, BaseException) else one for one in arguments)
        more, seconds = self._count(kind, arguments)
        if more == 0:
            log.log(level, message, *arguments)
        elif more is not None:
            log.log(level, message + " (%d times in %d s)", *arguments, more, seconds)

    def error(self, log: logging.Logger, error: BaseException, message: str, *arguments: object) -> None:
        """Say that ``error`` was met, the first time with its traceback."""
        more, seconds = self._count((log, message, type(error), _raised(error)), arguments)
        if more == 0:
            _write(log, error, message, arguments)
        elif more is not None:
            # Of a database's error that is the reason, without the statement and what users wrote.
            newest = masked(repr(error))
            log.error(message + " (%d times in %d s, the newest: %s)", *arguments, more, seconds, newest)

    def _count(
        self, key: tuple[logging.Logger, str, object, object], arguments: tuple[object, ...]
    ) -> tuple[int | None, float]:
        """Give how many there were since one was written, and in how many seconds: 0 for the first, ``None`` where
        none is to be written."""
        now = self._clock()
        with self._guard:
            kind = self._kinds.get(key)
            is_new = kind is None or now - kind.last >= _EVERY_SECONDS
            if kind is None or is_new:
                kind = self._kinds[key] = _Kind(now)
            kind.count += 1
            # As text: an error would keep all that its frames have.
            kind.last, kind.newest = now, key[1] % arguments
            if is_new:
                return 0, 0.0
            kind.unsaid += 1
            since = now - kind.said
            if since < _EVERY_SECONDS:
                return None, since
            more, kind.unsaid, kind.said = kind.unsaid, 0, now
            return more, since

    def tend(self) -> None:
        """Say what is over that was there more than once. Called every few seconds."""
        now = self._clock()
        with self._guard:
            over = {key: kind for key, kind in self._kinds.items() if now - kind.last >= _EVERY_SECONDS}
            for key in over:
                del self._kinds[key]
        for (log, *_), kind in over.items():
            if kind.count > 1:
                seconds = kind.last - kind.began
                log.warning("over, after %d times in %d s: %s", kind.count, seconds, masked(kind.newest))


class _Told:
    """An error as the log is to have it."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __str__(self) -> str:
        return masked(str(self._error))

    def __repr__(self) -> str:
        return masked(repr(self._error))


def _write(log: logging.Logger, error: BaseException, message: str, arguments: tuple[object, ...]) -> None:
    """Write ``message`` with the traceback of ``error``, whose words may have a key or a password."""
    if not log.isEnabledFor(logging.ERROR):
        return
    file, line, function, _ = log.findCaller()
    about = type(error), error, error.__traceback__
    record = log.makeRecord(log.name, logging.ERROR, file, line, message, arguments, about, function)
    # Formatters take this where it is there.
    record.exc_text = unsecret("".join(traceback.format_exception(error))).rstrip("\n")
    log.handle(record)


def _raised(error: BaseException) -> object:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace and (trace.tb_frame.f_code, trace.tb_lineno)
