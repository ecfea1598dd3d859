"""A run's life: queue, pump, cancel, failure, shutdown. A run belongs to its thread, not to a request."""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import openai
from sqlalchemy.exc import SQLAlchemyError

from . import events, upstream
from .assistants import Assistant
from .errors import RequestError, RunError
from .events import TERMINAL, Event, Json
from .interrupt import Interrupted, Interruptible
from .log import Log, Lost, Place
from .reply import Reply
from .schema import runs
from .settings import Settings
from .threads import Answer, Held, Owner, ThreadStore
from .upstream.parts import End, Part, Turn

_log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
"""A run whose worker has not renewed its lease for so long is another worker's to end."""


class Asked(NamedTuple):
    """An assistant to run, the client to ask it with, and the names that the history's speakers have."""

    assistant: Assistant
    client: Callable[[], openai.OpenAI]
    names: dict[str, str]


class Started(NamedTuple):
    """What one POST began: the user's entry, the runs, and the place in the log before all of it."""

    message: Json | None
    runs: list[Json]
    place: Place


class _Live:
    """A run of this worker that is not over."""

    def __init__(self, reply: Reply, asked: Asked | None, position: int, place: str | None) -> None:
        self.reply, self.asked, self.position, self.place = reply, asked, position, place
        self.id: str = reply.run["id"]
        self.thread_id: str = reply.run["thread_id"]
        # ``saving`` comes first and keeps an older state from being stored over a newer one.
        self.saving, self.lock = threading.Lock(), threading.Lock()
        self.dirty = False
        self.ended = threading.Event()
        self.deadline = float("inf")
        self.upstream: upstream.Upstream | None = None
        self.waits = Interruptible(self.close)
        # How it ends when it is interrupted.
        self.stop: Callable[[Reply], list[Event]] = Reply.cancel

    def close(self) -> None:
        if self.upstream is not None:
            self.upstream.close()


class Runner:
    """Runs the runs of one worker. ``worker`` names it in the store.

    ``adopt`` gives the assistant for a queued run that another worker left behind, or ``None``.
    """

    def __init__(
        self,
        store: ThreadStore,
        log: Log,
        settings: Settings,
        worker: str,
        adopt: Callable[[str, str], Asked | None],
    ) -> None:
        self._store, self._log, self._settings = store, log, settings
        self._worker, self._adopt = worker, adopt
        self._guard = threading.Lock()
        self._live: dict[str, _Live] = {}
        self._queues: dict[str, list[list[_Live]]] = {}
        # Runs of other workers that viewers here have seen: run id to thread id and message id.
        self._foreign: dict[str, tuple[str, str]] = {}
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
            position = self._store.add(
                owner,
                thread_id,
                message,
                pairs,
                mode=mode,
                group_id=events.new_id("group"),
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
            self._log.append(thread_id, told)
            lives = [
                _Live(Reply(dict(run), dict(reply), []), one, position + at, str(started.place))
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
        return run

    def delete(self, thread_id: str) -> None:
        """Deletes the thread, stopping its runs."""
        with self._log.lock(thread_id):
            self._store.delete_thread(thread_id)
            self._log.append(thread_id, [events.thread_deleted(thread_id)])
            lives = [live for live in list(self._live.values()) if live.thread_id == thread_id]
        for live in lives:
            self._interrupt(live, Reply.cancel, wait=0)

    def page(self, thread_id: str, limit: int, before: str | None = None) -> tuple[list[Json], bool, Place] | None:
        """Gives a page of entries, whether there are older ones, and the place in the log as of which
        the page is exact; ``None`` when ``before`` is no message of the thread."""
        for _ in range(10):
            with self._log.lock(thread_id):
                found = self._store.page(thread_id, limit, before)
                if found is None:
                    return None
                stored, more = found
                try:
                    return [one.entry for one in stored], more, self._catch_up(thread_id, stored)
                except Lost:
                    pass
            # A run that is just ending needs the thread's lock for that.
            time.sleep(0.005)
            # The log was trimmed past what the store has: store what is now, and look again.
            self.flush(thread_id)
        raise RequestError(503, "store_unavailable", "The thread cannot be read now. Try again.", retry_after=1)

    def _catch_up(self, thread_id: str, stored: Sequence[tuple[Json, str | None]]) -> Place:
        """Adds to the entries that still grow what the log has after each was stored."""
        end = self._log.end(thread_id)
        grow: dict[str, tuple[Json, int]] = {}
        for entry, text in stored:
            place = Place.parse(text)
            if entry["run"] is not None and entry["run"]["status"] not in TERMINAL:
                if place is not None and place.epoch == end.epoch:
                    grow[entry["run"]["id"]] = entry, place.offset
                elif entry["run"]["id"] in self._live:
                    # Stored as of a log that is gone.
                    raise Lost
                if entry["run"]["id"] not in self._live:
                    # It has no event in this log; the sweep looks after it.
                    self._foreign[entry["run"]["id"]] = thread_id, entry["message"]["id"]
        if not grow:
            return end
        place = Place(end.epoch, min(known for _, known in grow.values()))
        for record in self._log.since(thread_id, place):
            place = record.place
            if record.key in grow:
                entry, known = grow[record.key]
                if record.place.offset > known:
                    events.apply(entry, record.name, record.data())
        return place

    # The queue: groups of a thread one after another, the runs of a group at once

    def _enqueue(self, thread_id: str, lives: list[_Live], mode: str) -> None:
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
            # Under the thread's lock, so that a group taken over from another worker keeps its turn.
            with self._log.lock(thread_id):
                with self._guard:
                    if not self._queues[thread_id] or self._stopping.is_set():
                        del self._queues[thread_id]
                        return
                busy = self._busy_elsewhere(thread_id)
                with self._guard:
                    group = [] if busy else self._queues[thread_id].pop(0)
            for live in group:
                _spawn(self._perform, live)
            for live in group:
                live.ended.wait()
            if busy:
                self._stopping.wait(0.25)

    def _busy_elsewhere(self, thread_id: str) -> bool:
        """Whether another worker, one that this one replaces, still works on the thread."""
        try:
            return self._store.busy_elsewhere(thread_id, self._worker)
        except SQLAlchemyError:
            _log.exception("the store failed")
            return True

    # One run

    def _perform(self, live: _Live) -> None:
        try:
            self._pump(live)
        except Interrupted:
            self._end(live, live.stop)
        except RunError as error:
            self._end(live, lambda reply, error=error: reply.fail(error))  # type: ignore[misc]
        except Exception:
            _log.exception("run %s failed", live.id)
            self._end(live, lambda reply: reply.fail(RunError("server_error")))
        finally:
            live.close()

    def _pump(self, live: _Live) -> None:
        if live.ended.is_set() or not self._begin(live):
            return
        assert live.asked is not None
        assistant, client, names = live.asked
        turns = self._turns(live, names)
        stall = self._settings.stall_seconds
        live.deadline = time.monotonic() + self._settings.run_seconds

        def ask() -> upstream.Upstream:
            try:
                ours = client()
            except openai.OpenAIError as error:
                _log.error("no client could be made: %s", error)
                raise RunError("upstream_unauthorized") from error
            return upstream.open(ours, assistant, turns, stall)

        live.upstream = live.waits.wait(ask)
        batches = iter(live.upstream)
        nothing: list[Part] = []
        # After the end this reads on, so that the connection can serve the next run.
        while (parts := live.waits.wait(lambda: next(batches, nothing))) is not nothing:
            self._publish(live, parts)
            if isinstance(parts[-1], End):
                end = parts[-1]
                self._end(live, lambda reply, end=end: reply.finish(end))  # type: ignore[misc]

    def _begin(self, live: _Live) -> bool:
        with self._log.lock(live.thread_id), live.saving, live.lock:
            if live.reply.over:
                return False
            if self._stopping.is_set():
                # Left to the next worker, as it is queued.
                self._forget(live)
                return False
            told = live.reply.begin()
            if not self._store.save(self._worker, *live.reply.snapshot(), live.place):
                self._forget(live)
                return False
            live.place = str(self._log.append(live.thread_id, told))
            return True

    def _turns(self, live: _Live, names: dict[str, str]) -> list[Turn]:
        turns: list[Turn] = []
        for message in self._store.history(live.reply.message["id"]):
            text = "".join(
                part["refusal"] if part["type"] == "refusal" else part["text"]["value"] for part in message["content"]
            )
            speaker = message["assistant_id"]
            if not text:
                continue
            if speaker is None or speaker == live.reply.run["assistant_id"]:
                turns.append(Turn(message["role"], text))
            else:
                # A model takes every assistant's turn for its own words, and some servers continue the last one.
                turns.append(Turn("user", f"[{names.get(speaker, speaker)}]\n{text}"))
        # An assistant may speak first, but servers refuse an empty history.
        return turns or [Turn("user", "Begin.")]

    def _publish(self, live: _Live, parts: list[Part]) -> None:
        with live.lock:
            if live.reply.over:
                raise Interrupted
            told = live.reply.add(parts)
            if told:
                live.place = str(self._log.append(live.thread_id, told))
                live.dirty = True

    def _end(self, live: _Live, finish: Callable[[Reply], list[Event]]) -> None:
        """Ends the run once: the store has its final state before viewers hear of it."""
        with live.lock:
            if live.reply.over:
                return
            told = finish(live.reply)
            final = live.reply.snapshot()
        while True:
            try:
                with self._log.lock(live.thread_id):
                    if self._store.save(self._worker, *final, live.place):
                        self._log.append(live.thread_id, told)
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

    def _forget(self, live: _Live) -> None:
        with self._guard:
            self._live.pop(live.id, None)
        live.ended.set()

    def _interrupt(self, live: _Live, stop: Callable[[Reply], list[Event]], wait: float = 0.5) -> None:
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
        for live in list(self._live.values()):
            if thread_id in (None, live.thread_id):
                with live.saving:
                    with live.lock:
                        if live.reply.over or not (live.dirty or thread_id):
                            continue
                        live.dirty = False
                        # Nothing of this run is appended meanwhile, so what it is now is exact there.
                        live.place = str(self._log.end(live.thread_id))
                        state = live.reply.snapshot()
                    try:
                        kept = self._store.save(self._worker, *state, live.place)
                    except SQLAlchemyError:
                        live.dirty = True
                        raise
                if not kept:
                    # The thread is gone, or another worker took the run for lost.
                    self._interrupt(live, Reply.cancel, wait=0)

    def renew(self) -> None:
        """Keeps this worker's runs its own, ends those that took too long, and cancels those that
        another worker was asked to cancel."""
        lives = dict(self._live)
        if not lives:
            return
        queued = not self._stopping.is_set()
        for run_id in self._store.renew(self._worker, time.time() + LEASE_SECONDS, queued):
            if run_id in lives:
                self._interrupt(lives[run_id], Reply.cancel, wait=0)
        for live in lives.values():
            if time.monotonic() > live.deadline:
                self._interrupt(live, lambda reply: reply.fail(RunError("run_time_limit")), wait=0)

    def sweep(self) -> None:
        """Takes over what a lost worker left, and tells this worker's viewers how others' runs ended."""
        seen = dict(self._foreign)
        found = {held.run["id"]: held for held in self._store.held(runs.c.worker != self._worker)}
        for run_id, (thread_id, message_id) in seen.items():
            if run_id not in found:
                if run_id not in self._live:
                    self._tell(thread_id, message_id)
                self._foreign.pop(run_id, None)
        for run_id, held in found.items():
            self._foreign[run_id] = held.run["thread_id"], held.message["id"]
        expired = [held for held in found.values() if held.lease < time.time()]
        for group in _groups(expired):
            self._take_over(group)

    def _tell(self, thread_id: str, message_id: str) -> None:
        with self._log.lock(thread_id):
            entry = self._store.entry(message_id)
            if entry is not None and entry["run"]["status"] in TERMINAL:
                told = [events.step_completed(step) for step in entry["steps"]]
                told += [events.message_ended(entry["message"]), events.run_status(entry["run"])]
                self._log.append(thread_id, told)

    def _take_over(self, group: Sequence[Held]) -> None:
        waiting: list[_Live] = []
        thread_id = group[0].run["thread_id"]
        with self._log.lock(thread_id):
            for held in group:
                if not self._store.claim(held.run["id"], self._worker, time.time() + LEASE_SECONDS):
                    continue
                self._foreign.pop(held.run["id"], None)
                queued = held.run["status"] == "queued"
                asked = self._adopt(held.scope, held.run["assistant_id"]) if queued else None
                live = _Live(Reply(held.run, held.message, held.steps), asked, held.position, None)
                if asked is None:
                    self._end(live, lambda reply: reply.fail(RunError("worker_lost")))
                else:
                    waiting.append(live)
            self._enqueue(thread_id, waiting, group[0].mode)

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
        under_way = [live for live in list(self._live.values()) if live.reply.run["status"] != "queued"]
        if under_way and drain:
            _log.warning("shutting down: waiting up to %g s for the runs under way (%d)", drain, len(under_way))
        for live in under_way:
            live.ended.wait(max(0.0, until - time.monotonic()))
        for live in under_way:
            if not live.ended.is_set():
                self._interrupt(live, Reply.cut_off)


def _groups(held: Sequence[Held]) -> Iterator[list[Held]]:
    """Gives the runs of each POST together, in the order of the threads."""
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(one.group_id, []).append(one)
    yield from groups.values()


def _spawn(target: Callable[..., None], *args: object) -> None:
    """Starts a daemon thread: a greenlet once gevent has patched ``threading``."""
    threading.Thread(target=target, args=args, daemon=True, name="assistream").start()
