"""Whether this worker still takes requests."""

from __future__ import annotations

import signal


def serving() -> bool:
    """Gives ``False`` once gunicorn told its worker to end: a streaming response must then end by itself.

    Gunicorn says so by the worker's attribute ``alive`` alone, for a signal and for ``max_requests`` alike;
    the worker is found as the object whose method handles SIGTERM.
    """
    return bool(getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "alive", True))
