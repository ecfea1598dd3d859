"""The event streams that a worker has open: how many a caller and an address may have, and who gives way to others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from ..errors import RequestError
from ..settings import Settings

# Who holds less than this part of a full worker, or less than so many times what the newcomer would, is not heavy: the
# places that it gives up make the worker fairer each time, so no two can take them from each other in turn.
_HEAVY_PART: Final = 50
_HEAVY_TIMES: Final = 2


class OpenStream:
    """One event stream: its caller, and the ``address`` that counts for it, ``None`` where none does."""

    def __init__(self, caller: object, address: str | None = None) -> None:
        self.caller, self.address = caller, address
        self.is_over = False
        self._wake: Callable[[], object] | None = None

    @property
    def party(self) -> object:
        """Give who it is that has it: an address, whatever names those there have, or else the caller."""
        return self.caller if self.address is None else self.address

    def on_end(self, wake: Callable[[], object]) -> None:
        """Have ``wake`` called, which must not wait, once its place is another's."""
        self._wake = wake
        if self.is_over:
            wake()

    def end(self) -> None:
        """Have whoever sends it end it."""
        self.is_over = True
        if self._wake is not None:
            self._wake()


class OpenStreams:
    """Counts the streams of a worker by caller and by address."""

    def __init__(self, settings: Settings) -> None:
        self._per_caller, self._per_address = settings.max_streams, settings.address_streams
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        self.callers: dict[object, int] = {}
        self.count = 0
        # The oldest first.
        self._parties: dict[object, dict[OpenStream, None]] = {}
        self._left: deque[OpenStream] = deque()

    def enter(self, stream: OpenStream, most: int) -> bool:
        """Count a stream in, of which the worker has at most so many; ``False`` where there is no room. Where somebody
        is heavy, the oldest of theirs ends for it. Raises :class:`RequestError` where its caller, or its address, has
        as many as allowed."""
        given_up = None
        try:
            with self._guard:
                self._check(stream)
                if self.count >= most:
                    given_up = self._given_up(stream, most)
                    if given_up is None:
                        return False
                    self._remove(given_up)
                self.count += 1
                self.callers[stream.caller] = self.callers.get(stream.caller, 0) + 1
                self._parties.setdefault(stream.party, {})[stream] = None
        finally:
            self._count_out()
        if given_up is not None:
            given_up.end()
        return True

    def leave(self, stream: OpenStream) -> None:
        """Count a stream out, where it is not yet. Idempotent."""
        self._left.append(stream)
        self._count_out()

    def _check(self, stream: OpenStream) -> None:
        if self.callers.get(stream.caller, 0) >= self._per_caller:
            fix = f"You may have {self._per_caller} event streams open. Close one, such as a tab."
            raise RequestError(429, "too_many_streams", fix, retry_after=5)
        most = stream.address is not None and self._per_address
        if most and len(self._parties.get(stream.party, ())) >= most:
            fix = f"{most} event streams are open from your address, as many as may be. Close one, such as a tab."
            raise RequestError(429, "too_many_address_streams", fix, retry_after=5)

    def _given_up(self, stream: OpenStream, most: int) -> OpenStream | None:
        heaviest = max(self._parties.values(), key=len, default={})
        wanted = len(self._parties.get(stream.party, ())) + 1
        is_heavy = len(heaviest) > most // _HEAVY_PART and len(heaviest) >= _HEAVY_TIMES * wanted
        return next(iter(heaviest)) if is_heavy else None

    def _remove(self, stream: OpenStream) -> None:
        theirs = self._parties.get(stream.party, {})
        if stream not in theirs:
            return
        del theirs[stream]
        if not theirs:
            del self._parties[stream.party]
        self.count -= 1
        self.callers[stream.caller] -= 1
        if not self.callers[stream.caller]:
            del self.callers[stream.caller]

    def _count_out(self) -> None:
        # The garbage collector may be who leaves, in the midst of a count: whoever has the lock counts for it then.
        while self._left and self._guard.acquire(blocking=False):
            try:
                while self._left:
                    self._remove(self._left.popleft())
            finally:
                self._guard.release()
