"""The runs of one worker, for commands and for the housekeeper: begun, cancelled, read, looked after."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from .. import events
from ..errors import RequestError
from ..events import TERMINAL
from ..log.protocol import EventId, Log, LogUnavailableError, PositionExpiredError
from ..platform.log_throttle import LogThrottle
from ..platform.threads import spawn
from ..settings import Settings
from ..store.leases import LEASE_SECONDS
from ..store.sql import PAGE_BYTES, LeasedRun, Owner, StoredAnswer, ThreadStore
from ..store.thread_change import UNANSWERED, ThreadChange
from ..store.tool_calls import ToolCallStore
from ..types import Entry, Message, Run, StartedRuns
from . import snapshot
from .active_run import ActiveRun
from .checkpointer import Checkpointer
from .executor import Executor
from .log_appender import LogAppender
from .message_accumulator import MessageAccumulator, Stop
from .notifier import Notifier
from .recovery import Recovery, active_of
from .run_changes import RunChanges
from .run_queue import RunQueue
from .shutdown import Shutdown
from .thread_history import RunRequest, histories
from .tool_answers import Ended, ToolAnswers
from .tool_execution import ToolExecutions
from .tracing import Tracing
from .worker import ActiveRuns, Worker

_log = logging.getLogger(__name__)


class Started(NamedTuple):
    """What one command began: the user's entry, the runs, and the event in the log before all of it."""

    message: Entry | None
    runs: list[Run]
    event_id: EventId

    def public(self) -> StartedRuns:
        """Give what the caller is told of it."""
        return {"message": self.message, "runs": self.runs}


class _Group(NamedTuple):
    """The runs of one command, to be stored: their objects in the order of ``requests``."""

    id: str
    requests: Sequence[RunRequest]
    pairs: list[tuple[Run, Message]]
    mode: str
    address: str | None


class Runner:
    """What one worker does with runs. ``worker`` names it in the store.

    ``adopt`` gives the assistant for a run that another worker left behind, by the thread's owner and its id, or
    ``None``; ``viewers`` how many event streams the worker has open; ``steady`` whether all workers could renew their
    leases for as long as those are; ``notifier`` tells the app what was stored, by the worker that stored it.
    """

    def __init__(
        self,
        store: ThreadStore,
        log: Log,
        settings: Settings,
        worker: str,
        adopt: Callable[[Owner, str], RunRequest | None],
        viewers: Callable[[], int] = lambda: 0,
        steady: Callable[[], bool] = lambda: True,
        throttle: LogThrottle | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        throttle = throttle or LogThrottle()
        self._worker = Worker(
            worker,
            store,
            ToolCallStore(store),
            log,
            settings,
            LogAppender(log),
            ActiveRuns(),
            notifier or Notifier(None, throttle),
            throttle,
            Tracing(throttle, is_on=settings.tracing == "on"),
            adopt,
            steady,
            resting=threading.Event(),
            stopping=threading.Event(),
        )
        self._checkpointer = Checkpointer(self._worker)
        self._changes = RunChanges(self._worker)
        self.executions = ToolExecutions(throttle)
        self._executor = Executor(self._worker, self._changes, self._checkpointer, self.executions, viewers)
        self._queue = RunQueue(self._worker, self._executor.perform, self._go_on_without)
        self.answers = ToolAnswers(self._worker, self._go_on)
        self._recovery = Recovery(self._worker, self._executor, self._queue, self.answers.expire)
        self.shutdown = Shutdown(self._worker, self._executor, self._changes, self._checkpointer)
        self._attending: set[str] = set()

    @property
    def active(self) -> ActiveRuns:
        """Give the runs that this worker has: not over, or not told to be so yet."""
        return self._worker.runs

    # Commands

    def submit(
        self,
        owner: Owner,
        thread_id: str,
        message: Message | None,
        requests: Sequence[RunRequest],
        mode: str,
        answer: Callable[[Started], StoredAnswer | None],
        address: str | None = None,
    ) -> Started | None:
        """Store a user's message and a run for each assistant, and begin those when the thread is free.

        ``answer`` gives what to remember for the request's Idempotency-Key. Give ``None`` where the thread
        is gone, and count the runs for the ``address`` that they come from. Raises what :meth:`ThreadStore.add`
        raises.
        """
        worker = self._worker
        pairs: list[tuple[Run, Message]] = []
        for one in requests:
            run = events.run(thread_id, one.assistant.id, one.assistant.model)
            reply = events.message(thread_id, "assistant", [], assistant_id=one.assistant.id, run_id=run["id"])
            run["message_id"] = reply["id"]
            pairs.append((run, reply))
        group = _Group(events.new_id("group"), requests, pairs, mode, address)
        # The app may be asked for that: not under the lock.
        is_left = worker.resting.is_set() and all(worker.adopt(owner, one.assistant.id) for one in requests)
        with worker.log.lock(thread_id):
            started = Started(
                events.entry(message) if message else None, [run for run, _ in pairs], worker.log.end(thread_id)
            )
            # While this worker leaves, another takes the runs.
            is_left = worker.stopping.is_set() or is_left
            ended: list[Ended] = []

            def go_on(change: ThreadChange) -> None:
                ended[:] = self.answers.close(change, Stop.CANCELLED, UNANSWERED)

            with worker.appender.storing(thread_id):
                position = worker.store.add(
                    owner,
                    thread_id,
                    message,
                    pairs,
                    mode=mode,
                    group_id=group.id,
                    worker=worker.name,
                    lease=0 if is_left else LEASE_SECONDS,
                    event_id=str(started.event_id),
                    max_runs=worker.settings.max_runs,
                    max_parked=worker.settings.max_questions,
                    max_messages=worker.settings.max_messages,
                    answer=answer(started),
                    change=go_on,
                )
            if position is None:
                return None
            self.answers.tell(thread_id, ended)
            if message:
                worker.notifier.notify("message_created", owner, message=message)
            event_id = self._append(thread_id, message, pairs)
            if not is_left and pairs and worker.stopping.is_set():
                self.shutdown.release([run["id"] for run, _ in pairs])
            elif not is_left:
                first = position + (1 if message else 0)
                runs = self._activate(owner, group, first, event_id or started.event_id)
                self._queue.add(thread_id, runs, mode)
        return started

    def _append(self, thread_id: str, message: Message | None, pairs: Sequence[tuple[Run, Message]]) -> EventId | None:
        told = [events.message_created(message)] if message else []
        for run, reply in pairs:
            told += [events.run_created(run), events.run_status(run), events.message_created(reply)]
        return self._worker.appender.append(thread_id, told)

    def _activate(self, owner: Owner, group: _Group, position: int, event_id: EventId) -> list[ActiveRun]:
        is_parallel = group.mode == "parallel"
        runs = [
            ActiveRun(
                owner,
                MessageAccumulator(run.copy(), reply.copy(), [], request.assistant.page_tools),
                request,
                position=at,
                event_id=event_id,
                group_id=group.id if is_parallel else None,
                command_id=group.id,
                address=group.address,
                trace=self._worker.tracing.run("asked"),
            )
            for at, ((run, reply), request) in enumerate(zip(group.pairs, group.requests, strict=True), position)
        ]
        shown = histories(group.requests, self._worker.settings, shared=is_parallel)
        for active, history in zip(runs, shown, strict=True):
            active.prepare(history)
        return runs

    def _go_on_without(self, active: ActiveRun) -> None:
        self.answers.go_on_without(active.thread_id, active.position, active.command_id)

    def _go_on(self, held: LeasedRun, event_id: EventId | None, request: RunRequest, address: str | None) -> None:
        """Go on with a run whose calls were answered."""
        active = active_of(held, request, event_id, self._worker.tracing.run("answered"), address)
        if self._worker.stopping.is_set():
            self.shutdown.release([active.id])
            return
        [history] = histories([request], self._worker.settings, shared=False)
        active.prepare(history)
        self._queue.add(active.thread_id, [active], held.mode)

    def cancel(self, thread_id: str, run_id: str) -> Run | None:
        """Cancel a run that is not over; give it as it is then, ``None`` for an unknown one."""
        active = self.active.get(run_id)
        if active is not None and active.thread_id == thread_id:
            self._executor.interrupt(active, Stop.CANCELLED)
        run = self._worker.store.run(thread_id, run_id)
        if run is not None and run["status"] == "requires_action":
            self.answers.cancel(thread_id, run_id)
            run = self._worker.store.run(thread_id, run_id)
        if run is not None and run["status"] not in TERMINAL:
            self._worker.store.request_cancel(run_id)
            self._worker.log.signal(thread_id)
        return run

    def delete(self, thread_id: str) -> None:
        """Delete the thread, stopping its runs."""
        worker = self._worker
        with worker.log.lock(thread_id):
            with worker.appender.storing(thread_id):
                worker.store.delete_thread(thread_id)
            worker.appender.append_last(thread_id, events.thread_deleted(thread_id))
            runs = self.active.of_thread(thread_id)
        for active in runs:
            self._executor.interrupt(active, Stop.CANCELLED, wait=0)
        worker.log.signal(thread_id)

    def page(
        self,
        thread_id: str,
        limit: int,
        before: str | None = None,
        read_limit: Callable[[], AbstractContextManager[object]] = nullcontext,
        most_bytes: int = PAGE_BYTES,
    ) -> snapshot.Page | None:
        """Give a page of entries, whether there are older ones, and the event in the log as of which
        the page is exact; ``None`` when ``before`` is no message of the thread. It is read in ``read_limit``, and has
        fewer entries where they are long: see :meth:`ThreadStore.page`."""
        worker = self._worker
        for tries in range(40):
            try:
                with read_limit():
                    found = snapshot.read(worker.store, worker.log, thread_id, limit, before, self.active, most_bytes)
                if found is not None:
                    self._recovery.note_foreign(thread_id, found[0])
                return found
            except snapshot.SnapshotMovedError:
                pass
            except PositionExpiredError:
                # Whoever has the run stores what it is now.
                if tries % 10 == 0:
                    worker.log.signal(thread_id)
                self.flush(thread_id)
            time.sleep(min(0.002 * 2**tries, 0.1))
        raise RequestError(503, "store_unavailable", "The thread cannot be read now. Try again.", retry_after=1)

    # Upkeep, called by the housekeeper

    def flush(self, thread_id: str | None = None) -> None:
        """Store the text that grew since it was last stored; of the thread ``thread_id``, all that is
        not over, as of the log's end."""
        if thread_id is None:
            self._checkpointer.store_all([active for active in self.active.all() if active.checkpoint.is_due])
        elif self._worker.appender.is_incomplete(thread_id):
            self.rebuild(thread_id)
        else:
            self._store_rebased(thread_id)

    def rebuild(self, only: str | None = None) -> None:
        """Begin the logs anew that lack something, or ``only`` that thread's. Called every second or so."""
        try:
            for thread_id in self._worker.appender.rebuild(only):
                self._store_rebased(thread_id)
        except LogUnavailableError:
            # Whoever reads such a thread asks for it to be stored again.
            pass

    def _store_rebased(self, thread_id: str) -> None:
        for active in self.active.of_thread(thread_id):
            self._checkpointer.store(active, rebased=True)

    def held(self) -> list[str]:
        """Give the ids of the runs whose leases are to be renewed. Can be called from any thread."""
        is_leaving = self._worker.stopping.is_set()
        return [active.id for active in self.active.all() if not (is_leaving and active.is_queued)]

    def heed(self) -> None:
        """Cancel the runs that another worker was asked to cancel, and end those that took too long."""
        runs = {active.id: active for active in self.active.all()}
        if not runs:
            return
        for run_id in self._worker.store.to_cancel(self._worker.name, list(runs)):
            self._executor.interrupt(runs[run_id], Stop.CANCELLED, wait=0)
        for active in runs.values():
            error = active.overdue()
            if error is not None:
                self._executor.interrupt(active, error, wait=0)

    def has_told_all(self) -> bool:
        """Tell whether the logs have all that is stored."""
        return self._worker.appender.has_all()

    def attend(self, thread_id: str) -> None:
        """Look at the thread's runs, as another worker asks: see :meth:`Log.signal`. Does not wait."""
        if thread_id not in self._attending and self.active.of_thread(thread_id):
            self._attending.add(thread_id)
            spawn("assistream-attend", self._attend, thread_id)

    def _attend(self, thread_id: str) -> None:
        self._attending.discard(thread_id)
        try:
            self.heed()
            self.flush(thread_id)
        except (LogUnavailableError, SQLAlchemyError) as error:
            self._worker.throttle.warn(_log, "the runs of a thread are looked at later: %r", error)

    def sweep(self) -> None:
        """Take over what other workers left: see :meth:`Recovery.sweep`."""
        self._recovery.sweep()
