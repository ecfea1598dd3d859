"""Tells the app's own code what became of messages and runs, beside those and never in their way."""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from typing import Literal, NamedTuple, Protocol

from ..platform.log_throttle import LogThrottle
from ..platform.threads import spawn
from ..store.sql import Owner
from ..types import Message, Run, ToolCall

_log = logging.getLogger(__name__)

Kind = Literal["message_created", "run_started", "run_ended", "tool_called"]


class Notice(NamedTuple):
    """What happened, and to what: a message, a run, or both."""

    kind: Kind
    owner: Owner
    objects: dict[str, Message | Run | ToolCall]


class Listener(Protocol):
    """Who is told."""

    def wants(self, kind: Kind) -> bool:
        """Tell whether anybody hears of such a notice. It must not wait."""
        ...

    def hear(self, notice: Notice) -> None:
        """Take a notice. It may wait, and raise, as it likes."""
        ...


class Notifier:
    """Has a listener told of one notice after another, in the order in which they came.

    A thread does it, which lives as long as there are any: whoever notifies may hold locks, and is not held up by what
    the app does with it.
    """

    def __init__(self, listener: Listener | None, throttle: LogThrottle) -> None:
        self._listener, self._throttle = listener, throttle
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        self._waiting: deque[Notice] = deque()
        self._idle = threading.Event()
        self._idle.set()

    def notify(self, kind: Kind, owner: Owner, **objects: Message | Run | ToolCall) -> None:
        """Have the listener told. Does not wait, and does not raise."""
        if self._listener is None or not self._listener.wants(kind):
            return
        # The app may keep it, or change it.
        notice = Notice(kind, owner, copy.deepcopy(objects))
        with self._guard:
            self._waiting.append(notice)
            if not self._idle.is_set():
                return
            self._idle.clear()
        spawn("assistream-notices", self._tell, self._listener)

    def _tell(self, listener: Listener) -> None:
        while True:
            with self._guard:
                if not self._waiting:
                    self._idle.set()
                    return
                notice = self._waiting.popleft()
            try:
                listener.hear(notice)
            except BaseException as error:
                # Or the app's SystemExit, or gevent's Timeout, would keep all that comes after from being told.
                self._throttle.error(_log, error, "a notice of %s could not be given", notice.kind)

    def drain(self, seconds: float) -> None:
        """Wait until all was told, at most so long. Called when nothing happens any more."""
        if not self._idle.wait(seconds):
            _log.warning("the app's receivers of signals take too long: %d signals are lost", len(self._waiting) + 1)
