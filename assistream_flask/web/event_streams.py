"""The bodies of event streams: a thread's events for any viewer, or one POST's runs for its caller.

Both read the log; what the log can't prove they replace by a snapshot. Knows no Flask.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from .. import events, sse
from ..errors import RequestError
from ..events import RUN_ENDS, TERMINAL
from ..log.protocol import EventId, LogUnavailableError, PositionExpiredError, Receipt, Record, Subscription
from ..runs.open_streams import OpenStream
from ..runs.runtime import Runtime

_AWAY: Final = (LogUnavailableError, RequestError, SQLAlchemyError)
"""What a snapshot can't be read for: nothing that the server's log needs a traceback of."""

Frames = Generator[bytes, None, None]
"""The frames of an event stream. An empty one lets the body finish what ``send`` wrote in part."""
Send = Callable[[bytes], Receipt]
"""Sends frames to the viewer without waiting, or not, while nothing else is sent."""
AskAgain = Callable[[], bool]
"""Tells whether who asked for a stream is still who they were."""


class _Reader:
    """A subscription that is taken when it is first read, and let go of when the log can't prove its place.

    ``frames_of`` gives what the viewer is to see of records, which is sent as soon as they come; ``None`` where they
    are for :meth:`read`. ``ask_again`` is asked once a heartbeat or more often, and after ``seconds`` the stream is
    over whatever it says, and where its ``place`` is another's.
    """

    def __init__(
        self,
        runtime: Runtime,
        thread_id: str,
        event_id: EventId | None,
        send: Send,
        frames_of: Callable[[list[Record]], bytes | None],
        ask_again: AskAgain,
        place: OpenStream,
        seconds: float = math.inf,
    ) -> None:
        self._runtime, self._thread_id, self._event_id = runtime, thread_id, event_id
        self._send, self._frames_of = send, frames_of
        self._subscription: Subscription | None = None
        # A crowd that came at once, or was told something at once, is neither to be asked about at once nor to come
        # back so.
        self._heartbeat = runtime.settings.heartbeat_seconds * random.uniform(0.75, 1)
        self._ask_again, self._place = ask_again, place
        now = time.monotonic()
        self._due, self._asked_at = now + self._heartbeat, now
        self._end_at = now + seconds * random.uniform(0.9, 1)
        # The runs of the last snapshot, and how each was.
        self.seen: dict[str, str] = {}

    def open(self) -> None:
        """Begin to read. Raises :class:`PositionExpiredError` when the place can't be proven."""
        if self._subscription is None:
            if self._event_id is None:
                raise PositionExpiredError
            self._subscription = self._runtime.log.subscribe(self._thread_id, self._event_id)
            self._place.on_end(self._subscription.interrupt)

    def read(self) -> list[Record]:
        """Give the next records, none when a heartbeat is due, or :meth:`is_over` is to be asked. Raises
        :class:`PositionExpiredError`."""
        self.open()
        assert self._subscription is not None
        until = min(self._due, self._asked_at + self._heartbeat, self._end_at)
        return self._subscription.read(max(0.0, until - time.monotonic()), self._take)

    def _take(self, records: list[Record]) -> Receipt:
        data = None if self._runtime.stopping.is_set() else self._frames_of(records)
        if data is None:
            return Receipt.NO
        if not data:
            return Receipt.WHOLE
        self._due = time.monotonic() + self._heartbeat
        return self._send(data)

    def beat(self, data: bytes) -> bytes:
        """Give ``data``; where there is none, a heartbeat once that is due."""
        now = time.monotonic()
        if not data and now < self._due:
            return b""
        self._due = now + self._heartbeat
        return data or sse.PING

    def is_over(self) -> bool:
        """Tell whether the viewer is to come back, as somebody else or as nobody maybe."""
        now = time.monotonic()
        if now >= self._end_at or self._place.is_over:
            return True
        # So early that the viewer is woken once for this and a heartbeat.
        if now < self._asked_at + self._heartbeat / 2:
            return False
        self._asked_at = now
        return not self._ask_again()

    def snapshot(self) -> bytes | None:
        """Give the frame of a snapshot, ``None`` when the thread is gone; reading goes on from there."""
        self.close()
        found = self._runtime.snapshots.get(self._thread_id)
        if found is None:
            return None
        frame, self._event_id, self.seen = found
        return frame

    def close(self) -> None:
        """Let go of the log. Idempotent."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None


def view(
    runtime: Runtime,
    thread_id: str,
    event_id: EventId | None,
    send: Send,
    ask_again: AskAgain,
    place: OpenStream,
) -> Frames:
    """Give the thread's events after ``event_id``, without an end; a snapshot first where that can't be proven.

    Ends when the thread is deleted, the server shuts down, ``ask_again`` says no, the stream is old, its ``place`` is
    another's or, once it has begun, log or store are away: the viewer comes back then. Raises what says so before its
    first frame, for the answer.
    """

    def frames_of(records: list[Record]) -> bytes | None:
        found, gone = _until_deleted(records)
        return None if gone else _joined(found)

    seconds = runtime.settings.stream_seconds
    reader = _Reader(runtime, thread_id, event_id, send, frames_of, ask_again, place, seconds)
    first = sse.RETRY
    try:
        while True:
            try:
                reader.open()
                if first:
                    # Nothing may come for a while, and servers send no headers before the first byte.
                    yield first + b"\n"
                    first = b""
                records, gone = _until_deleted(reader.read())
            except PositionExpiredError:
                frame = reader.snapshot()
                yield first + (frame or _deleted(thread_id))
                first = b""
                if frame is None:
                    return
                continue
            stopping = runtime.stopping.is_set()
            if records or not stopping:
                yield reader.beat(_joined(records))
            if gone or stopping or reader.is_over():
                return
    except _AWAY:
        if first:
            raise
    finally:
        reader.close()


def follow(
    runtime: Runtime,
    thread_id: str,
    message_id: str | None,
    runs: set[str],
    event_id: EventId | None,
    send: Send,
    ask_again: AskAgain,
    place: OpenStream,
) -> Frames:
    """Give the events of ``runs`` and of the user's message after ``event_id``, then ``done``.

    At a shutdown, when ``ask_again`` says no, its ``place`` is another's, or log or store are away, it ends without
    ``done``: the runs go on.
    """

    def frames_of(records: list[Record]) -> bytes | None:
        return None if first else _frames_of(records, runs)

    reader = _Reader(runtime, thread_id, event_id, send, frames_of, ask_again, place)
    waiting = set(runs)
    first = sse.RETRY
    try:
        while waiting:
            if runtime.stopping.is_set() or reader.is_over():
                return
            try:
                records, gone = _until_deleted(reader.read())
            except PositionExpiredError:
                frame = reader.snapshot()
                yield first + (frame or _deleted(thread_id))
                first = b""
                # As the snapshot said: what came since is still to be sent.
                over = {run_id for run_id in waiting - reader.seen.keys() if _over(runtime, thread_id, run_id)}
                over |= {run_id for run_id, status in reader.seen.items() if status in TERMINAL}
                waiting -= over
                if frame is None:
                    waiting.clear()
            else:
                found = [one for one in records if one.key in runs or _tells_of(one, message_id)]
                if data := reader.beat(_joined(found)):
                    data, first = first + data, b""
                yield data
                waiting.difference_update(one.key for one in found if one.name in RUN_ENDS)
                if gone:
                    break
        yield first + sse.DONE
    except _AWAY:
        return
    finally:
        reader.close()


def _frames_of(records: list[Record], runs: set[str]) -> bytes | None:
    """Give the frames of ``runs``, where no record is one that the stream has to look at itself."""
    found = []
    for one in records:
        if one.key is None or one.name in RUN_ENDS:
            return None
        if one.key in runs:
            found.append(one.frame)
    return b"".join(found)


def _joined(records: list[Record]) -> bytes:
    return b"".join([record.frame for record in records])


def _until_deleted(records: list[Record]) -> tuple[list[Record], bool]:
    """Give the records up to the thread's end, and whether it is among them."""
    for at, record in enumerate(records):
        if record.name == "thread.deleted":
            return records[: at + 1], True
    return records, False


def _deleted(thread_id: str) -> bytes:
    event = events.thread_deleted(thread_id)
    return sse.encode(event.name, events.dumps(event.data))


def _tells_of(record: Record, message_id: str | None) -> bool:
    if record.name == "thread.deleted":
        return True
    return record.key is None and message_id is not None and record.data().get("id") == message_id


def _over(runtime: Runtime, thread_id: str, run_id: str) -> bool:
    run = runtime.store.run(thread_id, run_id)
    return run is None or run["status"] in TERMINAL
