"""What is known of the server that runs the app: gunicorn, where it is that one."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from gevent import monkey

from ..errors import ConfigurationError, masked

_log = logging.getLogger(__name__)

T = TypeVar("T")

# For gunicorn to see that a worker is gone, and the next one to load its app.
_START_SECONDS: Final = 5.0


def _gunicorn() -> Any:
    # The worker, or the arbiter where it loads the app, is the object whose method handles SIGTERM.
    return getattr(signal.getsignal(signal.SIGTERM), "__self__", None)


def serving() -> bool:
    """Give ``False`` once gunicorn told its worker to end: a streaming response must then end by itself.

    Gunicorn says so by the worker's attribute ``alive`` alone, for a signal and for ``max_requests`` alike.
    """
    return bool(getattr(_gunicorn(), "alive", True))


def worker() -> Any:
    """Give gunicorn's worker; ``None`` where this is none, or the app handles SIGTERM itself."""
    found = _gunicorn()
    return found if hasattr(found, "booted") else None


def http_1_response() -> Any:
    """Give the class that gunicorn's workers answer HTTP/1 requests with, imported when it is needed."""
    return importlib.import_module("gunicorn.http.wsgi").Response


def malformed() -> tuple[type[Exception], ...]:
    """Give what gunicorn raises to who reads a body whose chunks break HTTP's rules; nothing under another server."""
    found = getattr(sys.modules.get("gunicorn.http.errors"), "ParseException", None)
    return (found,) if found else ()


def patched() -> bool:
    """Tell whether gevent, whose worker gunicorn has, has patched this process."""
    return monkey.is_module_patched("threading") and monkey.is_module_patched("socket")


def setting(name: str) -> Any:
    """Give a setting of gunicorn's, ``None`` under another server."""
    return getattr(getattr(_gunicorn(), "cfg", None), name, None)


class RequestLimit:
    """How many requests gunicorn's ``worker`` may serve (``--max-requests``, with its jitter). Gunicorn would end it
    at once, in the midst of answers, and start another only then: the number is taken from it."""

    def __init__(self, worker: Any) -> None:
        self._worker, self._most = worker, worker.max_requests
        worker.max_requests = sys.maxsize
        self._turn: socket.socket | None = None
        self._since = 0.0

    def is_over(self) -> bool:
        """Tell whether the worker serves still, and has served as many."""
        return bool(self._worker.alive and self._worker.nr >= self._most)

    def has_turn(self) -> bool:
        """Tell whether no other worker of this gunicorn ends now, or did just before: of several one is away at a time.

        Whoever has the turn has it until its process ends.
        """
        if sys.platform != "linux" or (setting("workers") or 1) == 1:
            return True
        if self._turn is None:
            # A name that is nowhere in the file system, and goes with the process however that ends.
            turn = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                turn.bind(f"\0assistream-{os.getppid()}")
            except OSError:
                turn.close()
                return False
            self._turn, self._since = turn, time.monotonic()
        return time.monotonic() - self._since > _START_SECONDS

    def end(self) -> None:
        """Have gunicorn end the worker, as at the limit of its own."""
        self._worker.log.info("Autorestarting worker between answers: it has served %d requests.", self._worker.nr)
        self._worker.alive = False


def kept(make: Callable[[RequestLimit], T]) -> T | None:
    """Give what ``make`` gives for the request limit of gunicorn's worker: made once, and kept with the worker.
    ``None`` where there is no limit, gunicorn ends the worker already, or does not count as it is known to."""
    worker = _gunicorn()
    known = getattr(worker, "__dict__", {})
    if "assistream" not in known:
        most, served = known.get("max_requests"), known.get("nr")
        if not serving() or not isinstance(most, int) or not isinstance(served, int) or most == sys.maxsize:
            return None
        known["assistream"] = make(RequestLimit(worker))
    found: T = known["assistream"]
    return found


def is_kept() -> bool:
    """Tell whether the end of gunicorn's worker is in our hands: see :func:`kept`."""
    return hasattr(_gunicorn(), "assistream")


def when_booted(start: Callable[[], object]) -> None:
    """Have ``start`` called in a thread of gunicorn's worker once that has booted, and again until it succeeds. Does
    nothing elsewhere, such as in a shell, nor in a worker that :func:`unfit` refuses."""
    worker = _gunicorn()
    if getattr(worker, "booted", None) is False and type(worker).__name__ != "SyncWorker":
        threading.Thread(target=_begin, args=(worker, start), daemon=True, name="assistream-begin").start()


def _begin(worker: Any, start: Callable[[], object]) -> None:
    told = False
    while worker.alive:
        time.sleep(5 if told else 0.05)
        try:
            if worker.booted:
                start()
                return
        except Exception as error:
            if not told:
                _log.warning("assistream could not begin with its worker, and tries again: %s", masked(str(error)))
            told = True


def check_alone() -> None:
    """Raise :class:`ConfigurationError` where gunicorn runs other workers beside this one."""
    workers = setting("workers") or 1
    if workers > 1:
        raise ConfigurationError(
            f"gunicorn runs {workers} workers, and each has an event log of its own in memory: "
            "set app.config['ASSISTREAM_REDIS_URL'], or run gunicorn with --workers 1"
        )


def unfit(environ: Mapping[str, Any], shared: bool) -> tuple[str, str] | None:
    """Give an error's code and what to do where the server cannot serve event streams; the log is ``shared`` by
    workers, or not."""
    if environ.get("wsgi.multiprocess") and not shared:
        return "too_many_workers", "The event log is in memory: set ASSISTREAM_REDIS_URL, or run one worker."
    if environ.get("SERVER_SOFTWARE", "").startswith("gunicorn") and not environ.get("wsgi.multithread"):
        return "sync_worker", "One event stream would hold up all else: run gunicorn with --worker-class gevent."
    return None
