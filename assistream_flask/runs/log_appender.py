"""Appends to the log what the store has; where the log cannot be reached, rebuilds it as soon as it can."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ..events import Event
from ..log.protocol import AppendRequest, Claim, EventId, Log, LogUnavailableError
from ..store.database import UnsettledError


class LogAppender:
    """Appends to ``log`` for one worker, and knows the threads whose logs lack something."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # Under it no other lock is taken.
        self._guard = threading.Lock()
        # By thread, how often something was missed: what is missed while a log is rebuilt counts again.
        self._incomplete: dict[str, int] = {}
        self._unfenced: dict[str, list[Claim]] = {}
        # What is to be rebuilt with nothing of before, and of which runs words are missing before.
        self._unkept: set[str] = set()
        self._holes: dict[str, set[str]] = {}

    def append(self, thread_id: str, events: Sequence[Event], claim: Claim | None = None) -> EventId | None:
        """Append the events, for who has the thread's lock; give the id of the last one.

        Give ``None`` where the log cannot be reached: viewers get a snapshot as soon as it can. Give ``REFUSED``
        where the run is another worker's.
        """
        return self.append_all([AppendRequest(thread_id, events, claim, locked=True)])[0]

    def append_all(self, requests: Sequence[AppendRequest]) -> Sequence[EventId | None]:
        """Append to several threads' logs at once; give for each what :meth:`append` gives."""
        if not self._incomplete or not any(one.thread_id in self._incomplete for one in requests):
            try:
                return self._log.append_all(requests)
            except LogUnavailableError:
                for one in requests:
                    self._miss(one)
                return [None] * len(requests)
        event_ids: list[EventId | None] = []
        for one in requests:
            if one.thread_id in self._incomplete:
                self._miss(one)
                event_ids.append(None)
            else:
                event_ids += self.append_all([one])
        return event_ids

    def append_last(self, thread_id: str, event: Event) -> None:
        """Have the log forget all but ``event``; where it cannot be reached, ``event`` too, as soon as it can."""
        try:
            self._log.forget(thread_id, event)
        except LogUnavailableError:
            self.mark_incomplete(thread_id, keep=False)

    def fence(self, thread_id: str, claim: Claim) -> bool:
        """Have the log refuse what earlier holders of a run append; give ``False`` where that is to be done yet."""
        try:
            self._log.fence(thread_id, claim)
        except LogUnavailableError:
            with self._guard:
                self._unfenced.setdefault(thread_id, []).append(claim)
            self.mark_incomplete(thread_id)
            return False
        return True

    def _miss(self, request: AppendRequest) -> None:
        if request.claim is not None:
            with self._guard:
                self._holes.setdefault(request.thread_id, set()).add(request.claim.run_id)
        self.mark_incomplete(request.thread_id)

    def mark_incomplete(self, thread_id: str, *, keep: bool = True) -> None:
        """Take note that the thread's log lacks something, or may; ``keep`` as :meth:`Log.restart` takes it."""
        with self._guard:
            if not keep:
                self._unkept.add(thread_id)
            self._incomplete[thread_id] = self._incomplete.get(thread_id, 0) + 1

    def is_incomplete(self, thread_id: str) -> bool:
        """Tell whether the thread's log lacks something, or may."""
        return thread_id in self._incomplete

    def has_all(self) -> bool:
        """Tell whether no log lacks anything."""
        return not self._incomplete

    @contextmanager
    def storing(self, thread_id: str) -> Iterator[None]:
        """Surround a change of the store, which may be there though its COMMIT failed: viewers must learn of it then,
        and nobody has an event for it."""
        try:
            yield
        except UnsettledError:
            self.mark_incomplete(thread_id)
            raise

    @contextmanager
    def locked(self, thread_id: str) -> Iterator[None]:
        """Hold the thread's lock; go on without it where the log cannot be reached."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._log.lock(thread_id))
            except LogUnavailableError:
                self.mark_incomplete(thread_id)
            yield

    def rebuild(self, only: str | None = None) -> Iterator[str]:
        """Begin the logs anew that lack something, or ``only`` that thread's; give each thread, for its runs to be
        stored as of the new log."""
        for thread_id, missed in list(self._incomplete.items()):
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
                # A worker that ends does this beside its housekeeper.
                if self._incomplete.get(thread_id) == missed:
                    del self._incomplete[thread_id]
                    self._unfenced.pop(thread_id, None)
                    self._unkept.discard(thread_id)
                    self._holes.pop(thread_id, None)
            yield thread_id
