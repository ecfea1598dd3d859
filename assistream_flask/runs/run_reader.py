"""What arrives for a run from its model server, and where its thread waits for it."""

from __future__ import annotations

from collections.abc import Iterator

from ..events import Json
from ..fast.batch_scheduler import ReadSlot
from ..fast.read_gate import TimeSlice
from ..platform.interrupt import Interrupted, Interruptible
from ..platform.threads import spawn
from ..upstream.answer_stream import AnswerStream
from ..upstream.deltas import Delta, Source


class RunReader:
    """The reading of one connection. ``batches`` gives the deltas of the answer, those of a network read together."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream
        self.slot = ReadSlot()
        stream.gate = self.slot
        self.batches: Iterator[list[Delta]] = iter(stream)
        self.turn = TimeSlice()
        self._feeding: Interruptible | None = None

    def state(self) -> Json | None:
        """Give what another worker needs to go on behind what was read last, of a background response."""
        return self._stream.state()

    def source(self) -> Source | None:
        """Give what the model server says of the answer as a whole, once its end was read."""
        return self._stream.source

    def feed(self) -> None:
        """Have the stream read ahead by a thread of its own, where it cannot be read in a tick."""
        self.slot.is_fed, self._feeding = True, Interruptible(self._stream.close)
        spawn("assistream-feed", _feed, self._feeding, self.slot)

    def close(self) -> None:
        """Close the connection to the model server. Idempotent, from any thread."""
        self.slot.is_left = True
        self._stream.close()
        if self._feeding is not None:
            self._feeding.interrupt()


def _feed(waits: Interruptible, slot: ReadSlot) -> None:
    try:
        waits.wait(slot.feed)
    except Interrupted:
        # Its reader may be a thread that waits for it.
        slot.stop()
