"""A run's life: queue, pump, cancel, failure, shutdown. A run belongs to its thread, not to a request."""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Final, NamedTuple, TypeVar

import openai
from sqlalchemy.exc import SQLAlchemyError

from . import events, pages, upstream
from .errors import RequestError, RunError
from .events import TERMINAL, Event, Json
from .interrupt import Interrupted
from .keeper import Keeper
from .live import Asked, Live
from .live import spawn as _spawn
from .log import Away, Log, Lost, Place
from .publisher import Publisher
from .reply import Ahead, Reply
from .schema import runs
from .settings import Settings
from .teller import Teller
from .threads import Answer, Held, Owner, ThreadStore
from .upstream.parts import Begun, End, Part, Turn

_log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
"""A run whose worker has not renewed its lease for so long is another worker's to end, or to go on with."""
_BROKEN: Final = ("upstream_cut", "upstream_ended_early", "upstream_stalled", "upstream_unreachable", "upstream_error")
"""How the connection to a response can fail that goes on in the background."""
_TRIES: Final = 6
_UNWANTED: Final = ("cancelled", "failed", "incomplete")
_LATE_SECONDS: Final = 5.0
_ENDS: Final = frozenset(f"thread.run.{status}" for status in TERMINAL)

T = TypeVar("T")


class Started(NamedTuple):
    """What one POST began: the user's entry, the runs, and the place in the log before all of it."""

    message: Json | None
    runs: list[Json]
    place: Place


class Runner:
    """Runs the runs of one worker. ``worker`` names it in the store.

    ``adopt`` gives the assistant for a queued run that another worker left behind, or ``None``; ``viewers`` how many
    event streams the worker has open.
    """

    def __init__(
        self,
        store: ThreadStore,
        log: Log,
        settings: Settings,
        worker: str,
        adopt: Callable[[str, str], Asked | None],
        viewers: Callable[[], int] = lambda: 0,
    ) -> None:
        self._store, self._log, self._settings = store, log, settings
        self._worker, self._adopt = worker, adopt
        self._guard = threading.Lock()
        self._live: dict[str, Live] = {}
        self._queues: dict[str, list[list[Live]]] = {}
        self._teller = Teller(log)
        self._keeper = Keeper(store, log, self._teller, worker, self._leave)
        self._publisher = Publisher(self._teller, settings.pace_seconds, viewers, self._plain)
        # Threads with runs of the worker that this one replaces, where workers do not share a log.
        self._foreign: set[str] = set()
        self._renewed = self._swept = time.monotonic()
        self._attending: set[str] = set()
        self._stopping = threading.Event()

    # Commands

    def submit(
        self,
        owner: Owner,
        thread_id: str,
        message: Json | None,
        asked: Sequence[Asked],
        mode: str,
        answer: Callable[[Started], Answer | None],
    ) -> Started | None:
        """Stores a user's message and a run an assistant, and starts them when the thread is free.

        ``answer`` gives what to remember for the request's Idempotency-Key. Gives ``None`` when the thread
        is gone. Raises what :meth:`ThreadStore.add` raises.
        """
        pairs: list[tuple[Json, Json]] = []
        for one in asked:
            run = events.run(thread_id, one.assistant.id, one.assistant.model)
            reply = events.message(thread_id, "assistant", [], assistant_id=one.assistant.id, run_id=run["id"])
            run["message_id"] = reply["id"]
            pairs.append((run, reply))
        with self._log.lock(thread_id):
            started = Started(
                events.entry(message) if message else None, [run for run, _ in pairs], self._log.end(thread_id)
            )
            group_id = events.new_id("group")
            with self._teller.telling(thread_id):
                position = self._store.add(
                    owner,
                    thread_id,
                    message,
                    pairs,
                    mode=mode,
                    group_id=group_id,
                    worker=self._worker,
                    # While this worker leaves, its successor takes the run.
                    lease=0 if self._stopping.is_set() else time.time() + LEASE_SECONDS,
                    place=str(started.place),
                    max_runs=self._settings.max_runs,
                    answer=answer(started),
                )
            if position is None:
                return None
            told = [events.message_created(message)] if message else []
            for run, reply in pairs:
                told += [events.run_created(run), events.run_status(run), events.message_created(reply)]
            place = self._teller.tell(thread_id, told)
            beside = group_id if mode == "parallel" else None
            lives = [
                Live(Reply(dict(run), dict(reply), []), one, position + at, place or started.place, beside)
                for at, ((run, reply), one) in enumerate(zip(pairs, asked, strict=True), 1 if message else 0)
            ]
            self._enqueue(thread_id, lives, mode)
        return started

    def cancel(self, thread_id: str, run_id: str) -> Json | None:
        """Cancels a run that is not over; gives it as it is then, ``None`` for an unknown one."""
        live = self._live.get(run_id)
        if live is not None and live.thread_id == thread_id:
            self._interrupt(live, Reply.cancel)
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
            self._teller.tell(thread_id, [events.thread_deleted(thread_id)])
            lives = [live for live in list(self._live.values()) if live.thread_id == thread_id]
        for live in lives:
            self._interrupt(live, Reply.cancel, wait=0)
        self._log.signal(thread_id)

    def page(self, thread_id: str, limit: int, before: str | None = None) -> pages.Page | None:
        """Gives a page of entries, whether there are older ones, and the place in the log as of which
        the page is exact; ``None`` when ``before`` is no message of the thread."""
        for tries in range(40):
            try:
                found = pages.read(self._store, self._log, thread_id, limit, before, self._live)
                if not self._log.shared and any(map(self._is_foreign, found[0] if found else ())):
                    self._foreign.add(thread_id)
                return found
            except pages.Moved:
                pass
            except Lost:
                # Whoever has the run stores what it is now.
                if tries % 10 == 0:
                    self._log.signal(thread_id)
                self.flush(thread_id)
            time.sleep(min(0.002 * 2**tries, 0.1))
        raise RequestError(503, "store_unavailable", "The thread cannot be read now. Try again.", retry_after=1)

    def _is_foreign(self, entry: Json) -> bool:
        run = entry["run"]
        return run is not None and run["status"] not in TERMINAL and run["id"] not in self._live

    def retell(self) -> None:
        """Begins the logs anew that lack something. Called every second or so."""
        try:
            for thread_id in self._teller.retell():
                self.flush(thread_id)
        except Away:
            # Whoever reads such a thread asks for it to be stored again.
            pass

    # The queue: groups of a thread one after another, the runs of a group at once

    def _enqueue(self, thread_id: str, lives: list[Live], mode: str) -> None:
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

    def _go_on(self, thread_id: str, group: list[Live]) -> None:
        for live in group:
            live.ended.wait()
        self._work(thread_id)

    def _waits(self, live: Live) -> bool:
        """Whether a run before it is not over; waits then, for a while, for that."""
        try:
            end = self._log.end(live.thread_id)
            if not self._store.busy_before(live.thread_id, live.position, live.group_id):
                return False
            until = time.monotonic() + 1
            with closing(self._log.subscribe(live.thread_id, end)) as reader:
                while (left := until - time.monotonic()) > 0 and not self._stopping.is_set():
                    if any(record.name in _ENDS for record in reader.read(left)):
                        break
        except (Lost, Away):
            self._stopping.wait(0.25)
        except SQLAlchemyError:
            _log.exception("the store failed")
            self._stopping.wait(1)
        return True

    # One run

    def _perform(self, live: Live) -> None:
        try:
            self._pump(live)
        except Interrupted:
            if live.stop is None:
                self._forget(live)
            else:
                self._end(live, live.stop)
        except RunError as error:
            self._end(live, lambda reply, error=error: reply.fail(error))  # type: ignore[misc]
        except Exception:
            _log.exception("run %s failed", live.id)
            self._end(live, lambda reply: reply.fail(RunError("server_error")))
        finally:
            live.close()
            if live.state is not None and not live.left and live.reply.run["status"] in _UNWANTED:
                # It goes on in the background otherwise, and is paid.
                self._cancel_upstream(live)

    def _cancel_upstream(self, live: Live) -> None:
        assert live.asked is not None
        assert live.state is not None
        try:
            upstream.cancel(live.asked.client(), live.state)
        except Exception:
            _log.exception("the background response of run %s may go on", live.id)

    def _pump(self, live: Live) -> None:
        if live.ended.is_set() or not (live.state or self._patiently(live, lambda: self._begin(live))):
            return None
        live.deadline = time.monotonic() + self._settings.run_seconds
        turns = [] if live.state else self._patiently(live, lambda: self._turns(live))
        tries = 0
        while True:
            before = live.state
            try:
                return self._read(live, turns)
            except RunError as error:
                # A tick that met it tells first what came before.
                with live.lock:
                    tries = tries + 1 if live.state == before else 0
                if live.state is None or live.reply.over or error.code not in _BROKEN or tries > _TRIES:
                    raise
                _log.warning("run %s goes on in the background (%s): it is asked for again", live.id, error.code)
                pause = min(0.25 * 2**tries, 4)
                live.waits.wait(lambda pause=pause: time.sleep(pause))  # type: ignore[misc]

    def _read(self, live: Live, turns: list[Turn]) -> None:
        assert live.asked is not None
        assistant, client, _ = live.asked
        stall = self._settings.stall_seconds

        def ask() -> upstream.Upstream:
            try:
                ours = client()
            except openai.OpenAIError as error:
                _log.error("no client could be made: %s", error)
                raise RunError("upstream_unauthorized") from error
            if live.state is not None:
                return upstream.resume(ours, assistant, live.state, stall)
            return upstream.open(ours, assistant, turns, stall)

        live.close()
        live.read(live.waits.wait(ask))
        # After the end this reads on, so that the connection can serve the next run.
        while (parts := live.waits.wait(lambda: self._publisher.next(live))) is not None:
            if self._is_late(live):
                live.checked = time.monotonic()
                self._keeper.keep(live)
            self._publisher.add(live, parts)
            if live.elsewhere or isinstance(parts[0], Begun):
                # A crash would lose the response that it is of.
                self._keeper.keep(live)
            if isinstance(parts[-1], End):
                end = parts[-1]
                self._end(live, lambda reply, end=end: reply.finish(end))  # type: ignore[misc]

    def _plain(self, live: Live, parts: Sequence[Part]) -> bool:
        special = isinstance(parts[0], Begun) or isinstance(parts[-1], End)
        return not (special or self._is_late(live) or live.elsewhere)

    def _is_late(self, live: Live) -> bool:
        """Whether this worker was held up; another may have taken the run for lost."""
        return time.monotonic() - max(self._renewed, live.checked) > _LATE_SECONDS

    def _patiently(self, live: Live, call: Callable[[], T]) -> T:
        """Gives what ``call`` gives, as soon as store and log can be reached. Raises :class:`Interrupted`."""
        while True:
            try:
                return call()
            except (Away, SQLAlchemyError) as error:
                _log.warning("run %s waits for the store or the log: %r", live.id, error)
                if live.ended.wait(1):
                    raise Interrupted from error
                if self._stopping.is_set():
                    self._leave(live)
                    raise Interrupted from error

    def _begin(self, live: Live) -> bool:
        with self._log.lock(live.thread_id), live.saving, live.lock:
            if live.reply.over:
                return False
            if self._stopping.is_set():
                # Left to the next worker, as it is queued.
                self._forget(live)
                return False
            told = live.reply.begin()
            mine = self._store.save(self._worker, *live.now())
            if not mine:
                self._forget(live)
                return False
            live.place = self._teller.tell(live.thread_id, told) or live.place
            return True

    def _turns(self, live: Live) -> list[Turn]:
        assert live.asked is not None
        names = live.asked.names
        turns: list[Turn] = []
        for _, role, speaker, content in self._store.history(live.reply.message["id"]):
            text = "".join(part["refusal"] if part["type"] == "refusal" else part["text"]["value"] for part in content)
            if not text:
                continue
            if speaker is None or speaker == live.reply.run["assistant_id"]:
                turns.append(Turn(role, text))
            else:
                # A model takes every assistant's turn for its own words, and some servers continue the last one.
                turns.append(Turn("user", f"[{names.get(speaker, speaker)}]\n{text}"))
        # An assistant may speak first, but servers refuse an empty history.
        return turns or [Turn("user", "Begin.")]

    def _leave(self, live: Live) -> None:
        """Does no more for a run that another worker has, or may have."""
        with live.lock:
            live.left = True
        live.stop = None
        live.waits.interrupt()

    def _end(self, live: Live, finish: Callable[[Reply], list[Event]]) -> None:
        """Ends the run once: the store has its final state before viewers hear of it."""
        with live.lock:
            if live.reply.over:
                return
            if not live.left:
                told = finish(live.reply)
                final = live.now()
        if live.left:
            self._forget(live)
            return
        while True:
            try:
                with self._teller.locked(live.thread_id):
                    mine = self._store.save(self._worker, *final)
                    if mine:
                        self._teller.tell(live.thread_id, told)
                    else:
                        # Another worker has it, if it is still there.
                        live.left = self._store.run(live.thread_id, live.id) is not None
                        self._teller.untell(live.thread_id)
                break
            except SQLAlchemyError:
                _log.exception("the end of run %s cannot be stored yet", live.id)
                if self._stopping.wait(1):
                    break
            except Exception:
                # Whatever it is, the thread's queue must go on.
                _log.exception("the end of run %s cannot be told", live.id)
                break
        self._forget(live)

    def _forget(self, live: Live) -> None:
        with self._guard:
            self._live.pop(live.id, None)
        self._publisher.forget(live)
        live.ended.set()

    def _interrupt(self, live: Live, stop: Callable[[Reply], list[Event]], wait: float = 0.5) -> None:
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
        lives = list(self._live.values())
        if thread_id is None:
            self._keeper.keep_all([live for live in lives if live.dirty])
            return
        for live in lives:
            if live.thread_id == thread_id:
                self._keeper.keep(live, anew=True)

    def renew(self) -> None:
        """Keeps this worker's runs its own, ends those that took too long, and cancels those that
        another worker was asked to cancel."""
        leaving = self._stopping.is_set()
        lives = {id: one for id, one in self._live.items() if not (leaving and one.reply.run["status"] == "queued")}
        if lives:
            for run_id in self._store.renew(self._worker, list(lives), time.time() + LEASE_SECONDS):
                self._interrupt(lives[run_id], Reply.cancel, wait=0)
        late = time.monotonic() - self._renewed > _LATE_SECONDS
        self._renewed = time.monotonic()
        for live in lives.values():
            if late:
                # Another worker may have taken it; what is stored shows that.
                self._keeper.keep(live)
            if time.monotonic() > live.deadline:
                self._interrupt(live, lambda reply: reply.fail(RunError("run_time_limit")), wait=0)

    def attend(self, thread_id: str) -> None:
        """Another worker asks to look at the thread's runs: see :meth:`Log.signal`. Does not wait."""
        ours = any(live.thread_id == thread_id for live in list(self._live.values()))
        if ours and thread_id not in self._attending:
            self._attending.add(thread_id)
            _spawn(self._attend, thread_id)

    def _attend(self, thread_id: str) -> None:
        self._attending.discard(thread_id)
        try:
            self.renew()
            self.flush(thread_id)
        except (Away, SQLAlchemyError) as error:
            _log.warning("the runs of a thread are looked at later: %r", error)

    def sweep(self) -> None:
        """Takes over what a lost or leaving worker left."""
        left = [held for held in self._store.held(runs.c.lease < time.time()) if held.run["id"] not in self._live]
        late = time.monotonic() - self._swept > _LATE_SECONDS
        self._swept = time.monotonic()
        if late:
            # The database was away; those who hold runs come to renew them first.
            return
        for group in _groups(left):
            self._take_over(group)
        if not self._log.shared:
            # Its viewers here get what the other worker stores, as long as that has runs.
            others = self._store.held(runs.c.worker != self._worker)
            foreign = {held.run["thread_id"] for held in others}
            for thread_id in foreign | self._foreign:
                self._teller.untell(thread_id)
            self._foreign = foreign

    def _take_over(self, group: Sequence[Held]) -> None:
        lives: list[Live] = []
        thread_id = group[0].run["thread_id"]
        for held in group:
            if not self._store.claim(held.run["id"], self._worker, time.time() + LEASE_SECONDS):
                continue
            asked = self._adopt(held.scope, held.run["assistant_id"])
            place = self._recovered(held)
            beside = held.group_id if held.mode == "parallel" else None
            live = Live(Reply(held.run, held.message, held.steps), asked, held.position, place, beside)
            queued = held.run["status"] == "queued"
            if asked is None or not (queued or asked.assistant.background):
                self._end(live, lambda reply: reply.fail(RunError("worker_lost")))
                continue
            if held.upstream is not None:
                live.state, live.ahead = held.upstream, Ahead(held.upstream, held.message, held.steps)
            lives.append(live)
        self._enqueue(thread_id, lives, group[0].mode)

    def _recovered(self, held: Held) -> Place | None:
        """Adds to the message and the steps what the log has beyond the store: viewers saw it. Gives the place as of
        which they are exact then."""
        place = Place.parse(held.place)
        entry = events.entry(held.message, held.run, held.steps)
        try:
            for record in self._log.since(held.run["thread_id"], place) if place else ():
                place = record.place
                if record.key == held.run["id"] and pages.grows(record):
                    events.apply(entry, record.name, record.data())
        except (Lost, Away):
            # What is stored is all there is; viewers may have seen more.
            self._teller.untell(held.run["thread_id"])
        held.steps[:] = entry["steps"]
        return place

    def leave(self) -> None:
        """Starts nothing any more, and leaves queued runs to the next worker."""
        self._stopping.set()
        try:
            self._store.release(self._worker)
        except SQLAlchemyError:
            _log.exception("queued runs wait until their lease ends")

    def stop(self, drain: float) -> None:
        """Gives the runs under way ``drain`` seconds, then cuts them off. Call :meth:`leave` before."""
        until = time.monotonic() + drain
        for live in list(self._live.values()):
            if live.state is not None:
                self._hand_over(live)
        under_way = [live for live in list(self._live.values()) if live.reply.run["status"] != "queued"]
        if under_way and drain:
            _log.warning("shutting down: waiting up to %g s for the runs under way (%d)", drain, len(under_way))
        for live in under_way:
            live.ended.wait(max(0.0, until - time.monotonic()))
        for live in under_way:
            if not live.ended.is_set():
                self._interrupt(live, Reply.cut_off)
        self._publisher.close()

    def _hand_over(self, live: Live) -> None:
        """Leaves a background response to the next worker, which goes on behind what is stored here."""
        self._leave(live)
        live.ended.wait(1)
        self._keeper.keep(live)
        try:
            self._store.release(self._worker, live.id)
        except SQLAlchemyError:
            _log.exception("run %s waits until its lease ends", live.id)


def _groups(held: Sequence[Held]) -> Iterator[list[Held]]:
    """Gives the runs of each POST together, in the order of the threads."""
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(one.group_id, []).append(one)
    yield from groups.values()
