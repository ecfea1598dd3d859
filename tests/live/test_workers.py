"""Two workers on one Redis and one database, at random: also where Redis or one of the two is gone.

The trials, and what must be true after each, are those of test_snapshots.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from assistream_flask.assistants import Assistant
from assistream_flask.errors import RequestError, RunError
from assistream_flask.events import TERMINAL, Event, Json
from assistream_flask.log import redis as redis_log
from assistream_flask.log.protocol import AppendRequest, EventId, Log, LogUnavailableError
from assistream_flask.log.redis import RedisLog
from assistream_flask.runs import delta_publisher, run_queue
from assistream_flask.runs import runner as runners
from assistream_flask.runs.runner import Runner
from assistream_flask.runs.thread_history import RunRequest
from assistream_flask.settings import Settings
from assistream_flask.store.leases import LEASE_SECONDS
from assistream_flask.store.sql import Owner, ThreadStore
from assistream_flask.store.tables import runs
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.delivered import Delivered, Shown
from assistream_flask.upstream.deltas import Annotation, Begun, Delta, End, Failed, Reasoning, Refusal, Text
from assistream_flask.upstream.items import Turn
from tests.conftest import text
from tests.redis_server import RedisServer
from tests.unit.test_snapshots import STEPS, House, Member, Script, Seat, Tape, Viewer, random_script, trial, until

TRIALS = int(os.environ.get("ASSISTREAM_TRIALS", "12"))


class Dead(BaseException):
    """Ends the threads of a worker that died, when its test is over."""


class Life:
    """That of a worker: when it ends, each of its calls to store and log hangs, before or after what it does; so does
    each while it is not ``going``."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._inside = 0
        self.over, self._buried = threading.Event(), threading.Event()
        self.going = threading.Event()
        self.going.set()

    def call(self, what: Callable[..., Any], *given: Any, **named: Any) -> Any:
        self.going.wait()
        with self._guard:
            self._inside += not self.over.is_set()
            alive = not self.over.is_set()
        if alive:
            try:
                found = what(*given, **named)
            finally:
                with self._guard:
                    self._inside -= 1
            self.going.wait()
            if not self.over.is_set():
                return found
        self._buried.wait()
        raise Dead

    def end(self) -> None:
        with self._guard:
            self.over.set()
        until(lambda: not self._inside)

    def bury(self) -> None:
        self.over.set()
        self._buried.set()


class Mortal:
    """A store or a log that only the living can use."""

    def __init__(self, whole: object, life: Life) -> None:
        self._whole, self._life = whole, life

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._whole, name)
        return (lambda *given, **named: self._life.call(found, *given, **named)) if callable(found) else found


class RedisTape(Tape):
    def later(self, known: EventId, event_id: EventId) -> bool:
        return (int(known.epoch), known.offset) > (int(event_id.epoch), event_id.offset)


class TapedRedisLog(RedisLog):
    def __init__(self, tape: Tape, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self._tape = tape

    def append_all(self, told: Sequence[AppendRequest]) -> list[EventId | None]:
        return [self._tape.append(self._append_one, *one) for one in told]

    def _append_one(self, *told: Any) -> EventId | None:
        return super().append_all([AppendRequest(*told)])[0]

    def forget(self, thread_id: str, last: Event) -> None:
        self._tape.append(self._forget_one, thread_id, [last])

    def _forget_one(self, thread_id: str, events: Sequence[Event]) -> EventId:
        super().forget(thread_id, events[0])
        return self.end(thread_id)


class Worker(NamedTuple):
    name: str
    member: Member
    life: Life
    keeper: threading.Thread


class Houses(House):
    """Workers with a store and a log each, on one database and one Redis; each request meets any of them."""

    steps = (*STEPS, "post", "post", "post")
    flushes = 1.0
    """How often a housekeeper that could store text does."""

    def __init__(self, database_url: str, redis_url: str, *, workers: int = 2, max_events: int = 20) -> None:
        self.choose = random.Random(0)
        self.tape = RedisTape()
        self.failures: list[BaseException] = []
        self._asked: dict[str, RunRequest] = {}
        self._stores = [ThreadStore(database_url) for _ in range(workers + 1)]
        self.workers = [
            self._worker(f"w{at}", store, TapedRedisLog(self.tape, redis_url, max_events=max_events))
            for at, store in enumerate(self._stores[1:])
        ]
        self.open(self._stores[0], [one.member for one in self.workers])
        for one in self.workers:
            one.keeper.start()

    def _worker(self, name: str, store: ThreadStore, log: RedisLog) -> Worker:
        life = Life()
        ours = cast(Log, Mortal(log, life))
        # An assistant is for one run here, so its id says what another worker asks it with.
        adopt: Callable[[Owner, str], RunRequest | None] = lambda owner, assistant_id: self._asked[assistant_id]  # noqa: E731
        mortal = cast(ThreadStore, Mortal(store, life))
        runner = Runner(mortal, ours, Settings(), name, adopt)
        log.listen(runner.attend)
        renew: Callable[[], None] = lambda: mortal.renew(name, runner.held(), LEASE_SECONDS)  # noqa: E731
        keeper = threading.Thread(target=self._keep_house, args=(Member(runner, ours), life, renew))
        return Worker(name, Member(runner, ours), life, keeper)

    def _keep_house(self, member: Member, life: Life, renew: Callable[[], None]) -> None:
        runner, log = member
        jobs = (renew, runner.flush, runner.heed, runner.sweep, runner.rebuild, log.tend)
        with contextlib.suppress(Dead):
            while not life.over.wait(0.05):
                for job in jobs:
                    if job == runner.flush and random.random() >= self.flushes:
                        continue
                    try:
                        with self.trouble():
                            job()
                    except Exception as error:
                        self.failures.append(error)

    def asked(self, at: int, script: Script) -> RunRequest:
        name = f"a{len(self._asked)}"
        assistant = Assistant(name, model="m", background=isinstance(script, Response))
        self._asked[name] = RunRequest(assistant, cast(Any, lambda: script), {})
        return self._asked[name]

    def pick(self) -> Member:
        return self.choose.choice(self.members)

    def trim(self, thread_id: str, choose: random.Random) -> None:
        if choose.random() < 0.3:
            self.pick().log.restart(thread_id)

    def kill(self, worker: Worker) -> None:
        """Have it be gone in the midst of whatever it does."""
        worker.life.end()
        self.members.remove(worker.member)

    def end_leases(self, worker: Worker) -> None:
        with self.store.write() as connection:
            connection.execute(runs.update().where(runs.c.worker == worker.name).values(lease=0))

    def close(self) -> None:
        self.heal()
        for script in self.scripts:
            script.close()
        until(lambda: not any(one.runner.active.all() for one in self.members), 30)
        for worker in self.workers:
            worker.life.over.set()
            worker.life.bury()
            worker.keeper.join(10)
            worker.member.log._whole.close()  # type: ignore[attr-defined]
        for store in self._stores:
            store.close()
        assert self.failures == []


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(
        client: Script, assistant: Assistant, turns: list[Turn], stall: float, *more: object, **named: object
    ) -> Any:
        client.turns = turns
        client.opened.set()
        return client.connect(None) if isinstance(client, Response) else client

    def resume(
        client: Response,
        assistant: Assistant,
        state: Json,
        stall: float,
        *,
        names: Sequence[str],
        shown: Shown,
        most: float,
    ) -> Any:
        return client.connect(state, Delivered(state, shown))

    def spawn(name: str, target: Callable[..., None], *given: object) -> None:
        def work() -> None:
            with contextlib.suppress(Dead):
                target(*given)

        threading.Thread(target=work, name=name, daemon=True).start()

    monkeypatch.setattr(answer_stream, "open", ask)
    monkeypatch.setattr(answer_stream, "resume", resume)
    monkeypatch.setattr(answer_stream, "cancel", lambda client, state: client.cancelled.set())
    for module in (run_queue, runners):
        monkeypatch.setattr(module, "spawn", spawn)


def seeded(houses: Houses, name: str) -> random.Random:
    houses.choose = random.Random(f"{name}, worker")
    return random.Random(name)


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_the_workers_do_every_viewer_ends_with_the_whole(
    redis_server: RedisServer, database_url: str, workers: int
) -> None:
    with contextlib.closing(Houses(database_url, redis_server.empty_url(), workers=workers)) as houses:
        did = sum(trial(houses, seeded(houses, f"{workers}/{number}")) for number in range(TRIALS))
    assert did >= 10 * TRIALS


def test_whatever_they_do_at_a_pace_every_viewer_ends_with_the_whole(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    with contextlib.closing(Houses(database_url, redis_server.empty_url())) as houses:
        did = sum(trial(houses, seeded(houses, f"pace/{number}")) for number in range(TRIALS))
    assert did >= 10 * TRIALS


# Without the log


class Storm(Houses):
    """Redis forgets everything, falls silent, or is started anew, at any moment."""

    exact = False

    def __init__(self, database_url: str, server: RedisServer) -> None:
        self._server = server
        self._calm: threading.Thread | None = None
        super().__init__(database_url, server.empty_url())

    def trim(self, thread_id: str, choose: random.Random) -> None:
        self.heal()
        kind = choose.choice(["flush", "flush", "silent", "stop"])
        pauses = [choose.random() * 0.03 for _ in range(1 if kind != "flush" else 10)]
        self._calm = threading.Thread(target=self._strike, args=(kind, pauses, choose.choice([0.05, 0.3, 2.5])))
        self._calm.start()

    def _strike(self, kind: str, pauses: list[float], seconds: float) -> None:
        for pause in pauses:
            time.sleep(pause)
            match kind:
                case "flush":
                    self._server.ask("FLUSHALL")
                case "silent":
                    self._server.signal(signal.SIGSTOP)
                    time.sleep(seconds)
                    self._server.signal(signal.SIGCONT)
                case "stop":
                    self._server.stop()
                    time.sleep(seconds)
                    self._server.start()

    @contextlib.contextmanager
    def trouble(self) -> Iterator[None]:
        try:
            yield
        except (LogUnavailableError, RequestError) as error:
            assert not isinstance(error, RequestError) or error.status == 503  # noqa: PT017

    def settle(self, thread_id: str) -> None:
        until(lambda: not self.live(thread_id), 30)

    def heal(self) -> None:
        if self._calm is not None:
            self._calm.join()
            self._calm = None
            until(lambda: all(self._well(member.log) for member in self.members), 30)

    def _well(self, log: Log) -> bool:
        with self.trouble():
            return log.end_unless_locked("thread") is not None
        return False


def test_whatever_becomes_of_redis_every_viewer_ends_with_what_is_stored(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    # A lock whose holder could not let go of it is waited for.
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 1.0)
    try:
        with contextlib.closing(Storm(database_url, server)) as storm:
            for number in range(max(2, TRIALS // 20)):
                trial(storm, seeded(storm, f"storm/{number}"))
    finally:
        server.stop()


@pytest.mark.parametrize("loss", ["flushed", "expired"])
def test_what_is_told_after_the_lock_was_lost_is_a_snapshot(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.3)
    with contextlib.closing(Houses(f"sqlite:///{tmp_path / 'a.sqlite3'}", redis_server.empty_url())) as houses:
        houses.exact = False
        slow, other = houses.members
        thread_id = houses.thread()
        seat = Seat(houses, thread_id)
        add = houses._stores[1].add

        def held_up(*given: Any, **named: Any) -> Any:
            position = add(*given, **named)
            if loss == "flushed":
                redis_server.ask("FLUSHALL")
            houses.members[:] = [other]
            houses.post(thread_id, text="second")
            seat.read()
            return position

        monkeypatch.setattr(houses._stores[1], "add", held_up)
        houses.members[:] = [slow]
        houses.post(thread_id, text="first")
        whole = houses.attach(thread_id)[0]
        assert [text(entry) for entry in whole] == ["first", "second"]
        until(lambda: seat.caught_up() and len(seat.viewer.entries) >= 2)
        seat.cut()
        assert seat.viewer.entries == whole
        houses.members[:] = [slow, other]


# Without a worker


Said = dict[tuple[str, int], Any]
"""The text and the annotations of each content part, and the reasoning."""


class Response(Script):
    """A background response: it goes on when nobody reads it, and anybody may read it from any batch on."""

    def __init__(self, batches: Sequence[list[Delta]], breaks: frozenset[int]) -> None:
        super().__init__([[Begun()], *batches])
        self.breaks = set(breaks)
        self.cancelled = threading.Event()
        self.told = 0
        self.changed = threading.Condition()

    def go(self, count: int = 1) -> None:
        with self.changed:
            self.told += count
            self.changed.notify_all()

    def connect(self, state: Json | None, delivered: Delivered | None = None) -> Connection:
        return Connection(self, state, delivered)

    def said(self) -> Said:
        found: Said = {}
        for part in (part for batch in self._batches for part in cast("list[Delta]", batch)):
            if isinstance(part, Annotation):
                found.setdefault(("notes", part.at), []).append(part.value)
            elif isinstance(part, Text | Refusal):
                found["text", part.at] = found.get(("text", part.at), "") + part.value
            elif isinstance(part, Reasoning):
                found["reasoning", 0] = found.get(("reasoning", 0), "") + part.value
        return found


class Connection:
    """One reader of a response."""

    source = None

    def __init__(self, response: Response, state: Json | None, delivered: Delivered | None = None) -> None:
        self._response, self._state, self._delivered = response, state, delivered
        self._closed = False

    def __iter__(self) -> Iterator[list[Delta]]:
        response, at = self._response, self._state["sequence"] + 1 if self._state else 0
        slots = {
            kind + str(at): [kind, key, at, *more] for kind, key, at, *more in (self._state or {"slots": []})["slots"]
        }
        for number, batch in enumerate(response._batches[at:], at):
            with response.changed:
                response.changed.wait_for(lambda number=number: self._closed or response.told > number)  # type: ignore[misc]
            if response.closed.is_set():
                raise RunError("worker_lost")
            if self._closed or number in response.breaks:
                response.breaks.discard(number)
                raise RunError("upstream_cut")
            parts = cast("list[Delta]", batch)
            for part in parts:
                kind = "reasoning" if isinstance(part, Reasoning) else "part"
                where = None if isinstance(part, Reasoning | Begun | End | Failed) else part.at
                slot = slots.setdefault(f"{kind}{where}", [kind, None, where, 0, 0, 0])
                if isinstance(part, Annotation):
                    slot[4] += 1
                elif isinstance(part, Text | Refusal | Reasoning):
                    slot[3] += len(part.value)
            told = [list(slot) for slot in slots.values() if slot[0] == "reasoning" or slot[2] is not None]
            self._state = {"response_id": "r", "sequence": number, "slots": told}
            if new := self._delivered.rest(parts) if self._delivered else parts:
                yield new

    def state(self) -> Json | None:
        return self._state

    def close(self) -> None:
        with self._response.changed:
            self._closed = True
            self._response.changed.notify_all()


def random_response(choose: random.Random) -> Response:
    batches = [batch for batch in random_script(choose)._batches if not isinstance(batch, RunError)]
    if not batches or not isinstance(batches[-1][-1], End):
        batches.append([End(None, None)])
    breaks = frozenset(at for at in range(1, len(batches)) if choose.random() < 0.03)
    return Response(batches, breaks)


def said(entry: Json) -> Said:
    """Give what :meth:`Response.said` gives, of an entry."""
    found: Said = {}
    for at, part in enumerate(entry["message"]["content"]):
        found["text", at] = part.get("refusal") or part["text"]["value"]
        found["notes", at] = part["text"]["annotations"] if part["type"] == "text" else []
    found["reasoning", 0] = "".join(step["step_details"]["reasoning"]["text"] for step in entry["steps"])
    return {what: value for what, value in found.items() if value}


class Death:
    """One worker of two, with runs of both under way, and how it dies."""

    def __init__(self, houses: Houses, choose: random.Random) -> None:
        self.houses, self.choose = houses, choose
        self.thread_id = houses.thread()
        self.seats: list[Seat] = []
        self.cancelled: set[str] = set()
        self._scripts: list[Script] = []
        self._run_ids: list[str] = []

    def step(self) -> None:
        """Do one random thing, or nothing where what was chosen can't be done now."""
        choose = self.choose
        match choose.choice(["post", "post", "go", "go", "go", "go", "flush", "sit", "read", "cut", "cancel"]):
            case "post" if len(self._scripts) < 8:
                self._post()
            case "go" if self._scripts:
                choose.choice(self._scripts[-4:]).go(choose.randrange(1, 4))
                if choose.random() < 0.7:
                    time.sleep(0.003)
            case "cancel" if self._scripts and choose.random() < 0.3:
                run_id = choose.choice(self._run_ids)
                self.cancelled.add(run_id)
                self.houses.pick().runner.cancel(self.thread_id, run_id)
            case "flush":
                self.houses.pick().runner.flush()
            case step:
                self._view(step)

    def _post(self) -> None:
        choose = self.choose
        new = [choose.choice([random_script, random_response])(choose) for _ in range(choose.choice([1, 2, 3]))]
        self._run_ids = self.houses.post(self.thread_id, new, mode=choose.choice(["parallel", "sequential"]))
        self._scripts += new

    def _view(self, step: str) -> None:
        match step:
            case "sit" if len(self.seats) < 3:
                self.seats.append(Seat(self.houses, self.thread_id))
            case "read" if self.seats:
                self.choose.choice(self.seats).read()
            case "cut" if self.seats:
                self.choose.choice(self.seats).cut()

    def kill(self) -> Worker:
        """End one of the two, in the midst of what it does."""
        for script in self._scripts:
            # What nobody stores any more.
            script.go()
        time.sleep(0.005)
        dead = self.choose.choice(self.houses.workers)
        self.houses.kill(dead)
        return dead

    def settled(self, dead: Worker) -> bool:
        """Have the models go on, and the dead one's leases end; give whether all runs are over."""
        self.houses.end_leases(dead)
        for script in self._scripts:
            script.go(100)
        time.sleep(0.01)
        return all(not entry["run"] or entry["run"]["status"] in TERMINAL for entry in self.entries())

    def entries(self) -> list[Any]:
        """Give what is stored."""
        found = self.houses.store.page(self.thread_id, 200)
        assert found is not None
        return [stored.entry for stored in found[0]]


def death(houses: Houses, choose: random.Random) -> None:
    """One worker of two dies while runs of both are under way."""
    death = Death(houses, choose)
    thread_id, seats = death.thread_id, death.seats
    for _ in range(choose.randrange(5, 25)):
        death.step()
    dead = death.kill()
    before = {one["message"]["id"]: one for one in Viewer().see(houses.tape.until(thread_id)).entries}
    epoch = houses.pick().log.end(thread_id).epoch
    for seat in seats:
        seat.cut()
    until(lambda: death.settled(dead), 30)
    houses.settle(thread_id)
    whole = death.entries()
    houses.check(thread_id, whole)
    same_epoch = houses.pick().log.end(thread_id).epoch == epoch
    for entry in (entry for entry in whole if entry["run"]):
        script, told = houses.groups[entry["run"]["id"]][1], before.get(entry["message"]["id"])
        if isinstance(script, Response):
            _goes_on(entry, script, is_cancelled=entry["run"]["id"] in death.cancelled)
        elif _code(entry) == "worker_lost" and same_epoch:
            assert told is not None
            assert said(entry) == said(told)
    for seat in seats:
        until(lambda seat=seat: seat.caught_up() and seat.viewer.entries == whole)  # type: ignore[misc]
        seat.cut()


def _code(entry: Json) -> str | None:
    error = entry["run"]["last_error"]
    return None if error is None else str(error["code"])


def _goes_on(entry: Json, response: Response, *, is_cancelled: bool) -> None:
    """Check that a background response was not lost, and that all of it is in the entry unless it was cancelled."""
    assert _code(entry) != "worker_lost"
    assert entry["run"]["status"] in ("completed", "incomplete") or is_cancelled or _code(entry) == "empty_answer"
    if entry["run"]["status"] != "cancelled":
        assert said(entry) == response.said()


class Mourning(Houses):
    # What a worker stored and told nobody is left to the next snapshot.
    exact = False
    flushes = 0.02


def test_what_a_dead_worker_left_the_other_ends_runs_or_goes_on_with(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 1.0)
    for number in range(max(4, TRIALS // 6)):
        with contextlib.closing(Mourning(database_url, redis_server.empty_url(), max_events=10_000)) as houses:
            death(houses, seeded(houses, f"death/{number}"))


# With a worker that stands still


WORDS = "".join(f"w{number} " for number in range(100))


class Words(Script):
    """An answer whose words count up."""

    def __init__(self, count: int) -> None:
        super().__init__([*words(count), [End(None, None)]])
        self.asked = 0

    def __iter__(self) -> Iterator[list[Delta]]:
        self.asked += 1
        return super().__iter__()


def words(count: int) -> list[list[Delta]]:
    return [[Text(0, f"w{number} ")] for number in range(count)]


class Strict(Viewer):
    """A viewer that looks at every answer after every event: it only grows, by the next words, until its end."""

    def __init__(self, entries: Sequence[Json], known: dict[str, tuple[str, bool]]) -> None:
        super().__init__(entries)
        self._known = known
        self._look()

    def see(self, told: Sequence[Event]) -> Viewer:
        super().see(told)
        self._look()
        return self

    def _look(self) -> None:
        for entry in self.entries:
            if not entry["message"]["run_id"]:
                continue
            now, (before, over) = text(entry), self._known.get(entry["message"]["id"], ("", False))
            assert WORDS.startswith(now), f"{now!r} after {before!r}"
            assert now.startswith(before), f"{now!r} after {before!r}"
            assert not over or now == before, f"{now!r} after its end, {before!r}"
            over = over or (entry["run"] or {"status": ""})["status"] in TERMINAL
            self._known[entry["message"]["id"]] = now, over


class StrictSeat(Seat):
    def __init__(self, house: House, thread_id: str) -> None:
        super().__init__(house, thread_id)
        self._known: dict[str, tuple[str, bool]] = {}

    def read(self) -> None:
        super().read()
        if not isinstance(self.viewer, Strict):
            self.viewer = Strict(self.viewer.entries, self._known)


class Paused(Houses):
    """Workers stand still now and then, and the others may take their runs over."""

    exact = False

    def lapse(self, worker: Worker) -> bool:
        """End the leases of the worker's runs; give whether there are any."""
        with self.store.write() as connection:
            mine = runs.c.worker == worker.name, runs.c.status.not_in(TERMINAL)
            return bool(connection.execute(runs.update().where(*mine).values(lease=5.0)).rowcount)


def pause(houses: Paused, choose: random.Random, *, late: bool) -> int:
    """Have the first worker stand still for longer than a lease. It comes back ``late``, when its runs are the other's,
    which may do the same then; or between the other's look at them and its claims. Give how many runs it had."""
    first, second = (worker.member for worker in houses.workers)
    houses.members[:] = [first]
    seats, scripts = list[StrictSeat](), list[Words | Response]()
    for _ in range(10):
        count = choose.randrange(1, 40)
        lasting = Response([*words(count), [End(None, None)]], frozenset())
        scripts.append(lasting if choose.random() < 0.3 else Words(count))
        thread_id = houses.thread()
        # Of some, the first word comes before they are looked at.
        if spoken := choose.choice([0, 1, 9]):
            scripts[-1].go(spoken)
        houses.post(thread_id, [scripts[-1]])
        seats.append(StrictSeat(houses, thread_id))
        time.sleep(choose.random() * 0.01)
    houses.members[:] = [second]
    stop = threading.Event()

    def speak() -> None:
        while not stop.wait(0.0005):
            choose.choice(scripts).go()

    jobs = [threading.Thread(target=speak), threading.Thread(target=_look_on, args=(houses, seats, stop))]
    for job in jobs:
        job.start()
    try:
        for at in choose.choice([[0], [0, 1], [0, 1, 0]]) if late else [0]:
            time.sleep(choose.random() * 0.02)
            _stand_still(houses, houses.workers[at], choose, late=late)
    finally:
        for script in scripts:
            script.go(100)
        houses.members[:] = [first, second]
        # A run that one worker left and the other did not take yet is nobody's for a moment.
        until(lambda: all(is_over(houses, seat) for seat in seats), 30)
        stop.set()
        for job in jobs:
            job.join()
    for seat, script in zip(seats, scripts, strict=True):
        _check(houses, seat, script)
    return len(scripts)


def _stand_still(houses: Paused, worker: Worker, choose: random.Random, *, late: bool) -> None:
    worker.life.going.clear()
    try:
        if late:
            until(lambda: not houses.lapse(worker), 30)
        else:
            houses.lapse(worker)
        time.sleep(choose.random() * 0.04)
    finally:
        worker.life.going.set()


def _look_on(houses: Paused, seats: Sequence[StrictSeat], stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            for seat in seats:
                seat.read()
    except BaseException as error:
        houses.failures.append(error)


def stored(houses: Paused, seat: StrictSeat) -> list[Any]:
    found = houses.store.page(seat._thread_id, 200)
    assert found is not None
    return [one.entry for one in found[0]]


def is_over(houses: Paused, seat: StrictSeat) -> bool:
    return all(not entry["run"] or entry["run"]["status"] in TERMINAL for entry in stored(houses, seat))


def _check(houses: Paused, seat: StrictSeat, script: Words | Response) -> None:
    whole = stored(houses, seat)
    run, said = whole[1]["run"], text(whole[1])
    assert WORDS.startswith(said)
    if isinstance(script, Words):
        assert script.asked <= 1
    if run["status"] != "completed":
        assert isinstance(script, Words)
        assert run["last_error"]["code"] == "worker_lost"
    else:
        assert said == "".join(part.value for [part, *_] in script._batches if isinstance(part, Text))  # type: ignore[misc]
    until(lambda: seat.caught_up() and seat.viewer.entries == whole)
    seat.cut()


PAUSES = max(100, TRIALS)
"""How many answers there are in each of these, on each database."""


def test_what_a_worker_tells_and_stores_after_another_took_its_runs_over_reaches_nobody(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.5)
    did = 0
    with contextlib.closing(Paused(database_url, redis_server.empty_url(), max_events=10_000)) as houses:
        while did < PAUSES:
            did += pause(houses, seeded(houses, f"late/{did}"), late=True)


def test_a_run_whose_holder_comes_back_before_it_is_claimed_is_asked_once_and_told_once(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.5)
    did, choose = 0, random.Random("gap")
    with contextlib.closing(Paused(database_url, redis_server.empty_url(), max_events=10_000)) as houses:
        claim = houses._stores[2].claim

        def claimed_later(*given: Any) -> Any:
            time.sleep(choose.random() * 0.02)
            return claim(*given)

        monkeypatch.setattr(houses._stores[2], "claim", claimed_later)
        while did < PAUSES:
            did += pause(houses, seeded(houses, f"gap/{did}"), late=False)


class Idle(Paused):
    """Workers whose upkeep is done by hand."""

    def _keep_house(self, *_: object) -> None:
        """Nothing by itself."""

    def close(self) -> None:
        for script in self.scripts:
            script.go(100)
        super().close()


def begun(houses: Idle) -> str:
    """Give a thread with an answer of the first worker: two words, which the log has and the store has not."""
    houses.members[:] = [houses.workers[0].member]
    lasting = Response([*words(9), [End(None, None)]], frozenset())
    lasting.go()
    thread_id = houses.thread()
    houses.post(thread_id, [lasting])
    until(lambda: houses.store.held()[0].upstream is not None)
    lasting.go(2)
    until(lambda: text(houses.attach(thread_id)[0][1]) == "w0 w1 ")
    found = houses.store.page(thread_id, 2)
    assert found is not None
    assert text(found[0][1].entry) == ""
    # Who takes it over is not told them again.
    lasting.told = 0
    return thread_id


def test_what_was_read_of_the_log_is_stored_before_the_log_begins_anew(
    redis_server: RedisServer, database_url: str
) -> None:
    with contextlib.closing(Idle(database_url, redis_server.empty_url(), workers=3)) as houses:
        thread_id = begun(houses)
        first, second, third = houses.workers
        houses.kill(first)
        houses.lapse(first)
        second.member.runner.sweep()
        next(second.member.runner._worker.appender.rebuild())
        # Before it has stored its runs as of the new log.
        houses.members.append(second.member)
        houses.kill(second)
        houses.lapse(second)
        third.member.runner.sweep()
        houses.members[:] = [third.member]
        assert text(houses.attach(thread_id)[0][1]) == "w0 w1 "


def test_what_could_not_be_told_is_missing_for_nobody_when_the_run_is_handed_over(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **named: object) -> None:
        raise LogUnavailableError

    def says(runner: Runner) -> str:
        return "".join(text({"message": live.state()[1]}) for live in runner.active.all())

    with contextlib.closing(Idle(database_url, redis_server.empty_url())) as houses:
        thread_id = begun(houses)
        first, second = (worker.member.runner for worker in houses.workers)
        houses.members[:] = [houses.workers[1].member]
        seat = StrictSeat(houses, thread_id)
        with monkeypatch.context() as context:
            for name in ("append_all", "restart"):
                context.setattr(houses.workers[0].member.log._whole, name, refuse)  # type: ignore[attr-defined]
            lasting = cast(Response, houses.scripts[-1])
            lasting.go(4)
            until(lambda: says(first) == "w0 w1 w2 ")
            seat.read()
            # Of which the log has two words: its reader wants the run stored as of that, and is to wait.
            first.flush(thread_id)
            first.shutdown.leave()
            first.shutdown.stop(0)
        second.sweep()
        lasting.go()
        until(lambda: says(second) == "w0 w1 w2 w3 ")
        seat.read()
        second.rebuild()
        until(lambda: seat.caught_up() and text(seat.viewer.entries[1]) == "w0 w1 w2 w3 ")
        seat.cut()


def test_a_response_of_a_thread_that_another_worker_deletes_is_cancelled(
    redis_server: RedisServer, database_url: str
) -> None:
    with contextlib.closing(Idle(database_url, redis_server.empty_url())) as houses:
        thread_id = begun(houses)
        first, second = (worker.member.runner for worker in houses.workers)
        second.delete(thread_id)
        until(lambda: cast(Response, houses.scripts[-1]).cancelled.is_set())
        until(lambda: not first.active.all())


def test_a_response_of_a_deleted_thread_is_cancelled_where_the_signal_is_lost(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Idle(database_url, redis_server.empty_url())) as houses:
        thread_id = begun(houses)
        first, second = (worker.member.runner for worker in houses.workers)
        monkeypatch.setattr(second._worker.log, "signal", lambda thread_id: None)
        second.delete(thread_id)
        assert not cast(Response, houses.scripts[-1]).cancelled.is_set()
        # It grows, so it is stored now and then.
        cast(Response, houses.scripts[-1]).go(1)
        until(lambda: any(active.checkpoint.is_due for active in first.active.all()))
        first.flush()
        until(lambda: cast(Response, houses.scripts[-1]).cancelled.is_set())
        until(lambda: not first.active.all())


def test_who_lost_a_run_leaves_the_log_to_who_took_it_over(
    redis_server: RedisServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Idle(database_url, redis_server.empty_url())) as houses:
        thread_id = begun(houses)
        first, second = (worker.member.runner for worker in houses.workers)
        fence = second._worker.appender.fence

        def fence_later(*given: Any) -> bool:
            first.flush()
            first.rebuild()
            return fence(*given)

        monkeypatch.setattr(second._worker.appender, "fence", fence_later)
        houses.lapse(houses.workers[0])
        second.sweep()
        houses.members[:] = [houses.workers[1].member]
        assert text(houses.attach(thread_id)[0][1]) == "w0 w1 "
