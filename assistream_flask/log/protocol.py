"""The per-thread event log: one contract, an implementation a module.

An id ``<epoch>-<offset>`` names a place in one thread's log. Offsets grow by one an event.
The epoch is random and new whenever the log of a thread begins anew, so a place in a lost
log can never be taken for a place in the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Final, NamedTuple, Protocol, TypeAlias

from ..events import Event, Json

_PLACE = re.compile(r"([0-9a-f]{1,32})-(0|[1-9][0-9]{0,17})")


class EventId(NamedTuple):
    """The position behind event number ``offset`` of a thread's log; 0 is the log's beginning."""

    epoch: str
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def parse(cls, text: str | None) -> EventId | None:
        """Read what ``str()`` gives; give ``None`` for any other text."""
        match = _PLACE.fullmatch(text or "")
        return cls(match[1], int(match[2])) if match else None


REFUSED: Final = EventId("", -1)
"""In place of an event id: nothing was appended, as the run is another's by now."""


class Claim(NamedTuple):
    """Who appends what a run grows by: its ``number``th holder, the first of which is 0."""

    run_id: str
    number: int


class AppendRequest(NamedTuple):
    """Events for a thread's log; those of a run's holder with its ``claim``, those of who has the thread's lock as
    ``locked``."""

    thread_id: str
    events: Sequence[Event]
    claim: Claim | None = None
    locked: bool = False


class Record(NamedTuple):
    """One event in the log. ``frame`` is its SSE frame, encoded once for all readers."""

    event_id: EventId
    name: str
    key: str | None
    frame: bytes

    def data(self) -> Json:
        """Give the event's JSON object."""
        start = self.frame.index(b"\ndata: ") + 7
        found: Json = json.loads(self.frame[start : self.frame.index(b"\n", start)])
        return found


class PositionExpiredError(Exception):
    """The log no longer has, or never had, what comes after the asked-for place: read a snapshot."""


class LogUnavailableError(Exception):
    """The log cannot be reached. Whether what was to be written is in it is not known. The message, where there is one,
    says why and what to do, and is fit for the public."""


GONE_SECONDS: Final = 60
"""How long a log that has forgotten its thread takes nothing for it: longer than any worker tells before it looks
whether its runs are still there."""


class Receipt(Enum):
    """What became of records. ``NO``: they were not taken. ``WHOLE``: they are sent. ``PART``: they are sent in part,
    and their reader sends the rest."""

    NO, WHOLE, PART = range(3)


Receive: TypeAlias = Callable[[list[Record]], Receipt]
"""Takes records, or not. It must not wait."""


class Subscription(Protocol):
    """A reader's cursor in one thread's log. What is there already and what comes are one sequence, so no event is
    missed or repeated between them."""

    def read(self, timeout: float, take: Receive | None = None) -> list[Record]:
        """Give the records after the last ones given, waiting up to ``timeout`` seconds for one;
        none after that. Raises :class:`PositionExpiredError` when records were trimmed before they were read.

        While it waits, ``take`` may be called with the next records, by who brings them: what it takes is not given.
        """
        ...

    def interrupt(self) -> None:
        """End the present wait, or the next one. Any thread may call, and does not wait."""
        ...

    def close(self) -> None:
        """Let go of the log. Idempotent."""
        ...


class Log(Protocol):
    """What a log does for the runner and the routes. Whatever reaches out may raise :class:`LogUnavailableError`."""

    shared: bool
    """Whether other workers read and write it too."""

    def append(self, thread_id: str, events: Sequence[Event], claim: Claim | None = None) -> EventId:
        """Append ``events`` as one write; give the id of the last of them, or :data:`REFUSED`; for a thread that was
        deleted, see :meth:`forget`, the end of its log."""
        ...

    def append_all(self, told: Sequence[AppendRequest]) -> Sequence[EventId | None]:
        """Append the events of several threads, as one write where that is cheaper; give for each what
        :meth:`append` gives; ``None`` for a thread that was deleted, and where the lock was lost."""
        ...

    def forget(self, thread_id: str, last: Event) -> None:
        """Append ``last`` and keep nothing but that, in no worker. For :data:`GONE_SECONDS` nothing comes after it,
        and the log does not begin anew; then that is gone too."""
        ...

    def fence(self, thread_id: str, claim: Claim) -> None:
        """Have what earlier holders of the run append refused from now on, however late it comes."""
        ...

    def end(self, thread_id: str) -> EventId:
        """Give the id of the newest event; begin a log where there is none."""
        ...

    def end_unless_locked(self, thread_id: str) -> EventId | None:
        """Give what :meth:`end` gives, ``None`` while somebody holds the thread's lock."""
        ...

    def since(self, thread_id: str, event_id: EventId) -> list[Record]:
        """Give all records after ``event_id``. Raises :class:`PositionExpiredError` when that can't be proven."""
        ...

    def recover(self, thread_id: str, event_id: EventId, run_id: str) -> tuple[list[Record], EventId]:
        """Give all records of the run after ``event_id``, and the end, also where the log began anew since: what a run
        that was lost told and did not store. Raises :class:`PositionExpiredError` when that can't be proven."""
        ...

    def subscribe(self, thread_id: str, event_id: EventId) -> Subscription:
        """Give a cursor after ``event_id``. Raises :class:`PositionExpiredError` when that can't be proven."""
        ...

    def lock(self, thread_id: str) -> AbstractContextManager[object]:
        """Hold the lock of whoever stores a change and appends its event, so that events come in the order of the
        store. Where its holder died in between, the log begins anew; one that was only late appends nothing then, as
        viewers were given what is stored."""
        ...

    def viewed(self) -> list[str]:
        """Give the threads that somebody reads here."""
        ...

    def restart(self, thread_id: str, *, keep: bool = False, holes: Collection[str] = ()) -> None:
        """Begin the thread's log anew: every reader gets a :class:`PositionExpiredError`, every viewer a snapshot.
        With ``keep``, :meth:`recover` may still read what was there before, except for the runs ``holes``: of those
        something is missing there."""
        ...

    def signal(self, thread_id: str) -> None:
        """Ask the workers that run runs of the thread to look at it: at cancels, and at what to store."""
        ...

    def listen(self, attend: Callable[[str], None]) -> None:
        """Have ``attend`` called, which must not wait, with each thread that a worker signals."""
        ...

    def tend(self) -> None:
        """Drop what is older or more than the log keeps. Called every few seconds."""
        ...

    def wake(self) -> None:
        """End all waits of readers, now and later: the worker leaves. All else still works."""
        ...

    def close(self) -> None:
        """Wake all readers and let go of everything."""
        ...
