"""What the store has is told by the log; where the log can't be reached, by a snapshot as soon as it can."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from sqlalchemy.exc import SQLAlchemyError

from .events import Event
from .log import Away, Log, Place


class Teller:
    """Appends to ``log`` for one worker, and knows the threads of which it lacks something."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._guard = threading.Lock()
        # How often something was missed: what is missed while a log begins anew counts again.
        self._untold: dict[str, int] = {}

    def tell(self, thread_id: str, told: Sequence[Event]) -> Place | None:
        """Appends; gives ``None`` where that can't be now, and viewers get a snapshot as soon as it can."""
        return self.tell_all([(thread_id, told)])[0]

    def tell_all(self, told: Sequence[tuple[str, Sequence[Event]]]) -> Sequence[Place | None]:
        """Does as :meth:`tell` for several threads at once."""
        if not self._untold or not any(thread_id in self._untold for thread_id, _ in told):
            try:
                return self._log.append_all(told)
            except Away:
                for thread_id, _ in told:
                    self.untell(thread_id)
                return [None] * len(told)
        places: list[Place | None] = []
        for thread_id, events in told:
            if thread_id in self._untold:
                self.untell(thread_id)
                places.append(None)
            else:
                places.append(self.tell(thread_id, events))
        return places

    def untell(self, thread_id: str) -> None:
        """The log lacks something of the thread, or may."""
        with self._guard:
            self._untold[thread_id] = self._untold.get(thread_id, 0) + 1

    @contextmanager
    def telling(self, thread_id: str) -> Iterator[None]:
        """Around a change of the store: where it fails, it may have been made nevertheless."""
        try:
            yield
        except SQLAlchemyError:
            self.untell(thread_id)
            raise

    @contextmanager
    def locked(self, thread_id: str) -> Iterator[None]:
        """Holds the thread's lock; goes on without it where the log is away."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._log.lock(thread_id))
            except Away:
                self.untell(thread_id)
            yield

    def retell(self) -> Iterator[str]:
        """Begins the logs anew that lack something; gives each thread, for its runs to be stored as of the new log."""
        for thread_id, missed in list(self._untold.items()):
            try:
                self._log.restart(thread_id)
            except Away:
                return
            with self._guard:
                if self._untold[thread_id] == missed:
                    del self._untold[thread_id]
            yield thread_id
