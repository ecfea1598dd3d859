"""Appends to the log what the store has; where the log can't be reached, has it begin anew as soon as it can."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..events import Event
from ..log.protocol import AppendRequest, Claim, EventId, Log, LogUnavailableError
from ..store.database import UnsettledError


class LogAppender:
    """Appends to ``log`` for one worker, and knows the threads of which it lacks something."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._guard = threading.Lock()
        # How often something was missed: what is missed while a log begins anew counts again.
        self._untold: dict[str, int] = {}
        self._unfenced: dict[str, list[Claim]] = {}
        # What is to begin anew with nothing of before, and of which runs words are missing before.
        self._unkept: set[str] = set()
        self._holes: dict[str, set[str]] = {}

    def tell(self, thread_id: str, told: Sequence[Event], claim: Claim | None = None) -> EventId | None:
        """Appends, for who has the thread's lock; gives ``None`` where that can't be now, and viewers get a snapshot as
        soon as it can. Gives ``REFUSED`` where the run is another's."""
        return self.tell_all([AppendRequest(thread_id, told, claim, locked=True)])[0]

    def tell_all(self, told: Sequence[AppendRequest]) -> Sequence[EventId | None]:
        """Does as :meth:`tell` for several threads at once."""
        if not self._untold or not any(one.thread_id in self._untold for one in told):
            try:
                return self._log.append_all(told)
            except LogUnavailableError:
                for one in told:
                    self._miss(one)
                return [None] * len(told)
        places: list[EventId | None] = []
        for one in told:
            if one.thread_id in self._untold:
                self._miss(one)
                places.append(None)
            else:
                places += self.tell_all([one])
        return places

    def tell_last(self, thread_id: str, event: Event) -> None:
        """Has the log forget all but ``event``, at once or, as all of it then, as soon as it can."""
        try:
            self._log.forget(thread_id, event)
        except LogUnavailableError:
            self.untell(thread_id, keep=False)

    def fence(self, thread_id: str, claim: Claim) -> bool:
        """Has what earlier holders of a run tell refused; gives ``False`` where that is to be done yet."""
        try:
            self._log.fence(thread_id, claim)
        except LogUnavailableError:
            with self._guard:
                self._unfenced.setdefault(thread_id, []).append(claim)
            self.untell(thread_id)
            return False
        return True

    def _miss(self, told: AppendRequest) -> None:
        if told.claim is not None:
            with self._guard:
                self._holes.setdefault(told.thread_id, set()).add(told.claim.run_id)
        self.untell(told.thread_id)

    def untell(self, thread_id: str, *, keep: bool = True) -> None:
        """The log lacks something of the thread, or may; ``keep`` as :meth:`Log.restart` takes it."""
        with self._guard:
            if not keep:
                self._unkept.add(thread_id)
            self._untold[thread_id] = self._untold.get(thread_id, 0) + 1

    def lacks(self, thread_id: str) -> bool:
        """Whether the thread's log lacks something, or may."""
        return thread_id in self._untold

    def is_done(self) -> bool:
        """Whether the logs lack nothing."""
        return not self._untold

    @contextmanager
    def telling(self, thread_id: str) -> Iterator[None]:
        """Around a change of the store, which may be there though its COMMIT failed."""
        try:
            yield
        except UnsettledError:
            self.untell(thread_id)
            raise

    @contextmanager
    def locked(self, thread_id: str) -> Iterator[None]:
        """Holds the thread's lock; goes on without it where the log is away."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._log.lock(thread_id))
            except LogUnavailableError:
                self.untell(thread_id)
            yield

    def retell(self, only: str | None = None) -> Iterator[str]:
        """Begins the logs anew that lack something, or ``only`` that thread's; gives each thread, for its runs to be
        stored as of the new log."""
        for thread_id, missed in list(self._untold.items()):
            if only not in (None, thread_id):
                continue
            try:
                for claim in self._unfenced.get(thread_id, []):
                    self._log.fence(thread_id, claim)
                keep, holes = thread_id not in self._unkept, sorted(self._holes.get(thread_id, ()))
                self._log.restart(thread_id, keep=keep, holes=holes)
            except LogUnavailableError:
                return
            with self._guard:
                # A worker that ends retells beside its housekeeper.
                if self._untold.get(thread_id) == missed:
                    del self._untold[thread_id]
                    self._unfenced.pop(thread_id, None)
                    self._unkept.discard(thread_id)
                    self._holes.pop(thread_id, None)
            yield thread_id
