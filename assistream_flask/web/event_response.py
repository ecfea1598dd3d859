"""One upstream stream to one viewer, for developers with a route and a stream of their own."""

from __future__ import annotations

import _thread
import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .. import events, sse
from ..errors import RunError
from ..events import Event
from ..platform.gunicorn import serving
from ..platform.interrupt import Interrupted, Interruptible
from ..runs.message_accumulator import MessageAccumulator, Stop
from ..upstream.answer_stream import NO_LIMIT, AnswerStream, translate
from ..upstream.deltas import Delta, End, merged

_log = logging.getLogger(__name__)

_AHEAD = 256
"""How many reads may wait for a slow viewer before the upstream has to."""


class relay:
    """Iterates over frames; ``close()``, which WSGI servers call, closes the upstream.

    A thread (a greenlet under gevent) reads, so that heartbeats go out while the upstream is silent.
    """

    def __init__(self, stream: Any, heartbeat_seconds: float, most: float = NO_LIMIT) -> None:
        self._upstream: AnswerStream = translate(stream, most)
        self._waits = Interruptible(self._upstream.close)
        self._heartbeat = heartbeat_seconds
        self._queue: queue.Queue[list[Delta] | RunError] = queue.Queue(_AHEAD)
        self._left = threading.Event()
        self._unread = True

    def _read(self) -> None:
        last: list[Delta] | RunError
        try:
            batches, nothing = iter(self._upstream), list[Delta]()
            while (parts := self._waits.wait(lambda: next(batches, nothing))) is not nothing:
                if not self._put(parts):
                    break
            return
        except Interrupted:
            return
        except RunError as error:
            _log.warning("the stream failed: %s: %s", error.code, error.said or "-")
            last = error
        except Exception:
            _log.exception("the stream failed")
            last = RunError("server_error")
        finally:
            self._upstream.close()
        self._put(last)

    def _put(self, item: list[Delta] | RunError) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put(item, timeout=1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self) -> Iterator[bytes]:
        self._unread = False
        # A stream of one's own belongs to no thread: the ids are of this response only.
        run = events.run("", "", None)
        message = events.message("", "assistant", [], run_id=run["id"])
        run["message_id"] = message["id"]
        reply = MessageAccumulator(run, message, [])
        yield sse.RETRY + _frames(
            [events.run_created(run.copy()), *reply.begin(), events.message_created(message.copy())]
        )
        threading.Thread(target=self._read, daemon=True, name="assistream-response").start()
        sent = time.monotonic()
        while not reply.is_over:
            try:
                item = self._queue.get(timeout=min(self._heartbeat, 0.5))
            except queue.Empty:
                if not serving():
                    yield _frames(reply.end(Stop.SHUTDOWN))
                elif time.monotonic() - sent >= self._heartbeat:
                    sent = time.monotonic()
                    yield sse.PING
                continue
            sent = time.monotonic()
            if isinstance(item, RunError):
                yield _frames(reply.end(item))
                continue
            told = reply.add(merged(item))
            if isinstance(item[-1], End):
                told += reply.end(item[-1])
            yield _frames(told)
        yield sse.DONE

    def close(self) -> None:
        """End the reading and close the upstream's connection. Idempotent."""
        self._unread = False
        self._left.set()
        self._waits.interrupt()
        self._upstream.close()

    def __del__(self) -> None:
        # The app answered with something else in the end. Not here: closing takes locks.
        if getattr(self, "_unread", False):
            with suppress(RuntimeError):
                _thread.start_new_thread(self._upstream.close, ())


def _frames(told: list[Event]) -> bytes:
    return b"".join(sse.encode(event.name, events.dumps(event.data)) for event in told)
