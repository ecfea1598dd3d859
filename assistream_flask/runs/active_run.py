"""A run that this worker has, and its ways from one phase to the next."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from ..errors import RunError
from ..events import Event, Json
from ..fast.batch_scheduler import ReadSlot
from ..log.protocol import Claim, EventId
from ..platform.interrupt import Interrupted, Interruptible
from ..store.sql import Owner, State
from ..types import Message, Run
from ..upstream.answer_stream import AnswerStream
from ..upstream.delivered import Shown
from ..upstream.deltas import Delta, merged
from .loop_state import LoopState
from .message_accumulator import Ending, MessageAccumulator, Stop
from .run_reader import RunReader
from .thread_history import RunRequest, ThreadHistory
from .tracing import RunTrace

_FLOOD_SECONDS: Final = 0.004


class Phase(Enum):
    """Where a run stands in this worker.

    ``QUEUED`` and ``IN_PROGRESS`` are its status. ``INTERRUPTED``: it is to end, and its own thread, or who interrupted
    it, is about to end it. ``ENDED``: its status is terminal. ``LEFT``: another worker has it, or may have; it grows no
    more here, and is told no more.
    """

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    INTERRUPTED = "interrupted"
    ENDED = "ended"
    LEFT = "left"


class Checkpoint:
    """How much of a run the store has, and as of which event of the thread's log.

    ``saving`` is held while it is stored, or an older state could be stored over a newer one. What it is exact as of
    changes under the run's ``lock``.
    """

    def __init__(self, event_id: EventId | None) -> None:
        self.saving = threading.Lock()
        # What the run is now is exact there; None where no event is known for that.
        self.event_id = event_id
        self._stored_epoch = event_id.epoch if event_id else ""
        self.is_due = False

    def move(self, event_id: EventId | None) -> None:
        """Take note of the event that told what the run grew by."""
        self.event_id, self.is_due = event_id, True

    def rebase(self, event_id: EventId | None) -> None:
        """Take note that what the run is now is exact as of another event, or as of none."""
        self.event_id = event_id

    def begin(self) -> None:
        """Take note that what the run is now is being stored."""
        self.is_due = False

    def fail(self) -> None:
        """Take note that it could not be stored."""
        self.is_due = True

    def done(self, event_id: EventId | None) -> None:
        """Take note that it was stored as of ``event_id``."""
        self._stored_epoch = event_id.epoch if event_id else ""

    @property
    def is_of_another_log(self) -> bool:
        """Tell whether what is stored is as of an event of another log: readers cannot put the two together."""
        return self.event_id is not None and self.event_id.epoch != self._stored_epoch


class Pacing:
    """How what arrives is told: whether anything was, when last, and how often soon after each other."""

    def __init__(self) -> None:
        self.has_begun, self._told_at, self.in_a_row = False, 0.0, 0

    def arrived(self) -> None:
        """Count what arrives within :data:`_FLOOD_SECONDS` of what was told last."""
        self.in_a_row = self.in_a_row + 1 if time.monotonic() - self._told_at < _FLOOD_SECONDS else 0

    def told(self, now: float) -> bool:
        """Take note of the time; tell whether this was the first."""
        is_first = not self.has_begun
        self.has_begun, self._told_at = True, now
        return is_first


class ActiveRun:
    """A run as this worker has it, until it is over, or left, and that is told.

    Its phase changes by these methods only, and follows from facts that are never taken back::

        QUEUED ── begin ──> IN_PROGRESS ── end ──> ENDED
          └──── interrupt ────┴──> INTERRUPTED ── end ──┘
        each of them ── leave ──> LEFT

    A run that waits for a person is no worker's, and LEFT by the one that had it.

    ``lock`` is held while what the run is changes and is told, so that events come in the order of the changes;
    whoever needs ``checkpoint.saving`` too takes that first. ``group_id`` is that of runs that may run beside it,
    ``command_id`` that of those which one POST began.
    ``address`` is where it was asked for, as long as this worker has it.
    """

    def __init__(
        self,
        owner: Owner,
        accumulator: MessageAccumulator,
        request: RunRequest | None,
        *,
        position: int,
        event_id: EventId | None,
        group_id: str | None,
        command_id: str = "",
        claim: int = 0,
        resume_state: Json | None = None,
        loop: LoopState | None = None,
        address: str | None = None,
        trace: RunTrace | None = None,
    ) -> None:
        self.owner, self.request, self.position, self.group_id = owner, request, position, group_id
        self.command_id, self.address = command_id, address
        self._accumulator = accumulator
        self.loop = loop
        """How far its tool loop came, ``None`` where it called nothing. It changes under ``lock``."""
        self.id: str = accumulator.run["id"]
        self.thread_id: str = accumulator.run["thread_id"]
        self.claim = Claim(self.id, claim)
        self.trace = trace or RunTrace()
        self.lock = threading.Lock()
        self.checkpoint, self.pacing = Checkpoint(event_id), Pacing()
        # Weakly: one that is over is freed then, with all that was said, and not when the garbage collector comes.
        close = weakref.WeakMethod(self.close)
        self.waits = Interruptible(lambda: _call(close()))
        self._reader: RunReader | None = None
        # Whether its answer is over, and the next one not begun: nobody goes on with a response that is over.
        self._is_between = False
        self._history: ThreadHistory | None = None
        # Of a background response: what another worker needs to go on behind what the message has.
        self._resume_state = resume_state
        # What arrived and was not added to the message yet, and the state behind it.
        self._arrived: list[Delta] = []
        self._arrived_state: Json | None = None
        # How it ends when its waits are interrupted, and whether they were.
        self._ending: Ending = Stop.CANCELLED
        self._is_interrupted = self._is_left = False
        # What the model server said, while its model is loading.
        self._loading: RunError | None = None
        self._deadline = float("inf")
        # Set when nothing more is done for it here.
        self._done = threading.Event()

    # What it is

    @property
    def phase(self) -> Phase:
        """Give where the run stands."""
        if self._is_left:
            return Phase.LEFT
        if self.is_over:
            return Phase.ENDED
        if self._is_interrupted:
            return Phase.INTERRUPTED
        return Phase.QUEUED if self.is_queued else Phase.IN_PROGRESS

    @property
    def run(self) -> Run:
        """Give the run object, for nobody to change."""
        return self._accumulator.run

    @property
    def message(self) -> Message:
        """Give the message object, for nobody to change: its text may be a few deltas behind."""
        return self._accumulator.message

    @property
    def is_queued(self) -> bool:
        """Tell whether nothing was asked for it yet, by any worker."""
        return self._accumulator.run["status"] == "queued"

    @property
    def is_over(self) -> bool:
        """Tell whether its status is terminal, in this worker and, soon, in the store."""
        return self._accumulator.is_over

    @property
    def is_left(self) -> bool:
        """Tell whether another worker has it, or may have."""
        return self._is_left

    @property
    def is_loading(self) -> bool:
        """Tell whether its model server is waited for."""
        return self._loading is not None

    @property
    def resume_state(self) -> Json | None:
        """Give what another worker needs to go on behind what the message has; ``None`` where none can."""
        return self._resume_state

    @property
    def ending(self) -> Ending:
        """Give how it is to end, where its waits are interrupted."""
        return self._ending

    @property
    def accumulator(self) -> MessageAccumulator:
        """Give what it consists of. ``lock`` is held."""
        return self._accumulator

    def state(self) -> State:
        """Give what there is to store. ``lock`` is held."""
        event_id = self.checkpoint.event_id
        return (
            *self._accumulator.snapshot(),
            str(event_id) if event_id else None,
            self._resume_state,
            self.claim.number,
        )

    def shown(self) -> Shown:
        """Give what viewers have of its answer, once all that arrived was added."""
        with self.lock:
            _, message, steps = self._accumulator.snapshot()
        before = self.loop or LoopState()
        return Shown(message, steps[before.steps :], before.content)

    def has_told_of_round(self) -> bool:
        """Tell whether viewers have anything of the present answer of the model."""
        before, now = self.loop or LoopState(), self._accumulator
        return now.content_count > before.content or now.step_count > before.steps

    # From one phase to the next

    def prepare(self, history: ThreadHistory) -> None:
        """Take what the run is to see of its thread, before it is queued."""
        self._history = history

    @property
    def history(self) -> ThreadHistory:
        """Give what the run is to see of its thread."""
        assert self._history is not None
        return self._history

    def begin(self) -> list[Event]:
        """Set the run in progress, also again once its model has loaded; give the events that tell of it. ``lock`` is
        held. Raises :class:`Interrupted` where it is interrupted, over or left."""
        self._check_goes_on()
        self._loading = None
        return self._accumulator.begin()

    def wait_for_model(self, error: RunError) -> list[Event]:
        """Let the run say that its model is loading, as ``error`` has it; give the events that tell of it. ``lock`` is
        held. Raises as :meth:`begin` does."""
        self._check_goes_on()
        self._loading = error
        return self._accumulator.wait()

    def _check_goes_on(self) -> None:
        if self.phase not in (Phase.QUEUED, Phase.IN_PROGRESS):
            raise Interrupted

    def end(self, ending: Ending) -> list[Event] | None:
        """End the run; give the events that tell of it, ``None`` where it is over or left. ``lock`` is held."""
        return None if self.is_over or self._is_left else self._accumulator.end(ending)

    def interrupt(self, ending: Ending) -> None:
        """Have the run's thread end it so: the present wait ends, and each later one at once. Does not wait, and needs
        no lock; what is said last counts."""
        self._ending, self._is_interrupted = ending, True
        self.waits.interrupt()

    def leave(self) -> None:
        """Have nothing more done for it here. ``lock`` is held: what is under way is done."""
        self._is_left = True
        self.waits.interrupt()

    def set_done(self) -> None:
        """Let those go on who wait for its end: it is told, or another worker's."""
        self._done.set()

    def wait_done(self, seconds: float | None = 0) -> bool:
        """Wait for that for so many seconds, without them for ever; tell whether it came."""
        return self._done.wait(seconds)

    def limit(self, seconds: float) -> None:
        """Give it so much time from now on."""
        self._deadline = time.monotonic() + seconds

    def overdue(self) -> RunError | None:
        """Give the error with which it ends where its time is over."""
        if time.monotonic() <= self._deadline:
            return None
        return self._loading or RunError("run_time_limit")

    def end_round(self) -> None:
        """Take note that an answer of the model is over, and the run is not. ``lock`` is held."""
        self._resume_state = self._arrived_state = None
        self._is_between = True

    # What arrives

    @property
    def is_reading(self) -> bool:
        """Tell whether there is a connection to a model server."""
        return self._reader is not None

    @property
    def reader(self) -> RunReader:
        """Give the reading of its present connection."""
        assert self._reader is not None
        return self._reader

    @property
    def slot(self) -> ReadSlot:
        """Give where its thread waits for what is read in a tick."""
        return self.reader.slot

    def read(self, stream: AnswerStream) -> None:
        """Have what arrives come from there."""
        self._reader, self._is_between = RunReader(stream), False

    def close(self) -> None:
        """Close the connection to the model server. Idempotent, from any thread."""
        if self._reader is not None:
            self._reader.close()

    def take(self, deltas: Sequence[Delta]) -> None:
        """Take what arrived. ``lock`` is held."""
        self._arrived += deltas
        if self._reader is not None and not self._is_between:
            self._arrived_state = self._reader.state()

    def grow(self) -> list[Event]:
        """Add what arrived to the message; give the events that tell of it, none where it is over or left. ``lock`` is
        held."""
        if not self._arrived or self.is_over or self._is_left:
            return []
        deltas, self._arrived = merged(self._arrived), []
        self._resume_state = self._arrived_state or self._resume_state
        return self._accumulator.add(deltas)

    def catch_up(self) -> None:
        """Take note of how far the stream came that ended, where all that it told had been delivered before. ``lock``
        is held."""
        if not self._arrived and self._reader is not None and not self._is_between:
            self._resume_state = self._reader.state() or self._resume_state

    def add(self, deltas: Sequence[Delta]) -> list[Event]:
        """Do both. Raises :class:`Interrupted` where the run is over or left."""
        self.take(deltas)
        if self.is_over or self._is_left:
            if self.is_over:
                # A response that goes on in the background is cancelled by what is known of it. Who takes over
                # one that is left goes on behind its state, which must not be ahead of the text.
                self._resume_state = self._arrived_state or self._resume_state
            raise Interrupted
        return self.grow()


def _call(method: Callable[[], None] | None) -> None:
    if method is not None:
        method()
