"""Switches the fast ways on as a worker starts, and tells the doctor which are on, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from ..platform import reliances
from . import chunk_reader, direct_send
from .switches import NAMES, SWITCHES, VARIABLE, wanted

# The others need no name that a library does not promise.
_MISSING: Final[dict[str, Callable[[], reliances.Missing | None]]] = {
    chunk_reader.NAME: chunk_reader.missing,
    direct_send.NAME: direct_send.missing,
}
_INSTEAD: Final = "things go on, slower"


class State(NamedTuple):
    """How one is: "" where it is on, else why it is off, and whether a library has to do with that."""

    name: str
    why_off: str = ""
    is_missing: bool = False


def install(setting: str) -> None:
    """Have each of the fast ways on that the setting leaves on and all names are there for; else the log says once what
    is missing. Call it as a worker starts, after the fork. Idempotent.

    Raises :class:`ConfigurationError`.
    """
    SWITCHES.choose(setting)
    for name, find in _MISSING.items():
        if SWITCHES.is_on(name) and (missing := find()) is not None:
            reliances.miss(name, missing, _INSTEAD)
    if SWITCHES.is_on(direct_send.NAME):
        direct_send.attach()


def states(setting: str, *, in_worker: bool) -> list[State]:
    """Tell how each is: in this worker, or, asked elsewhere, in one that would start here.

    Raises :class:`ConfigurationError`.
    """
    left_on = wanted(setting)
    return [_state(name, in_worker) if name in left_on else State(name, f"{VARIABLE} says so") for name in NAMES]


def _state(name: str, in_worker: bool) -> State:
    missing = reliances.missing(name)
    if not missing and name in _MISSING and (found := _MISSING[name]()) is not None:
        # Nobody has looked here: this is no worker.
        missing = str(found)
    if missing:
        return State(name, missing, is_missing=True)
    if name == direct_send.NAME and in_worker and not direct_send.is_attached():
        return State(name, "it is for gunicorn's gevent worker, where that handles SIGTERM itself")
    return State(name)
