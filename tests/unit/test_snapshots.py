"""A snapshot plus the events after its place is the whole, whatever happens in between."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from assistream_flask import events
from assistream_flask.assistants import Assistant
from assistream_flask.errors import RunError
from assistream_flask.events import TERMINAL, Event, Json
from assistream_flask.log.memory import MemoryLog
from assistream_flask.log.protocol import REFUSED, Claim, EventId, Log, PositionExpiredError, Subscription
from assistream_flask.runs.runner import Runner
from assistream_flask.runs.thread_history import RunRequest
from assistream_flask.settings import Settings
from assistream_flask.store.sql import Owner, State, ThreadStore, thread_object
from assistream_flask.types import Usage
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.deltas import Annotation, Delta, End, Reasoning, Refusal, Text
from assistream_flask.upstream.items import AGAIN, GO_ON, Turn, marked

ME = Owner("blue", "me")
TRIALS = int(os.environ.get("ASSISTREAM_TRIALS", "80"))
STEPS = ("post", "go", "go", "go", "go", "flush", "trim", "sit", "look", "look", "read", "read", "cut", "cancel")
ENDS = frozenset(f"thread.run.{status}" for status in TERMINAL)


class Script:
    """A model's answer, a batch whenever the test lets one go; closing it breaks it off."""

    source = None

    def __init__(self, batches: Sequence[list[Delta] | RunError]) -> None:
        self._batches = batches
        self._go = threading.Semaphore(0)
        self.opened, self.closed = threading.Event(), threading.Event()
        self.turns: list[Turn] = []

    def go(self, count: int = 1) -> None:
        self._go.release(count)

    def __iter__(self) -> Iterator[list[Delta]]:
        for batch in self._batches:
            self._go.acquire()
            if self.closed.is_set():
                raise RunError("upstream_cut")
            if isinstance(batch, RunError):
                raise batch
            yield batch
        last = self._batches[-1] if self._batches else None
        if not (isinstance(last, list) and isinstance(last[-1], End)):
            self._go.acquire()
            raise RunError("upstream_ended_early")

    def state(self) -> None:
        """Give nothing: it is of no background response."""

    def close(self) -> None:
        self.closed.set()
        self.go()


class Tape:
    """Remembers for ever what was appended to logs, in order."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._tapes: dict[str, list[tuple[EventId, Event]]] = {}

    def append(
        self, append: Callable[..., EventId | None], thread_id: str, events: Sequence[Event], *more: Any
    ) -> EventId | None:
        with self._guard:
            event_id = append(thread_id, events, *more)
            if event_id is None or event_id is REFUSED:
                return event_id
            for at, event in enumerate(events, event_id.offset - len(events) + 1):
                self._tapes.setdefault(thread_id, []).append((EventId(event_id.epoch, at), copy.deepcopy(event)))
            return event_id

    def until(self, thread_id: str, event_id: EventId | None = None) -> list[Event]:
        """Give all events of the thread, or those up to ``event_id``, those of earlier epochs included."""
        with self._guard:
            tape = list(self._tapes.get(thread_id, ()))
        before = [at for at, (known, _) in enumerate(tape) if event_id is not None and self.later(known, event_id)]
        return [event for _, event in (tape[: before[0]] if before else tape)]

    def later(self, known: EventId, event_id: EventId) -> bool:
        return known.epoch == event_id.epoch and known > event_id


class TapedLog(MemoryLog):
    def __init__(self, tape: Tape, **options: Any) -> None:
        super().__init__(**options)
        self._tape = tape

    def _append(
        self, thread_id: str, events: Sequence[Event], claim: Claim | None = None, is_last: bool = False
    ) -> EventId | None:
        return self._tape.append(super()._append, thread_id, events, claim, is_last)


class Viewer:
    """What a page has that knows nothing but events: everything that is created is added."""

    def __init__(self, entries: Sequence[Json] = ()) -> None:
        self.entries: list[Json] = copy.deepcopy(list(entries))
        self._runs: dict[str, Json] = {}
        self.gone = False

    def see(self, told: Sequence[Event]) -> Viewer:
        for name, data in json.loads(json.dumps([one[:2] for one in told])):
            if not self.gone:
                self._see(name, data)
        return self

    def _see(self, name: str, data: Json) -> None:
        mine = [one for one in self.entries if data.get("id") in (one["message"]["id"], (one["run"] or {}).get("id"))]
        mine += [one for one in self.entries if one["run"] and data.get("run_id") == one["run"]["id"]]
        match name.removeprefix("thread."):
            case "deleted":
                self.entries, self.gone = [], True
            case "message.created":
                run = self._runs.get(data["run_id"] or "")
                entry = {"assistant_id": data["assistant_id"], "message": data, "run": run, "steps": []}
                self.entries.append(entry)
            case "message.completed" | "message.incomplete":
                mine[0]["message"] = data
            case "message.delta":
                (part,) = data["delta"]["content"]
                self._extend(mine[0]["message"]["content"], part)
            case "run.step.created":
                mine[0]["steps"].append(data)
            case "run.step.delta":
                (step,) = (step for step in mine[0]["steps"] if step["id"] == data["id"])
                more = data["delta"]["step_details"]["reasoning"]["text"]
                step["step_details"]["reasoning"]["text"] += more
            case "run.step.completed":
                at = [step["id"] for step in mine[0]["steps"]].index(data["id"])
                mine[0]["steps"][at] = data
            case _ if name.startswith("thread.run."):
                self._runs[data["id"]] = data
                if mine:
                    mine[0]["run"] = data
            case _:
                pytest.fail(f"unknown event {name}")

    def _extend(self, content: list[Json], part: Json) -> None:
        assert part["index"] <= len(content)
        if part["type"] == "refusal":
            if part["index"] == len(content):
                content.append({"type": "refusal", "refusal": ""})
            content[part["index"]]["refusal"] += part["refusal"]
        else:
            if part["index"] == len(content):
                content.append({"type": "text", "text": {"value": "", "annotations": []}})
            text = content[part["index"]]["text"]
            text["value"] += part["text"].get("value", "")
            text["annotations"] += part["text"].get("annotations", [])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Member(NamedTuple):
    """A worker, as a request meets it."""

    runner: Runner
    log: Log


class House:
    """A store, a log and a runner, with a model that says what the test wants when it wants."""

    tape: Tape
    exact = True
    """Whether the log was told all of it."""
    steps: Sequence[str] = STEPS

    def __init__(self, store: ThreadStore, *, max_events: int = 20, max_age: float = 10, worker: str = "w1") -> None:
        self.clock, self.tape = Clock(), Tape()
        self.log = TapedLog(self.tape, max_events=max_events, max_age=max_age, clock=self.clock)
        self.runner = Runner(store, self.log, Settings(), worker, lambda scope, assistant_id: None)
        self.open(store, [Member(self.runner, self.log)])

    def open(self, store: ThreadStore, members: list[Member]) -> None:
        self.store, self.members = store, members
        self.scripts: list[Script] = []
        self.groups: dict[str, tuple[object, Script]] = {}

    def pick(self) -> Member:
        """Give the worker that the next request meets."""
        return self.members[0]

    def thread(self) -> str:
        thread_id = events.new_id("thread")
        self.store.create_thread(ME, thread_object({"id": thread_id, "created_at": 1, "metadata": {}}))
        return thread_id

    def post(
        self, thread_id: str, scripts: Sequence[Script] = (), text: str | None = "hi", mode: str = "parallel"
    ) -> list[str]:
        message = None if text is None else events.message(thread_id, "user", [events.text_part(text)])
        asked = [self.asked(at, script) for at, script in enumerate(scripts)]
        self.scripts += scripts
        started = self.pick().runner.submit(ME, thread_id, message, asked, mode, lambda started: None)
        run_ids = [run["id"] for run in started.runs] if started else []
        group = object()
        for run_id, script in zip(run_ids, scripts, strict=False):
            self.groups[run_id] = group if mode == "parallel" else object(), script
        return run_ids

    def asked(self, at: int, script: Script) -> RunRequest:
        # What open() is given as the client is the script.
        return RunRequest(Assistant(f"a{at}", model="m"), cast(Any, lambda: script), {})

    def live(self, thread_id: str) -> bool:
        return any(live.thread_id == thread_id for one in self.members for live in one.runner.active.all())

    def attach(self, thread_id: str) -> tuple[list[Any], EventId]:
        """Give a page, which must be what the events up to its place add up to."""
        runner, log = self.pick()
        # A thread that is gone has no page; what its events leave is nothing.
        entries, more, event_id = runner.page(thread_id, 200) or ([], False, log.end(thread_id))
        assert not more
        if self.exact:
            assert entries == Viewer().see(self.tape.until(thread_id, event_id)).entries
        return entries, event_id

    def check(self, thread_id: str, whole: list[Json]) -> None:
        """Give what must be true of a thread when all is over, of which ``whole`` is stored."""
        if self.exact:
            self.check_tape(whole, self.tape.until(thread_id))
        before: list[Json] = []
        for entry in whole:
            if entry["run"]:
                group, script = self.groups[entry["run"]["id"]]
                seen = [one for one in before if not one["run"] or self.groups[one["run"]["id"]][0] is not group]
                if script.opened.is_set():
                    assert script.turns == turns_of(entry["assistant_id"], seen)
            before.append(entry)

    def check_tape(self, whole: list[Json], tape: list[Event]) -> None:
        assert Viewer().see(tape).entries == whole
        if whole == []:
            return
        created = [cast(Json, event.data)["id"] for event in tape if event.name == "thread.message.created"]
        assert created == [one["message"]["id"] for one in whole]
        over = {event.key: at for at, event in enumerate(tape) if event.name in ENDS}
        begun = {event.key: at for at, event in enumerate(tape) if event.name == "thread.run.in_progress"}
        run_ids = [one["run"]["id"] for one in whole if one["run"]]
        for at, later in enumerate(run_ids):
            for earlier in run_ids[:at]:
                if later in begun and self.groups[later][0] is not self.groups[earlier][0]:
                    assert over[earlier] < begun[later]

    def settle(self, thread_id: str) -> None:
        until(lambda: not self.live(thread_id))

    def trim(self, thread_id: str, choose: random.Random) -> None:
        self.clock.now += choose.choice([0, 3, 8, 30])
        self.log.tend()

    def trouble(self) -> contextlib.AbstractContextManager[object]:
        """Around what may fail in this house, for a viewer to do again."""
        return contextlib.nullcontext()

    def heal(self) -> None:
        """From now on nothing fails."""

    def close(self) -> None:
        for script in self.scripts:
            script.close()
        until(lambda: not any(one.runner.active.all() for one in self.members))
        for one in self.members:
            one.log.close()


def turns_of(assistant_id: str, seen: Sequence[Json]) -> list[Turn]:
    """Give what a model must be asked with, of an assistant that sees these entries."""
    turns, again = list[Turn](), list[Turn]()
    for one in seen:
        parts = [part.get("refusal") or part["text"]["value"] for part in one["message"]["content"]]
        told, speaker = "\n\n".join(filter(None, parts)), one["assistant_id"]
        if not told.strip():
            continue
        again = []
        if speaker == assistant_id:
            turns.append(Turn("assistant", told))
            again = [Turn("user", GO_ON if one["message"]["status"] == "completed" else AGAIN)]
        else:
            turns.append(Turn("user", told if speaker is None else marked(speaker, told)))
    return turns + again


def until(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(
        client: Script, assistant: Assistant, turns: list[Turn], stall: float, *more: object, **named: object
    ) -> Script:
        client.turns = turns
        client.opened.set()
        return client

    monkeypatch.setattr(answer_stream, "open", ask)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ThreadStore]:
    store = ThreadStore(f"sqlite:///{tmp_path / 'a.sqlite3'}" if request.param == "file" else "sqlite://")
    yield store
    store.close()


@pytest.fixture
def house(store: ThreadStore) -> Iterator[House]:
    house = House(store)
    yield house
    house.close()


def random_script(choose: random.Random) -> Script:
    slots: list[str] = []
    batches: list[list[Delta] | RunError] = []

    def part() -> Delta:
        kind = choose.choice(["text", "text", "text", "refusal", "annotation", "reasoning"])
        if kind == "reasoning":
            return Reasoning(f"r{choose.randrange(9)}")
        slot = "refusal" if kind == "refusal" else "text"
        at = choose.choice([*(at for at, known in enumerate(slots) if known == slot), len(slots)])
        if at == len(slots):
            slots.append(slot)
        if kind == "annotation":
            return Annotation(at, cast(Any, {"n": choose.randrange(9)}))
        return Text(at, f"t{choose.randrange(99)} ") if kind == "text" else Refusal(at, f"n{choose.randrange(99)} ")

    for _ in range(choose.randrange(12)):
        batches.append([part() for _ in range(choose.choice([1, 1, 1, 2, 5]))])
    last = choose.randrange(6)
    if last == 0:
        return Script([*batches, RunError("upstream_cut")])
    tokens = choose.randrange(99)
    used: Usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    end = End(choose.choice([None, None, "max_tokens"]), used)
    return Script([*batches, [part(), end] if last == 1 else [end]])


class Seat:
    """One viewer of a thread: a page, then events; it is cut and comes back where it was."""

    def __init__(self, house: House, thread_id: str) -> None:
        self._house, self._thread_id = house, thread_id
        self.event_id: EventId | None = None
        self.viewer = Viewer()
        self._subscription: Subscription | None = None

    def read(self) -> None:
        try:
            if self._subscription is None:
                if self.event_id is None:
                    raise PositionExpiredError
                self._subscription = self._house.pick().log.subscribe(self._thread_id, self.event_id)
            records = self._subscription.read(0)
        except PositionExpiredError:
            self.cut()
            entries, self.event_id = self._house.attach(self._thread_id)
            self.viewer = Viewer(entries)
            return
        for record in records:
            assert self.event_id is not None
            assert record.event_id == EventId(self.event_id.epoch, self.event_id.offset + 1)
            self.viewer.see([Event(record.name, cast(Any, record.data()))])
            self.event_id = record.event_id

    def cut(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def caught_up(self) -> bool:
        with self._house.trouble():
            self.read()
            return self.event_id == self._house.pick().log.end(self._thread_id)
        return False


class Trial:
    """A thread with viewers, to which random things happen."""

    def __init__(self, house: House, choose: random.Random) -> None:
        self.house, self.choose = house, choose
        self.thread_id = house.thread()
        self.seats: list[Seat] = []
        self.scripts: list[Script] = []
        self.run_ids: list[str] = []

    def step(self) -> None:
        """Do one thing, or nothing where what was chosen can't be done now."""
        choose = self.choose
        match choose.choice(self.house.steps):
            case "post" if len(self.scripts) < 6:
                self._post()
            case "go" if self.scripts:
                choose.choice(self.scripts).go(choose.randrange(1, 4))
                if choose.random() < 0.5:
                    time.sleep(0.002)
            case "flush":
                self.house.pick().runner.flush()
            case "trim":
                self.house.trim(self.thread_id, choose)
            case "cancel" if self.run_ids and choose.random() < 0.4:
                self.house.pick().runner.cancel(self.thread_id, choose.choice(self.run_ids))
            case step:
                self._view(step)

    def _post(self) -> None:
        choose = self.choose
        new = [random_script(choose) for _ in range(choose.choice([0, 1, 1, 2, 3]))]
        text = "hi" if not new or choose.random() < 0.7 else None
        mode = choose.choice(["parallel", "sequential"])
        self.run_ids += self.house.post(self.thread_id, new, text, mode)
        self.scripts += new

    def _view(self, step: str) -> None:
        match step:
            case "sit" if len(self.seats) < 4:
                self.seats.append(Seat(self.house, self.thread_id))
            case "look":
                self.house.attach(self.thread_id)
            case "read" if self.seats:
                self.choose.choice(self.seats).read()
            case "cut" if self.seats:
                self.choose.choice(self.seats).cut()

    def end(self, *, deleted: bool) -> list[Any]:
        """Let all scripts come to their end; give the entries that are stored then."""
        self.house.heal()
        if deleted:
            self.house.pick().runner.delete(self.thread_id)
            assert self.house.post(self.thread_id) == []
        for script in self.scripts:
            script.go(100)
        self.house.settle(self.thread_id)
        final = self.house.store.page(self.thread_id, 200) or ([], False)
        return [stored.entry for stored in final[0]]


def trial(house: House, choose: random.Random) -> int:
    """Do random things to a thread with viewers; all must end up with the store's state. Give how many."""
    trial = Trial(house, choose)
    steps = choose.randrange(10, 30)
    deletes = choose.random() < 0.1
    for _ in range(steps):
        with house.trouble():
            trial.step()
    whole = trial.end(deleted=deletes)
    assert all(one["run"] is None or one["run"]["status"] in TERMINAL for one in whole)
    assert (whole == []) is deletes or not trial.run_ids
    house.check(trial.thread_id, whole)
    for seat in trial.seats:
        # What the log was not told, a snapshot tells, soon.
        until(lambda seat=seat: seat.caught_up() and (house.exact or seat.viewer.entries == whole))  # type: ignore[misc]
        seat.cut()
        assert seat.viewer.entries == whole
    return steps


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_every_viewer_ends_with_the_whole(store: ThreadStore, seed: int) -> None:
    house = House(store)
    stop = threading.Event()
    failures: list[BaseException] = []

    def housekeeper() -> None:
        # Beside the trials: what they do by turns also happens at any moment.
        while not stop.wait(0.003):
            try:
                house.runner.flush()
                house.log.tend()
            except BaseException as error:
                failures.append(error)

    keeper = threading.Thread(target=housekeeper)
    keeper.start()
    did = 0
    try:
        for number in range(TRIALS):
            did += trial(house, random.Random(f"{seed}/{number}"))
    finally:
        stop.set()
        keeper.join()
        house.close()
    assert failures == []
    assert did >= 10 * TRIALS


@pytest.mark.slow
@pytest.mark.parametrize("max_events", [200, 10_000])
def test_a_page_read_while_tokens_stream_freely_is_exact_as_of_its_place(house: House, max_events: int) -> None:
    house.log._max_events = max_events
    thread_id = house.thread()
    tokens: list[list[Delta] | RunError] = [[Text(0, f"{n} ")] for n in range(300)]
    scripts = [Script([*tokens, [End(None, None)]]) for _ in range(3)]
    house.post(thread_id, scripts)

    def feed() -> None:
        for _ in range(301):
            for script in scripts:
                script.go()
            time.sleep(0.0005)

    feeder = threading.Thread(target=feed)
    feeder.start()
    pages = 0
    while house.live(thread_id):
        house.attach(thread_id)
        pages += 1
    feeder.join()
    assert pages > 0
    entries, _ = house.attach(thread_id)
    assert [one["message"]["status"] for one in entries] == ["completed"] * 4
    said = "".join(f"{n} " for n in range(300))
    assert [one["message"]["content"][0]["text"]["value"] for one in entries] == ["hi", said, said, said]


# Places that the log no longer has


def text(value: str) -> list[Delta]:
    return [Text(0, value)]


def filled(house: House, thread_id: str) -> None:
    """Make the log forget all that was in it."""
    for _ in range(30):
        house.post(thread_id)


def test_a_thread_is_readable_while_a_run_waits_longer_than_the_log_remembers(house: House) -> None:
    thread_id = house.thread()
    house.post(thread_id, [Script([]), Script([])], mode="sequential")
    filled(house, thread_id)
    assert len(house.attach(thread_id)[0]) == 33


def test_a_thread_is_readable_while_a_silent_run_stays_silent(house: House) -> None:
    thread_id = house.thread()
    script = Script([text("a")])
    house.post(thread_id, [script])
    script.go()
    until(lambda: house.attach(thread_id)[0][1]["message"]["content"])
    house.runner.flush()
    filled(house, thread_id)
    house.attach(thread_id)
    house.clock.now += 100
    house.log.tend()
    house.attach(thread_id)


def test_text_that_was_not_stored_yet_survives_the_end_of_an_epoch(house: House) -> None:
    thread_id = house.thread()
    script = Script([text("a"), text("b")])
    house.post(thread_id, [script])
    script.go()
    until(lambda: house.attach(thread_id)[0][1]["message"]["content"])
    before = house.attach(thread_id)[1]
    house.clock.now += 100
    house.log.tend()
    entries, event_id = house.attach(thread_id)
    assert event_id.epoch != before.epoch
    assert entries[1]["message"]["content"] == [events.text_part("a")]
    script.go()
    until(lambda: house.attach(thread_id)[0][1]["message"]["content"] == [events.text_part("ab")])


def test_a_thread_is_readable_while_another_worker_holds_a_run_of_it(house: House) -> None:
    thread_id = house.thread()
    house.post(thread_id, [Script([])])
    successor = House(house.store, worker="w2")
    filled(successor, thread_id)
    found = successor.runner.page(thread_id, 200)
    assert found is not None
    assert len(found[0]) == 32
    run = found[0][1]["run"]
    assert run is not None
    assert run["status"] in ("queued", "in_progress")
    successor.close()


def test_text_that_is_stored_already_is_not_added_again(house: House) -> None:
    thread_id = house.thread()
    silent, script = Script([]), Script([text("a"), text("b")])
    house.post(thread_id, [silent, script])
    for said in ("a", "ab"):
        script.go()
        whole = [events.text_part(said)]
        while house.attach(thread_id)[0][2]["message"]["content"] != whole:
            time.sleep(0.001)
        for _ in range(2):
            house.runner.flush()
            assert house.attach(thread_id)[0][2]["message"]["content"] == whole


# Races, one by one


def test_an_older_text_is_never_stored_over_a_newer_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    thread_id = house.thread()
    script = Script([text("a"), text("b")])
    house.post(thread_id, [script])
    script.go()
    until(lambda: house.attach(thread_id)[0][1]["message"]["content"])
    save, slow, newer = house.store.save_grown, threading.Event(), threading.Event()

    def slow_save(worker: str, states: Sequence[State]) -> set[str]:
        [(_, message, *_)] = states
        if message["content"] == [events.text_part("a")]:
            slow.set()
            newer.wait(0.3)
        done = save(worker, states)
        if message["content"] == [events.text_part("ab")]:
            newer.set()
        return done

    monkeypatch.setattr(house.store, "save_grown", slow_save)
    first = threading.Thread(target=house.runner.flush)
    first.start()
    assert slow.wait(5)
    script.go()
    until(lambda: house.attach(thread_id)[0][1]["message"]["content"] == [events.text_part("ab")])
    house.runner.flush()
    first.join(5)
    found = house.store.page(thread_id, 2)
    assert found is not None
    assert found[0][1].entry["message"]["content"] == [events.text_part("ab")]


def test_a_thread_that_is_deleted_while_its_text_is_stored_is_told_so(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id = house.thread()
    script = Script([[Text(0, "a")]])
    house.post(thread_id, [script])
    delete = house.store.delete_thread

    def stored_meanwhile(thread_id: str) -> None:
        delete(thread_id)
        house.runner.flush()

    monkeypatch.setattr(house.store, "delete_thread", stored_meanwhile)
    script.go()
    until(lambda: house.tape.until(thread_id)[-1].name == "thread.message.delta")
    house.runner.delete(thread_id)
    assert house.tape.until(thread_id)[-1].name == "thread.deleted"
    house.settle(thread_id)


def test_a_run_that_began_while_its_thread_was_being_deleted_is_stopped(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread_id, script = house.thread(), Script([text("a")])
    lock = house.log.lock

    def begun_before(name: str) -> Any:
        # Between the call of delete() and its lock.
        monkeypatch.setattr(house.log, "lock", lock)
        house.post(thread_id, [script])
        assert script.opened.wait(5)
        return lock(name)

    monkeypatch.setattr(house.log, "lock", begun_before)
    house.runner.delete(thread_id)
    assert script.closed.wait(1)
    house.settle(thread_id)


def test_a_cancelled_run_keeps_its_text_and_its_upstream_is_closed(house: House) -> None:
    thread_id = house.thread()
    script, waiting = Script([text("a"), text("b")]), Script([])
    first, second = house.post(thread_id, [script, waiting], mode="sequential")
    script.go()
    until(lambda: house.attach(thread_id)[0][1]["message"]["content"])
    cancelled = house.runner.cancel(thread_id, second)
    assert cancelled is not None
    assert cancelled["status"] == "cancelled"
    began = time.monotonic()
    cancelled = house.runner.cancel(thread_id, first)
    assert cancelled is not None
    assert cancelled["status"] == "cancelled"
    assert script.closed.is_set()
    assert time.monotonic() - began < 1
    house.settle(thread_id)
    assert not waiting.opened.is_set()
    entries, _ = house.attach(thread_id)
    assert [one["message"]["status"] for one in entries] == ["completed", "incomplete", "incomplete"]
    assert [one["message"]["incomplete_details"] for one in entries[1:]] == [{"reason": "run_cancelled"}] * 2
    assert entries[1]["message"]["content"] == [events.text_part("a")]
    again = house.runner.cancel(thread_id, first)
    assert again == cancelled
    assert house.runner.cancel(house.thread(), first) is None


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_groups_of_a_thread_run_one_after_another_in_the_order_of_their_posts(house: House, mode: str) -> None:
    thread_id = house.thread()
    first, second, last = (Script([[Text(0, "fine"), End(None, None)]]) for _ in range(3))
    house.post(thread_id, [first, second], mode=mode)
    house.post(thread_id, [last])
    assert first.opened.wait(5)
    assert second.opened.wait(5 if mode == "parallel" else 0.05) == (mode == "parallel")
    assert not last.opened.wait(0.05)
    first.go()
    assert second.opened.wait(5)
    assert not last.opened.wait(0.05)
    second.go()
    assert last.opened.wait(5)
    last.go()
    house.settle(thread_id)
    assert {one["message"]["status"] for one in house.attach(thread_id)[0]} == {"completed"}
