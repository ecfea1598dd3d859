"""Takes over the runs that other workers left or lost, and shows viewers what those still do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from .. import events
from ..errors import RunError
from ..events import TERMINAL
from ..log.protocol import Claim, EventId, LogUnavailableError, PositionExpiredError
from ..store.leases import LEASE_SECONDS
from ..store.sql import LAPSED, RELEASED, LeasedRun
from ..store.tables import runs
from ..types import Entry
from . import snapshot
from .active_run import ActiveRun
from .executor import Executor
from .loop_state import LoopState
from .message_accumulator import MessageAccumulator
from .other_workers import OtherWorkers
from .run_queue import RunQueue
from .thread_history import RunRequest, histories
from .tracing import RunTrace
from .worker import Worker

_log = logging.getLogger(__name__)


class Recovery:
    """What one worker does for runs that are another's. ``expire`` ends one that waited too long for an answer, by the
    ids of its thread and itself."""

    def __init__(self, worker: Worker, executor: Executor, queue: RunQueue, expire: Callable[[str, str], None]) -> None:
        self._worker, self._executor, self._queue, self._expire = worker, executor, queue, expire
        # Threads with runs of the worker that this one replaces, where workers do not share a log.
        self._foreign: set[str] = set()
        drain = worker.settings.drain_seconds
        self._others = OtherWorkers(worker.store, worker.log, worker.appender, worker.name, drain)

    def note_foreign(self, thread_id: str, page: Sequence[Entry]) -> None:
        """Take note of a thread that was read here while another worker answers in it: its end is to be shown."""
        if not self._worker.log.shared and any(map(self._is_foreign, page)):
            self._foreign.add(thread_id)

    def _is_foreign(self, entry: Entry) -> bool:
        run = entry["run"]
        return run is not None and run["status"] not in TERMINAL and run["id"] not in self._worker.runs

    def sweep(self) -> None:
        """Take over what a leaving worker let go of; and what a lost one left, where the others could have renewed
        their leases. Called every second or so."""
        worker = self._worker
        if not worker.resting.is_set():
            self._inherit()
        if not worker.log.shared:
            # Viewers here get what the other worker stores, as long as that has runs.
            others = worker.store.held(runs.c.worker != worker.name)
            foreign = {held.run["thread_id"] for held in others}
            for thread_id in foreign | self._foreign:
                worker.appender.mark_incomplete(thread_id)
            self._foreign = foreign
            self._others.follow()

    def _inherit(self) -> None:
        worker = self._worker
        left = worker.store.held(LAPSED if worker.is_steady() else RELEASED)
        going = []
        for held in left:
            if held.run["status"] == "requires_action" and not held.worker:
                self._expire(held.run["thread_id"], held.run["id"])
            elif held.run["id"] not in worker.runs:
                going.append(held)
        for group in _groups(going):
            self._take_over(group)
        if worker.is_steady():
            # What a worker could not tell before it was gone, nobody else knows.
            since = time.time() - worker.settings.run_seconds - worker.settings.log_seconds
            for thread_id in worker.store.bury(2 * LEASE_SECONDS, since):
                worker.appender.mark_incomplete(thread_id)

    def _take_over(self, group: Sequence[LeasedRun]) -> None:
        thread_id, mode = group[0].run["thread_id"], group[0].mode
        taken = [active for seen in group if (active := self._claimed(seen)) is not None]
        if taken and any(seen.lease for seen in group):
            # Some of what its last holder stored may be told nowhere. Only now, and only by who took it: what is
            # stored nowhere is read.
            self._worker.appender.mark_incomplete(thread_id)
        going: list[ActiveRun] = []
        for active in taken:
            if can_go_on(active):
                going.append(active)
            else:
                self._executor.end(active, RunError("worker_lost"))
        requests = [active.request for active in going]
        for active, history in zip(
            going, histories(requests, self._worker.settings, shared=mode == "parallel"), strict=True
        ):
            active.prepare(history)
        self._queue.add(thread_id, going, mode)

    def _claimed(self, seen: LeasedRun) -> ActiveRun | None:
        """Give a run that is this worker's from now on, with what the log has of it; ``None`` where it is not."""
        worker = self._worker
        if seen.lease and not worker.is_steady():
            # This worker stood still since it was read, so the holder may be alive.
            return None
        held = worker.store.claim(seen, worker.name, LEASE_SECONDS)
        if held is None:
            return None
        if seen.lease:
            holder = seen.name or seen.worker
            _log.warning(
                "run %s of worker %s is taken over %.1f s after its lease", held.run["id"], holder, seen.overdue
            )
        request = worker.adopt(held.owner, held.run["assistant_id"])
        return active_of(held, request, self._recovered(held), worker.tracing.run("taken_over"))

    def _recovered(self, held: LeasedRun) -> EventId | None:
        """Add to the message and the steps what the log has beyond the store: viewers saw it. Give the event as of
        which they are exact then, ``None`` where there is none."""
        log, appender = self._worker.log, self._worker.appender
        thread_id, event_id = held.run["thread_id"], EventId.parse(held.event_id)
        entry = events.entry(held.message, held.run, held.steps)
        # Before the log is read: what its last holder tells later is not in it.
        if not appender.fence(thread_id, Claim(held.run["id"], held.claim)):
            return event_id
        try:
            if event_id is None:
                # It was stored without an event id: the log lacks some of its text, so that must begin anew.
                raise PositionExpiredError
            records, event_id = log.recover(thread_id, event_id, held.run["id"])
            for record in filter(snapshot.grows, records):
                events.apply(entry, record.name, record.data())
        except (PositionExpiredError, LogUnavailableError):
            # What is stored is all there is; viewers may have seen more.
            appender.mark_incomplete(thread_id)
        held.steps[:] = entry["steps"]
        return event_id


def active_of(
    held: LeasedRun,
    request: RunRequest | None,
    event_id: EventId | None,
    trace: RunTrace,
    address: str | None = None,
) -> ActiveRun:
    """Give a run as this worker has it that it holds now, exact as of an event."""
    page_tools = request.assistant.page_tools if request is not None else ()
    return ActiveRun(
        held.owner,
        MessageAccumulator(held.run, held.message, held.steps, page_tools),
        request,
        position=held.position,
        event_id=event_id,
        group_id=held.group_id if held.mode == "parallel" else None,
        command_id=held.group_id,
        claim=held.claim,
        resume_state=held.upstream if request is not None else None,
        loop=LoopState.restored(held.loop),
        trace=trace,
        address=address,
    )


def can_go_on(active: ActiveRun) -> bool:
    """Tell whether a run that one worker leaves is one for another to go on with."""
    if active.request is None or active.is_queued or active.is_over:
        return active.request is not None and not active.is_over
    with active.lock:
        _, message, steps, *_ = active.state()
        calls = active.accumulator.calls
        if active.loop is not None and (calls.step_id == active.loop.step_id or not active.has_told_of_round()):
            # Its calls are stored, or it was to ask the next time: nothing is told twice.
            return True
    # What was said of a response whose id nobody knows would be said, and paid, again.
    is_known = active.resume_state is not None or not (message["content"] or steps)
    return active.request.assistant.background and is_known


def _groups(held: Sequence[LeasedRun]) -> Iterator[list[LeasedRun]]:
    """Give the runs of each command together, in the order of the threads."""
    groups: dict[str, list[LeasedRun]] = {}
    for one in held:
        groups.setdefault(one.group_id, []).append(one)
    yield from groups.values()
