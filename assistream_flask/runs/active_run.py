"""A run of this worker that is not over."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import openai

from ..assistants import Assistant
from ..events import Event, Json, Said
from ..fast.batch_scheduler import ReadSlot
from ..fast.read_gate import TimeSlice
from ..log.protocol import Claim, EventId
from ..platform.interrupt import Interrupted, Interruptible
from ..store.sql import Owner, State
from ..upstream import answer_stream
from ..upstream.deltas import Part, merged
from ..upstream.items import Limit, Names, Shorten
from .message_accumulator import Ahead, MessageAccumulator


class RunRequest(NamedTuple):
    """An assistant to run, the client to ask it with, the names that the history's speakers have, and the app's own way
    to shorten a history."""

    assistant: Assistant
    client: Callable[[], openai.OpenAI]
    names: Names
    shorten: Shorten | None = None


class History:
    """What runs that start together see of their thread, read once for all of them.

    ``limits`` are theirs: as much is read as the one takes that takes most. It is kept until the last has it.
    """

    def __init__(self, limits: Sequence[Limit]) -> None:
        self._limit = Limit(max(one.characters for one in limits), max(one.messages for one in limits))
        self._left = len(limits)
        self._guard = threading.Lock()
        self._read: tuple[list[Said], bool] | None = None

    def get(self, read: Callable[[int, int], tuple[list[Said], bool]]) -> tuple[list[Said], bool]:
        """Gives the messages, and whether there are older ones; ``read`` is called where nobody did."""
        with self._guard:
            found = self._read if self._read is not None else read(*self._limit)
            self._left -= 1
            self._read = found if self._left > 0 else None
        return found


class ActiveRun:
    """One such run. ``group_id`` is that of runs that may run beside it."""

    def __init__(
        self,
        reply: MessageAccumulator,
        asked: RunRequest | None,
        position: int,
        place: EventId | None,
        group_id: str | None,
        number: int = 0,
    ) -> None:
        self.reply, self.asked, self.position, self.group_id = reply, asked, position, group_id
        # Set where it will be asked: what it is to see, and how much of it.
        self.history: History
        self.limit: Limit
        # What the model server said as it failed, for the log; and whether it is waited for.
        self.said, self.is_loading = "", False
        self.id: str = reply.run["id"]
        self.thread_id: str = reply.run["thread_id"]
        self.claim = Claim(self.id, number)
        # ``saving`` comes first and keeps an older state from being stored over a newer one.
        self.saving, self.lock = threading.Lock(), threading.Lock()
        # After its last event; what is stored is exact there. ``kept`` is the epoch of what was stored last.
        self.place = place
        self.kept = place.epoch if place else ""
        self.dirty = False
        # Set where it is made: whose thread it is of.
        self.owner: Owner
        # Nothing more is done for it here.
        self.left = False
        self.ended = threading.Event()
        self.deadline = float("inf")
        self.upstream: answer_stream.AnswerStream | None = None
        # Of a background response: what another worker needs to go on, and what that one has already.
        self.state: Json | None = None
        self.ahead: Ahead | None = None
        # What arrived and was not added to the reply yet, and the state behind it.
        self.pending: list[Part] = []
        self.pending_state: Json | None = None
        # Whether, and when, anything was told; and how often, soon after each other.
        self.begun, self.told, self.in_a_row = False, 0.0, 0
        # What arrives, where its reader waits for it, and how long it did not; and who reads ahead.
        self.batches: Iterator[list[Part]]
        self.seat: ReadSlot
        self.turn = TimeSlice()
        self.feeding: Interruptible | None = None
        self.waits = Interruptible(self.close)
        # How it ends when it is interrupted; not at all when another worker has it.
        self.stop: Callable[[MessageAccumulator], list[Event]] | None = MessageAccumulator.cancel

    def close(self) -> None:
        """Closes the connection to the model server."""
        if self.upstream is not None:
            self.upstream.close()
        if self.feeding is not None:
            self.feeding.interrupt()

    def leave(self) -> None:
        """Has nothing more done for it: another worker has it, or may have. ``lock`` is held."""
        self.left, self.stop = True, None
        self.waits.interrupt()

    def read(self, ours: answer_stream.AnswerStream) -> None:
        """Has its batches come from there."""
        self.upstream, self.seat, self.feeding = ours, ReadSlot(), None
        ours.gate = self.seat
        self.batches = iter(ours)

    def feed(self) -> None:
        """Has its stream read ahead, where it can't be read in a tick."""
        assert self.upstream is not None
        self.seat.is_fed, self.feeding = True, Interruptible(self.upstream.close)
        spawn(_feed, self.feeding, self.seat)

    @property
    def elsewhere(self) -> bool:
        """Whether what is stored is as of another log."""
        return self.place is not None and self.place.epoch != self.kept

    def take(self, parts: Sequence[Part]) -> None:
        """Takes what arrived."""
        self.pending += self.ahead.rest(parts) if self.ahead else parts
        if self.upstream is not None:
            self.pending_state = self.upstream.state()

    def grow(self) -> list[Event]:
        """Adds what arrived to the reply; gives the events that tell of it."""
        parts, self.pending = merged(self.pending), []
        self.state = self.pending_state or self.state
        return self.reply.add(parts)

    def now(self) -> State:
        """What there is to store."""
        return *self.reply.snapshot(), str(self.place) if self.place else None, self.state, self.claim.number


def _feed(waits: Interruptible, seat: ReadSlot) -> None:
    try:
        waits.wait(seat.feed)
    except Interrupted:
        # Its reader may be a thread that waits for it.
        seat.stop()


def spawn(target: Callable[..., None], *args: object) -> None:
    """Starts a daemon thread: a greenlet once gevent has patched ``_thread``."""
    # threading.Thread waits until it runs: once more behind all that the worker does.
    _thread.start_new_thread(target, args)
