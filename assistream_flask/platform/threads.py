"""Threads that begin at once, with names that logs and profilers show."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable


def spawn(name: str, target: Callable[..., None], *args: object) -> None:
    """Start a daemon thread that is called ``name``: a greenlet once gevent has patched ``_thread``."""
    # threading.Thread waits until it runs: once more behind all that the worker does.
    _thread.start_new_thread(_run, (name, target, args))


def _run(name: str, target: Callable[..., None], args: tuple[object, ...]) -> None:
    threading.current_thread().name = name
    target(*args)
