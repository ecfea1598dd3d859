"""A page of a thread, exact as of a place in its log: the stored rows and the text that they lack."""

from __future__ import annotations

from collections.abc import Container, Iterable

from .. import events
from ..events import TERMINAL
from ..log.protocol import EventId, Log, PositionExpiredError, Record
from ..store.sql import PAGE_BYTES, Stored, ThreadStore
from ..types import Entry

Page = tuple[list[Entry], bool, EventId]
_Growing = dict[str | None, tuple[Entry, int]]


class SnapshotMovedError(Exception):
    """The thread changed while it was read: read it again."""


def read(
    store: ThreadStore,
    log: Log,
    thread_id: str,
    limit: int,
    before: str | None,
    ours: Container[str],
    most_bytes: int = PAGE_BYTES,
) -> Page | None:
    """Give the entries, at most ``limit`` and about ``most_bytes`` of them, whether there are older ones, and the
    place; ``None`` when the thread is gone or ``before`` is no message of it.

    No lock is taken, so that a crowd does not queue. What is stored and then told is exact when nobody was
    about to do both, before and after the rows were read, and nothing of the kind was told in between. Growing text
    is told before it is stored, and each row says as of which place it has that.

    Raises :class:`SnapshotMovedError`; :class:`PositionExpiredError` when a row that grows is not of this log, or the
    log has not all since: those runs must be stored as they are now. ``ours`` are the runs that this worker can store.
    """
    start = log.end_unless_locked(thread_id)
    found = store.page(thread_id, limit, before, most_bytes) if start else None
    event_id = log.end_unless_locked(thread_id)
    if start is None or event_id is None or event_id.epoch != start.epoch:
        raise SnapshotMovedError
    if found is None:
        return None
    stored, more = found
    growing = _growing(stored, start, None if log.shared else ours)
    oldest = min([start.offset, *(offset for _, offset in growing.values())])
    if event_id.offset > oldest:
        for record in log.since(thread_id, EventId(start.epoch, oldest)):
            if record.event_id.offset > event_id.offset:
                break
            if grows(record):
                _grow(growing, record)
            elif record.event_id.offset > start.offset:
                raise SnapshotMovedError
    return [one.entry for one in stored], more, event_id


def _growing(stored: Iterable[Stored], start: EventId, ours: Container[str] | None) -> _Growing:
    """Give the entry of each run that is not over, and the offset in the log up to which the row has its text.

    Raises :class:`PositionExpiredError` for one of ``ours``, or of any worker where that is ``None``, whose row is not
    of this log.
    """
    found: _Growing = {}
    for entry, text in stored:
        run = entry["run"]
        if run is None or run["status"] in TERMINAL:
            continue
        # Nothing of these grows, and what is stored is told at once.
        is_still = run["status"] in ("queued", "requires_action")
        known = start if is_still else EventId.parse(text)
        if known is not None and known.epoch == start.epoch:
            found[run["id"]] = entry, known.offset
        elif ours is None or run["id"] in ours:
            raise PositionExpiredError
    return found


def _grow(growing: _Growing, record: Record) -> None:
    """Add an event's text to its entry, unless the row has it."""
    entry, offset = growing.get(record.key, (None, 0))
    if entry is not None and record.event_id.offset > offset:
        events.apply(entry, record.name, record.data())


def grows(record: Record) -> bool:
    """Tell whether the event is of text, which is told before it is stored."""
    return record.name.startswith(("thread.message.delta", "thread.run.step."))
