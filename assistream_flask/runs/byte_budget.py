"""How much of a thing each may have in a minute, such as text: that goes into the log, whose memory all share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

from ..errors import RequestError
from ..store.sql import Owner

_SECONDS: Final = 60.0
_MANY: Final = 10_000


class MinuteBudget:
    """Lets each have ``most`` at once, and as many again in the course of a minute; 0 is no limit. ``clock`` gives
    seconds and is for tests."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        # When each will have its whole budget again.
        self._whole_at: dict[Hashable, float] = {}

    def take(self, who: Hashable, count: int) -> int:
        """Count what ``who`` has, and give 0; where that is too much for now, give in how many seconds it is not."""
        if not self._most:
            return 0
        now = self._clock()
        with self._guard:
            if len(self._whole_at) > _MANY:
                self._whole_at = {one: at for one, at in self._whole_at.items() if at > now}
            whole_at = max(now, self._whole_at.get(who, now)) + _SECONDS * count / self._most
            wait = whole_at - now - _SECONDS
            # Who has all of it may have more than that at once, such as a long message.
            if wait > 0 and self._whole_at.get(who, now) > now:
                return int(wait) + 1
            self._whole_at[who] = whole_at
            return 0


class ByteBudget:
    """Lets each caller write ``most`` bytes at once, and as many again in the course of a minute."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._budget = most, MinuteBudget(most, clock)

    def take(self, owner: Owner, count: int) -> None:
        """Count what ``owner`` writes. Raises :class:`RequestError` where that is too much for now."""
        wait = self._budget.take(owner, count)
        if wait:
            raise RequestError(
                429,
                "too_many_bytes",
                f"You may write {self._most} bytes in a minute. Try again later, or send less.",
                retry_after=wait,
            )
