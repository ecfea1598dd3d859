"""A page of a thread, exact as of a place in its log: the stored rows and the text that they lack."""

from __future__ import annotations

from collections.abc import Container

from .. import events
from ..events import TERMINAL, Json
from ..log.protocol import EventId, Log, PositionExpiredError, Record
from ..store.sql import ThreadStore

Page = tuple[list[Json], bool, EventId]


class SnapshotMovedError(Exception):
    """The thread changed while it was read: read it again."""


def read(
    store: ThreadStore, log: Log, thread_id: str, limit: int, before: str | None, ours: Container[str]
) -> Page | None:
    """Gives the entries, whether there are older ones, and the place; ``None`` when the thread is gone or
    ``before`` is no message of it.

    No lock is taken, so that a crowd does not queue. What is stored and then told is exact when nobody was
    about to do both, before and after the rows were read, and nothing of the kind was told in between. Growing text
    is told before it is stored, and each row says as of which place it has that.

    Raises :class:`SnapshotMovedError`; :class:`PositionExpiredError` when a row that grows is not of this log, or the
    log has not all since: those runs must be stored as they are now. ``ours`` are the runs that this worker can store.
    """
    start = log.quiet(thread_id)
    found = store.page(thread_id, limit, before) if start else None
    place = log.quiet(thread_id)
    if start is None or place is None or place.epoch != start.epoch:
        raise SnapshotMovedError
    if found is None:
        return None
    stored, more = found
    grow: dict[str | None, tuple[Json, int]] = {}
    for entry, text in stored:
        run = entry["run"]
        if run is None or run["status"] in TERMINAL:
            continue
        known = start if run["status"] == "queued" else EventId.parse(text)
        if known is not None and known.epoch == start.epoch:
            grow[run["id"]] = entry, known.offset
        elif log.shared or run["id"] in ours:
            raise PositionExpiredError
    oldest = min((offset for _, offset in grow.values()), default=start.offset)
    if place.offset > min(oldest, start.offset):
        for record in log.since(thread_id, EventId(start.epoch, min(oldest, start.offset))):
            if record.place.offset > place.offset:
                break
            if not grows(record):
                if record.place.offset > start.offset:
                    raise SnapshotMovedError
            elif record.key in grow and record.place.offset > grow[record.key][1]:
                events.apply(grow[record.key][0], record.name, record.data())
    return [one.entry for one in stored], more, place


def grows(record: Record) -> bool:
    """Whether the event is of text, which is told before it is stored."""
    return record.name.startswith(("thread.message.delta", "thread.run.step."))
