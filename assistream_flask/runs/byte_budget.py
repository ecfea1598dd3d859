"""How much callers may write in a minute: text goes into the log, whose memory all callers share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from ..errors import RequestError
from ..store.sql import Owner

_SECONDS: Final = 60.0
_MANY: Final = 10_000


class ByteBudget:
    """Lets each caller write ``most`` bytes at once, and as many again in the course of a minute. ``clock`` gives
    seconds and is for tests."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        # When each will have its whole budget again.
        self._whole_at: dict[Owner, float] = {}

    def take(self, owner: Owner, count: int) -> None:
        """Count what ``owner`` writes. Raises :class:`RequestError` where that is too much for now."""
        now = self._clock()
        with self._guard:
            if len(self._whole_at) > _MANY:
                self._whole_at = {one: at for one, at in self._whole_at.items() if at > now}
            whole_at = max(now, self._whole_at.get(owner, now)) + _SECONDS * count / self._most
            wait = whole_at - now - _SECONDS
            # Who has all of it may write a message that is longer than that.
            if wait > 0 and self._whole_at.get(owner, now) > now:
                raise RequestError(
                    429,
                    "too_many_bytes",
                    f"You may write {self._most} bytes in a minute. Try again later, or send less.",
                    retry_after=int(wait) + 1,
                )
            self._whole_at[owner] = whole_at
