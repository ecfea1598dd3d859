"""A run's life: queue, pump, cancel, failure, shutdown. A run belongs to its thread, not to a request."""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Final, NamedTuple, TypeVar

import openai
from sqlalchemy.exc import SQLAlchemyError

from .. import events
from ..errors import MESSAGE_TOO_LONG, RequestError, RunError, masked
from ..events import RUN_ENDS, TERMINAL, Event
from ..log.protocol import REFUSED, Claim, EventId, Log, LogUnavailableError, PositionExpiredError
from ..platform.interrupt import Interrupted
from ..platform.log_throttle import LogThrottle
from ..settings import Settings
from ..store.leases import LEASE_SECONDS
from ..store.sql import LAPSED, RELEASED, Answer, LeasedRun, Owner, ThreadStore
from ..store.tables import runs
from ..types import Entry, Message, Run
from ..upstream import answer_stream, items
from ..upstream.deltas import Begun, End, Part
from ..upstream.items import Limit, Turn
from . import snapshot
from .active_run import ActiveRun, History, RunRequest
from .active_run import spawn as _spawn
from .checkpointer import Checkpointer
from .delta_publisher import DeltaPublisher
from .log_appender import LogAppender
from .message_accumulator import Ahead, MessageAccumulator
from .notifier import Notifier
from .other_workers import OtherWorkers

_log = logging.getLogger(__name__)

_BROKEN: Final = ("upstream_cut", "upstream_ended_early", "upstream_stalled", "upstream_unreachable", "upstream_error")
"""How the connection to a response can fail that goes on in the background."""
_TRIES: Final = 6
_HANDED_SECONDS: Final = 1.0
_CUT_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.25
_UNWANTED: Final = ("cancelled", "failed", "incomplete")

T = TypeVar("T")


class Started(NamedTuple):
    """What one POST began: the user's entry, the runs, and the place in the log before all of it."""

    message: Entry | None
    runs: list[Run]
    place: EventId


class Executor:
    """Runs the runs of one worker. ``worker`` names it in the store.

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
        complaints: LogThrottle | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._store, self._log, self._settings = store, log, settings
        self._worker, self._adopt, self._steady = worker, adopt, steady
        self._complaints = complaints or LogThrottle()
        self._notifier = notifier or Notifier(None, self._complaints)
        self._guard = threading.Lock()
        self._live: dict[str, ActiveRun] = {}
        self._queues: dict[str, list[list[ActiveRun]]] = {}
        self._teller = LogAppender(log)
        self._keeper = Checkpointer(store, log, self._teller, worker, self._leave, self._complaints)
        self._publisher = DeltaPublisher(
            self._teller, settings.pace_seconds, viewers, self._only_grows, self._complaints
        )
        # Threads with runs of the worker that this one replaces, where workers do not share a log.
        self._foreign: set[str] = set()
        self._others = OtherWorkers(store, log, self._teller, worker, settings.drain_seconds)
        self._attending: set[str] = set()
        # Begins nothing any more; and is about to end.
        self._resting, self._stopping = threading.Event(), threading.Event()

    # Commands

    def submit(
        self,
        owner: Owner,
        thread_id: str,
        message: Message | None,
        asked: Sequence[RunRequest],
        mode: str,
        answer: Callable[[Started], Answer | None],
    ) -> Started | None:
        """Stores a user's message and a run an assistant, and starts them when the thread is free.

        ``answer`` gives what to remember for the request's Idempotency-Key. Gives ``None`` when the thread
        is gone. Raises what :meth:`ThreadStore.add` raises.
        """
        pairs: list[tuple[Run, Message]] = []
        for one in asked:
            run = events.run(thread_id, one.assistant.id, one.assistant.model)
            reply = events.message(thread_id, "assistant", [], assistant_id=one.assistant.id, run_id=run["id"])
            run["message_id"] = reply["id"]
            pairs.append((run, reply))
        # The app may be asked for that: not under the lock.
        is_left = self._resting.is_set() and all(self._adopt(owner, one.assistant.id) for one in asked)
        with self._log.lock(thread_id):
            started = Started(
                events.entry(message) if message else None, [run for run, _ in pairs], self._log.end(thread_id)
            )
            group_id = events.new_id("group")
            leaves = self._stopping.is_set() or is_left
            with self._teller.telling(thread_id):
                position = self._store.add(
                    owner,
                    thread_id,
                    message,
                    pairs,
                    mode=mode,
                    group_id=group_id,
                    worker=self._worker,
                    # While this worker leaves, another takes the run.
                    lease=0 if leaves else LEASE_SECONDS,
                    place=str(started.place),
                    max_runs=self._settings.max_runs,
                    answer=answer(started),
                )
            if position is None:
                return None
            if message:
                self._notifier.notify("message_created", owner, message=message)
            told = [events.message_created(message)] if message else []
            for run, reply in pairs:
                told += [events.run_created(run), events.run_status(run), events.message_created(reply)]
            place = self._teller.tell(thread_id, told)
            beside = group_id if mode == "parallel" else None
            lives = [
                ActiveRun(
                    MessageAccumulator(run.copy(), reply.copy(), []), one, position + at, place or started.place, beside
                )
                for at, ((run, reply), one) in enumerate(zip(pairs, asked, strict=True), 1 if message else 0)
            ]
            for live in lives:
                live.owner = owner
            if not leaves and lives and self._stopping.is_set():
                self._release([live.id for live in lives])
            elif not leaves:
                self._share_history(lives, mode)
                self._enqueue(thread_id, lives, mode)
        return started

    def cancel(self, thread_id: str, run_id: str) -> Run | None:
        """Cancels a run that is not over; gives it as it is then, ``None`` for an unknown one."""
        live = self._live.get(run_id)
        if live is not None and live.thread_id == thread_id:
            self._interrupt(live, MessageAccumulator.cancel)
        run = self._store.run(thread_id, run_id)
        if run is not None and run["status"] not in TERMINAL:
            self._store.request_cancel(run_id)
            self._log.signal(thread_id)
        return run

    def delete(self, thread_id: str) -> None:
        """Deletes the thread, stopping its runs."""
        with self._log.lock(thread_id):
            with self._teller.telling(thread_id):
                self._store.delete_thread(thread_id)
            self._teller.tell_last(thread_id, events.thread_deleted(thread_id))
            lives = [live for live in list(self._live.values()) if live.thread_id == thread_id]
        for live in lives:
            self._interrupt(live, MessageAccumulator.cancel, wait=0)
        self._log.signal(thread_id)

    def page(
        self,
        thread_id: str,
        limit: int,
        before: str | None = None,
        room: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> snapshot.Page | None:
        """Gives a page of entries, whether there are older ones, and the place in the log as of which
        the page is exact; ``None`` when ``before`` is no message of the thread. It is read in ``room``."""
        for tries in range(40):
            try:
                with room():
                    found = snapshot.read(self._store, self._log, thread_id, limit, before, self._live)
                if not self._log.shared and any(map(self._is_foreign, found[0] if found else ())):
                    self._foreign.add(thread_id)
                return found
            except snapshot.SnapshotMovedError:
                pass
            except PositionExpiredError:
                # Whoever has the run stores what it is now.
                if tries % 10 == 0:
                    self._log.signal(thread_id)
                self.flush(thread_id)
            time.sleep(min(0.002 * 2**tries, 0.1))
        raise RequestError(503, "store_unavailable", "The thread cannot be read now. Try again.", retry_after=1)

    def _is_foreign(self, entry: Entry) -> bool:
        run = entry["run"]
        return run is not None and run["status"] not in TERMINAL and run["id"] not in self._live

    def retell(self, only: str | None = None) -> None:
        """Begins the logs anew that lack something, or ``only`` that thread's. Called every second or so."""
        try:
            for thread_id in self._teller.retell(only):
                self._keep_anew(thread_id)
        except LogUnavailableError:
            # Whoever reads such a thread asks for it to be stored again.
            pass

    # The queue: groups of a thread one after another, the runs of a group at once

    def _enqueue(self, thread_id: str, lives: list[ActiveRun], mode: str) -> None:
        if not lives or self._stopping.is_set():
            return
        with self._guard:
            self._live.update((live.id, live) for live in lives)
            idle = thread_id not in self._queues
            queue = self._queues.setdefault(thread_id, [])
            for group in [lives] if mode == "parallel" else [[live] for live in lives]:
                insort(queue, group, key=lambda group: group[0].position)
        if idle:
            _spawn(self._work, thread_id)

    def _work(self, thread_id: str) -> None:
        while True:
            with self._guard:
                if not self._queues[thread_id] or self._stopping.is_set():
                    del self._queues[thread_id]
                    return
                group = self._queues[thread_id][0]
            if not self._waits(group[0]):
                break
        with self._guard:
            self._queues[thread_id].remove(group)
        _spawn(self._go_on, thread_id, group)
        first, *more = group
        for live in more:
            _spawn(self._perform, live)
        # Here, not behind all that the worker does.
        self._perform(first)

    def _go_on(self, thread_id: str, group: list[ActiveRun]) -> None:
        for live in group:
            live.ended.wait()
        self._work(thread_id)

    def _waits(self, live: ActiveRun) -> bool:
        """Whether a run before it is not over; waits then, for a while, for that."""
        try:
            end = self._log.end(live.thread_id)
            if not self._store.busy_before(live.thread_id, live.position, live.group_id):
                return False
            until = time.monotonic() + 1
            with closing(self._log.subscribe(live.thread_id, end)) as reader:
                while (left := until - time.monotonic()) > 0 and not self._stopping.is_set():
                    if any(record.name in RUN_ENDS for record in reader.read(left)):
                        break
        except (PositionExpiredError, LogUnavailableError):
            self._stopping.wait(0.25)
        except SQLAlchemyError as error:
            self._complaints.error(_log, error, "the store failed")
            self._stopping.wait(1)
        return True

    # One run

    def _perform(self, live: ActiveRun) -> None:
        try:
            self._pump(live)
        except Interrupted:
            if live.stop is None:
                self._forget(live)
            else:
                self._end(live, live.stop)
        except RunError as error:
            live.said = error.said
            self._end(live, lambda reply, error=error: reply.fail(error))  # type: ignore[misc]
        except Exception as error:
            self._complaints.error(_log, error, "run %s failed", live.id)
            # The next one of the kind has no traceback.
            live.said = masked(repr(error))
            self._end(live, lambda reply: reply.fail(RunError("server_error")))
        finally:
            live.close()
            if live.state is not None and not live.left and live.reply.run["status"] in _UNWANTED:
                # It goes on in the background otherwise, and is paid.
                self._cancel_upstream(live)

    def _cancel_upstream(self, live: ActiveRun) -> None:
        assert live.asked is not None
        assert live.state is not None
        try:
            answer_stream.cancel(live.asked.client(), live.state)
        except Exception as error:
            self._complaints.error(_log, error, "the background response of run %s may go on", live.id)

    def _pump(self, live: ActiveRun) -> None:
        # Not one that another worker began.
        is_new = live.reply.run["started_at"] is None
        if live.ended.is_set() or not (live.state or self._patiently(live, lambda: self._begin(live))):
            return None
        if is_new:
            self._notifier.notify("run_started", live.owner, run=live.reply.run)
        live.deadline = time.monotonic() + self._settings.run_seconds
        turns = [] if live.state else self._patiently(live, lambda: self._turns(live))
        tries = asked = 0
        while True:
            before = live.state
            try:
                # Another each time: a server that remembers a refusal would give it again.
                return self._read(live, turns, f"{live.id}-{asked}")
            except RunError as error:
                # A tick that met it tells first what came before.
                with live.lock:
                    tries = tries + 1 if live.state == before else 0
                if not self._goes_on(live, turns, error, tries):
                    raise
                asked += 1
                pause = 1.0 if live.is_loading else min(0.25 * 2**tries, 4)
                live.waits.wait(lambda pause=pause: time.sleep(pause))  # type: ignore[misc]

    def _goes_on(self, live: ActiveRun, turns: Sequence[Turn], error: RunError, tries: int) -> bool:
        """Whether the run is to ask again after ``error``. Raises another that says more."""
        if error.code == "context_length_exceeded" and len(turns) == 1:
            raise RunError(error.code, said=error.said, message=MESSAGE_TOO_LONG) from error
        if live.reply.over:
            return False
        if error.code == "model_loading" and not live.begun:
            # Until the run's time is over.
            live.said = error.said
            self._say_loading(live, True)
            return True
        if live.state is None or error.code not in _BROKEN or tries > _TRIES:
            return False
        _log.warning("run %s goes on in the background (%s): it is asked for again", live.id, error.code)
        return True

    def _read(self, live: ActiveRun, turns: list[Turn], key: str) -> None:
        assert live.asked is not None
        assistant, client, names, _ = live.asked
        own = list(dict.fromkeys((names.get(assistant.id, assistant.id), assistant.id)))
        stall = self._settings.stall_seconds

        def ask() -> answer_stream.AnswerStream:
            try:
                ours = client()
            except openai.OpenAIError as error:
                raise RunError("upstream_unauthorized", said=f"no client could be made: {error}") from error
            if live.state is not None:
                return answer_stream.resume(ours, assistant, live.state, stall, names=own)
            return answer_stream.open(ours, assistant, turns, stall, own, key)

        live.close()
        live.read(live.waits.wait(ask))
        self._say_loading(live, False)
        # After the end this reads on, so that the connection can serve the next run.
        while (parts := live.waits.wait(lambda: self._publisher.next(live))) is not None:
            self._publisher.add(live, parts)
            if live.elsewhere or isinstance(parts[0], Begun):
                # A crash would lose the response that it is of.
                self._keeper.keep(live)
            if isinstance(parts[-1], End):
                end = parts[-1]
                self._end(live, lambda reply, end=end: reply.finish(end))  # type: ignore[misc]

    def _only_grows(self, live: ActiveRun, parts: Sequence[Part]) -> bool:
        special = isinstance(parts[0], Begun) or isinstance(parts[-1], End)
        return not (special or live.elsewhere)

    def _patiently(self, live: ActiveRun, call: Callable[[], T]) -> T:
        """Gives what ``call`` gives, as soon as store and log can be reached. Raises :class:`Interrupted`."""
        while True:
            try:
                return call()
            except (LogUnavailableError, SQLAlchemyError) as error:
                self._complaints.warn(_log, "run %s waits for the store or the log: %r", live.id, error)
                if live.ended.wait(1):
                    raise Interrupted from error
                if self._stopping.is_set():
                    self._leave(live)
                    raise Interrupted from error

    def _begin(self, live: ActiveRun) -> bool:
        if self._stopping.is_set() and not live.reply.over:
            # Left to the next worker, as it is queued.
            self._forget(live)
            return False
        return self._change(live, MessageAccumulator.begin)

    def _change(self, live: ActiveRun, change: Callable[[MessageAccumulator], list[Event]]) -> bool:
        """Changes what a run is, in the store and then for its viewers; gives ``False`` where it is another's."""
        with self._log.lock(live.thread_id), live.saving, live.lock:
            if live.reply.over:
                return False
            told = change(live.reply)
            if not self._store.save(self._worker, *live.now()):
                self._forget(live)
                return False
            place = self._teller.tell(live.thread_id, told, live.claim)
            if place is REFUSED:
                # Taken between the two. Its next holder tells of what is stored with a snapshot.
                self._teller.untell(live.thread_id)
                self._forget(live)
                return False
            live.place = place or live.place
            return True

    def _say_loading(self, live: ActiveRun, is_loading: bool) -> None:
        """Tells viewers that the model is loading, or no more.

        Raises :class:`Interrupted` where the run is another's.
        """
        if is_loading == live.is_loading:
            return
        if not self._patiently(
            live, lambda: self._change(live, MessageAccumulator.wait if is_loading else MessageAccumulator.begin)
        ):
            self._leave(live)
            raise Interrupted
        live.is_loading = is_loading

    def _share_history(self, lives: Sequence[ActiveRun], mode: str) -> None:
        """Has the runs of a group that start together read their thread once."""
        whole = Limit(self._settings.max_history_chars, self._settings.max_history_messages)
        limits = [whole.within(live.asked.assistant.max_history) if live.asked else whole for live in lives]
        together = History(limits) if mode == "parallel" and lives else None
        for live, limit in zip(lives, limits, strict=True):
            live.history, live.limit = together or History([limit]), limit

    def _turns(self, live: ActiveRun) -> list[Turn]:
        assert live.asked is not None
        assistant, _, names, shorten = live.asked
        message_id = live.reply.message["id"]
        said, is_cut = live.history.get(lambda characters, count: self._store.history(message_id, characters, count))
        newest = live.limit.of(said)
        is_cut = is_cut or len(newest) < len(said)
        if shorten is not None:
            newest = items.shortened(newest, shorten)
        return items.turns_of(newest, assistant.id, names, is_cut=is_cut)

    def _leave(self, live: ActiveRun) -> None:
        """Does no more for a run that another worker has, or may have."""
        with live.lock:
            live.leave()

    def _end(self, live: ActiveRun, finish: Callable[[MessageAccumulator], list[Event]]) -> None:
        """Ends the run once: the store has its final state before viewers hear of it."""
        with live.lock:
            if live.reply.over:
                return
            if not live.left:
                told = finish(live.reply)
                final = live.now()
                error = final[0]["last_error"]
                if final[0]["status"] == "failed" and error is not None:
                    who, code = final[0]["assistant_id"], error["code"]
                    _log.warning("run %s of %r failed: %s: %s", live.id, who, code, live.said or "-")
        if live.left:
            self._forget(live)
            return
        while True:
            try:
                with self._teller.locked(live.thread_id):
                    mine = self._store.save(self._worker, *final)
                    if mine:
                        run, message, *_ = final
                        self._notifier.notify("run_ended", live.owner, run=run, message=message)
                        self._teller.tell(live.thread_id, told, live.claim)
                    else:
                        # Another worker has it, if it is still there.
                        live.left = self._store.run(live.thread_id, live.id) is not None
                        self._teller.untell(live.thread_id, keep=live.left)
                break
            except SQLAlchemyError as error:
                self._complaints.error(_log, error, "the end of run %s cannot be stored yet", live.id)
                if self._stopping.wait(1):
                    break
            except Exception as error:
                # Whatever it is, the thread's queue must go on.
                self._complaints.error(_log, error, "the end of run %s cannot be told", live.id)
                break
        self._forget(live)

    def _forget(self, live: ActiveRun) -> None:
        with self._guard:
            # What came back late may be of a run that this worker has anew.
            if self._live.get(live.id) is live:
                del self._live[live.id]
        self._publisher.forget(live)
        live.ended.set()

    def _interrupt(self, live: ActiveRun, stop: Callable[[MessageAccumulator], list[Event]], wait: float = 0.5) -> None:
        live.stop = stop
        # Also for a queued run, which may be starting at this moment.
        live.waits.interrupt()
        if live.reply.run["status"] != "queued" and live.ended.wait(wait):
            return
        # Not started, or a thread that nothing can stop: it finds the run over when it comes back.
        self._end(live, stop)

    # Upkeep, called by the runtime's housekeeper

    def flush(self, thread_id: str | None = None) -> None:
        """Stores the text that grew since it was last stored; of the thread ``thread_id``, all that is
        not over, as of the log's end."""
        if thread_id is None:
            self._keeper.keep_all([live for live in list(self._live.values()) if live.dirty])
        elif self._teller.lacks(thread_id):
            self.retell(thread_id)
        else:
            self._keep_anew(thread_id)

    def _keep_anew(self, thread_id: str) -> None:
        for live in list(self._live.values()):
            if live.thread_id == thread_id:
                self._keeper.keep(live, anew=True)

    def held(self) -> list[str]:
        """Gives the ids of the runs whose leases are to be renewed. Can be called from any thread."""
        leaving = self._stopping.is_set()
        lives = list(self._live.values())
        return [live.id for live in lives if not (leaving and live.reply.run["status"] == "queued")]

    def heed(self) -> None:
        """Cancels the runs that another worker was asked to cancel, and ends those that took too long."""
        lives = dict(self._live)
        if not lives:
            return
        for run_id in self._store.to_cancel(self._worker, list(lives)):
            self._interrupt(lives[run_id], MessageAccumulator.cancel, wait=0)
        for live in lives.values():
            if time.monotonic() > live.deadline:
                code = "model_loading" if live.is_loading else "run_time_limit"
                self._interrupt(live, lambda reply, code=code: reply.fail(RunError(code)), wait=0)  # type: ignore[misc]

    def is_told(self) -> bool:
        """Whether all that is stored was told."""
        return self._teller.is_done()

    def attend(self, thread_id: str) -> None:
        """Another worker asks to look at the thread's runs: see :meth:`Log.signal`. Does not wait."""
        ours = any(live.thread_id == thread_id for live in list(self._live.values()))
        if ours and thread_id not in self._attending:
            self._attending.add(thread_id)
            _spawn(self._attend, thread_id)

    def _attend(self, thread_id: str) -> None:
        self._attending.discard(thread_id)
        try:
            self.heed()
            self.flush(thread_id)
        except (LogUnavailableError, SQLAlchemyError) as error:
            self._complaints.warn(_log, "the runs of a thread are looked at later: %r", error)

    def sweep(self) -> None:
        """Takes over what a leaving worker let go of; and what a lost one left, where the others could have renewed
        their leases."""
        if not self._resting.is_set():
            self._inherit()
        if not self._log.shared:
            # Its viewers here get what the other worker stores, as long as that has runs.
            others = self._store.held(runs.c.worker != self._worker)
            foreign = {held.run["thread_id"] for held in others}
            for thread_id in foreign | self._foreign:
                self._teller.untell(thread_id)
            self._foreign = foreign
            self._others.follow()

    def _inherit(self) -> None:
        left = self._store.held(LAPSED if self._steady() else RELEASED)
        for group in _groups([held for held in left if held.run["id"] not in self._live]):
            self._take_over(group)
        if self._steady():
            # What a worker could not tell before it was gone, nobody else knows.
            since = time.time() - self._settings.run_seconds - self._settings.log_seconds
            for thread_id in self._store.bury(2 * LEASE_SECONDS, since):
                self._teller.untell(thread_id)

    def _take_over(self, group: Sequence[LeasedRun]) -> None:
        thread_id = group[0].run["thread_id"]
        taken = [live for seen in group if (live := self._claimed(seen)) is not None]
        if taken and any(seen.lease for seen in group):
            # Some of what its last holder stored may be told nowhere. Only now, and only by who took it: what is
            # stored nowhere is read.
            self._teller.untell(thread_id)
        lives: list[ActiveRun] = []
        for live in taken:
            if not _can_go_on(live):
                self._end(live, lambda reply: reply.fail(RunError("worker_lost")))
            else:
                lives.append(live)
        self._share_history(lives, group[0].mode)
        self._enqueue(thread_id, lives, group[0].mode)

    def _claimed(self, seen: LeasedRun) -> ActiveRun | None:
        """Gives a run that is this worker's from now on, with what the log has of it; ``None`` where it is not."""
        if seen.lease and not self._steady():
            # All were held up since it was read.
            return None
        held = self._store.claim(seen, self._worker, LEASE_SECONDS)
        if held is None:
            return None
        if seen.lease:
            holder = seen.name or seen.worker
            _log.warning(
                "run %s of worker %s is taken over %.1f s after its lease", held.run["id"], holder, seen.overdue
            )
        asked = self._adopt(held.owner, held.run["assistant_id"])
        place = self._recovered(held)
        beside = held.group_id if held.mode == "parallel" else None
        live = ActiveRun(
            MessageAccumulator(held.run, held.message, held.steps), asked, held.position, place, beside, held.claim
        )
        live.owner = held.owner
        if held.upstream is not None and asked is not None:
            live.state, live.ahead = held.upstream, Ahead(held.upstream, held.message, held.steps)
        return live

    def _recovered(self, held: LeasedRun) -> EventId | None:
        """Adds to the message and the steps what the log has beyond the store: viewers saw it. Gives the place as of
        which they are exact then."""
        place = EventId.parse(held.place)
        entry = events.entry(held.message, held.run, held.steps)
        # Before the log is read: what its last holder tells later is not in it.
        if not self._teller.fence(held.run["thread_id"], Claim(held.run["id"], held.claim)):
            return place
        try:
            if place is None:
                # Its last holder stored what it could not tell: nothing may be told behind what viewers have.
                raise PositionExpiredError
            records, place = self._log.recover(held.run["thread_id"], place, held.run["id"])
            for record in filter(snapshot.grows, records):
                events.apply(entry, record.name, record.data())
        except (PositionExpiredError, LogUnavailableError):
            # What is stored is all there is; viewers may have seen more.
            self._teller.untell(held.run["thread_id"])
        held.steps[:] = entry["steps"]
        return place

    # The end of a worker: see :class:`.shutdown.Crew`

    def is_busy(self) -> bool:
        return any(
            live.state is None or self._adopt(live.owner, live.reply.run["assistant_id"]) is None
            for live in list(self._live.values())
        )

    def rest(self) -> None:
        self._resting.set()

    def resume(self) -> None:
        self._resting.clear()

    def is_ignored(self, seconds: float) -> bool:
        return bool(self._store.held(RELEASED, runs.c.created_at < time.time() - seconds))

    def leave(self) -> None:
        """Starts nothing any more, and leaves queued runs to the next worker."""
        self._stopping.set()
        self._release()

    def stop(self, drain: float) -> None:
        """Gives the runs under way ``drain`` seconds, then cuts them off. Call :meth:`leave` before."""
        until = time.monotonic() + drain
        is_first = True
        while True:
            # Also those whose response is known of only now.
            self._hand_over([live for live in list(self._live.values()) if live.state is not None])
            late = [live for live in list(self._live.values()) if live.reply.run["status"] != "queued"]
            left = until - time.monotonic()
            if not late or left <= 0:
                break
            if is_first:
                _log.warning("shutting down: waiting up to %g s for the runs under way (%d)", drain, len(late))
            is_first = False
            _wait_for(late, min(left, _LOOK_SECONDS))
        # Asked for under a key, so that the next worker, which asks again, may get the same response.
        self._hand_over([live for live in late if _can_go_on(live)])
        late = [live for live in late if not live.ended.is_set()]
        for live in late:
            live.stop = MessageAccumulator.cut_off
            live.waits.interrupt()
        _wait_for(late, _CUT_SECONDS)
        for live in late:
            self._end(live, MessageAccumulator.cut_off)
        self._publisher.close()

    def _hand_over(self, lives: Sequence[ActiveRun]) -> None:
        """Leaves background responses to the next worker, which goes on behind what is stored here."""
        for live in lives:
            self._leave(live)
        _wait_for(lives, _HANDED_SECONDS)
        for live in lives:
            # Or the lease of one that nothing can stop would be renewed.
            self._forget(live)
        self._keeper.keep_all(lives)
        if lives:
            self._release([live.id for live in lives])

    def _release(self, run_ids: Sequence[str] = ()) -> None:
        try:
            self._store.release(self._worker, *run_ids)
        except SQLAlchemyError as error:
            self._complaints.error(_log, error, "runs that are left wait until their lease ends")


def _wait_for(lives: Sequence[ActiveRun], seconds: float) -> None:
    """Waits until they have ended, at most so long for all of them."""
    until = time.monotonic() + seconds
    for live in lives:
        live.ended.wait(max(0.0, until - time.monotonic()))


def _can_go_on(live: ActiveRun) -> bool:
    """Whether a run that one worker leaves is one for another to go on with."""
    with live.lock:
        run, message, steps, *_ = live.now()
    if live.asked is None or run["status"] == "queued":
        return live.asked is not None
    # What was said of a response whose id nobody knows would be said, and paid, again.
    is_known = live.state is not None or not (message["content"] or steps)
    return live.asked.assistant.background and is_known


def _groups(held: Sequence[LeasedRun]) -> Iterator[list[LeasedRun]]:
    """Gives the runs of each POST together, in the order of the threads."""
    groups: dict[str, list[LeasedRun]] = {}
    for one in held:
        groups.setdefault(one.group_id, []).append(one)
    yield from groups.values()
