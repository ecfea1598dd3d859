"""How many answers a worker has under way: the rest wait, and callers take turns."""

from __future__ import annotations

import threading
from collections import deque

from ..store.sql import Owner


class Ticket:
    """One that waits, and is told when it has a slot."""

    def __init__(self) -> None:
        self.has_slot = threading.Event()


class RunSlots:
    """Lets ``limit`` runs at a time ask their model servers.

    Each needs a connection there, of which the client has so many; one that finds none looks like a silent server.
    Whoever has many runs waiting has as many turns as a caller with one.
    """

    def __init__(self, limit: int) -> None:
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        self._free = limit
        # By caller, in the order of their turns.
        self._waiting: dict[Owner, deque[Ticket]] = {}

    def ask(self, owner: Owner) -> Ticket:
        """Stand in line; the ticket has a slot at once where one is free."""
        ticket = Ticket()
        with self._guard:
            if self._free > 0:
                self._free -= 1
                ticket.has_slot.set()
            else:
                self._waiting.setdefault(owner, deque()).append(ticket)
        return ticket

    def give_back(self, owner: Owner, ticket: Ticket) -> None:
        """Give a slot to the next caller in turn, or leave the line. Call it once for each ticket."""
        with self._guard:
            waiting = self._waiting.get(owner)
            if waiting is not None and ticket in waiting:
                waiting.remove(ticket)
                if not waiting:
                    del self._waiting[owner]
                return
            self._next()

    def _next(self) -> None:
        for owner, waiting in self._waiting.items():
            waiting.popleft().has_slot.set()
            # The others first.
            del self._waiting[owner]
            if waiting:
                self._waiting[owner] = waiting
            return
        self._free += 1
