"""The requests whose bodies are waited for in a worker: who sends many halves gives way to who sends a whole one."""

from __future__ import annotations

import threading
from collections.abc import Callable


class OpenBodies:
    """Lets each address have ``most`` bodies under way, 0 is any number: where one more begins, its oldest is cut."""

    def __init__(self, most: int) -> None:
        self._most = most
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        # By address what cuts each, the oldest first.
        self._open: dict[str, dict[object, Callable[[], None]]] = {}

    def begin(self, address: str | None, cut: Callable[[], None]) -> Callable[[], None]:
        """Count a body in, which ``cut``, that must not wait, ends; give what counts it out. One without an address
        counts for nobody."""
        if address is None or not self._most:
            return lambda: None
        body = object()
        with self._guard:
            theirs = self._open.setdefault(address, {})
            theirs[body] = cut
            given_up = theirs.pop(next(iter(theirs))) if len(theirs) > self._most else None
        if given_up is not None:
            given_up()

        def done() -> None:
            with self._guard:
                theirs = self._open.get(address, {})
                theirs.pop(body, None)
                if not theirs:
                    self._open.pop(address, None)

        return done
