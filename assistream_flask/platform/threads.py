"""Threads that begin at once, with names that logs and profilers show."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

from gevent import monkey


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
