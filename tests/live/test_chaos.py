"""The chaos of benchmarks/: what it looks for is found where it is, and a little of it finds nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from assistream_flask import events
from assistream_flask.events import Event, Json
from assistream_flask.types import Entry, Message
from benchmarks.chaos_checks import Fault, Held, Ledger, Shrunk, View, answer, misfit
from benchmarks.chaos_faults import FAULTS, plan, tracebacks
from tests.gunicorn_server import ROOT
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

WORDS = 6
TEXT = answer("t1", "a", 0, WORDS)
PIECES = [f" {word}" if at else word for at, word in enumerate(TEXT.split(" "))]


class Shown:
    """One viewer of a thread with one run, and what is told of it."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.view = View(lambda kind, run, detail: self.found.append(kind), {"t1": WORDS, "t2": WORDS}.get)
        self.run = events.run("thread_1", "a", "a")
        self.message = events.message("thread_1", "assistant", [], assistant_id="a", run_id=self.run["id"])
        self.run["message_id"] = self.message["id"]
        self.place = 0
        self.snapshot([])

    def snapshot(self, entries: list[Entry], epoch: str = "1") -> None:
        event = events.snapshot("thread_1", copy.deepcopy(entries), False)
        self.view.see(event.name, f"{epoch}-{self.place}", cast(Json, event.data))

    def tell(self, *told: Event, skip: int = 0, epoch: str = "1") -> None:
        for event in told:
            self.place += 1 + skip
            self.view.see(event.name, f"{epoch}-{self.place}", cast(Json, copy.deepcopy(event.data)))

    def begin(self) -> None:
        self.tell(events.run_created(self.run), events.message_created(self.message))
        self.tell(events.run_status({**self.run, "status": "in_progress"}))

    def say(self, *pieces: str) -> None:
        self.tell(*(events.text_delta(self.message, 0, piece) for piece in pieces))

    def ended(self, status: Any = "completed", text: str = TEXT) -> list[Event]:
        message: Message = {**self.message, "status": "completed" if status == "completed" else "incomplete"}
        message["content"] = [events.text_part(text)] if text else []
        return [events.message_ended(message), events.run_status({**self.run, "status": status})]

    def entry(self, text: str, status: Any = "in_progress") -> Entry:
        message: Message = {**self.message, "content": [events.text_part(text)]}
        return events.entry(message, {**self.run, "status": status})


@pytest.fixture
def shown() -> Shown:
    made = Shown()
    made.begin()
    return made


def test_an_answer_that_comes_word_by_word_through_snapshots_and_epochs_has_no_fault(shown: Shown) -> None:
    shown.say(*PIECES[:2])
    shown.snapshot([shown.entry("".join(PIECES[:3]))])
    shown.say(PIECES[3])
    shown.place = 0
    shown.snapshot([shown.entry("".join(PIECES[:5]))], "2")
    shown.tell(events.text_delta(shown.message, 0, PIECES[5]), *shown.ended(), epoch="2")
    assert (shown.found, shown.view.shrunk) == ([], [])
    assert list(shown.view.over) == [shown.run["id"]]


def _twice(shown: Shown) -> None:
    shown.say(*PIECES[:2], PIECES[1])


def _from_the_start(shown: Shown) -> None:
    shown.say(*PIECES[:2], *PIECES[:2])


def _more_than_all(shown: Shown) -> None:
    shown.say(*PIECES, PIECES[-1])


def _lost(shown: Shown) -> None:
    shown.say(*PIECES[:2], *PIECES[3:])


def _late_begin(shown: Shown) -> None:
    shown.say(PIECES[1].strip())


def _moved(shown: Shown) -> None:
    shown.say(PIECES[0], PIECES[2], PIECES[1])


def _asked_again(shown: Shown) -> None:
    shown.say(*PIECES[:2], answer("t1", "a", 1, WORDS))


def _of_another(shown: Shown) -> None:
    shown.say(PIECES[0], " " + answer("t2", "a", 0, WORDS))


def _of_nobody(shown: Shown) -> None:
    shown.say("Hello")


def _by_a_snapshot(shown: Shown) -> None:
    shown.snapshot([shown.entry(PIECES[0] + PIECES[2])])


def _after_the_end(shown: Shown) -> None:
    shown.say(*PIECES)
    shown.tell(*shown.ended())
    shown.say(PIECES[-1])


def _a_second_end(shown: Shown) -> None:
    shown.say(*PIECES)
    shown.tell(*shown.ended(), shown.ended("failed")[1])


def _an_end_and_its_message_again(shown: Shown) -> None:
    shown.say(*PIECES)
    shown.tell(*shown.ended(), shown.ended()[0])


def _an_end_taken_back(shown: Shown) -> None:
    shown.say(*PIECES)
    shown.tell(*shown.ended())
    shown.snapshot([shown.entry(TEXT)])


def _queued_again(shown: Shown) -> None:
    shown.tell(events.run_status({**shown.run, "status": "queued"}))


def _less(shown: Shown) -> None:
    shown.say(*PIECES[:3])
    shown.snapshot([shown.entry("".join(PIECES[:2]))])


def _less_at_the_end(shown: Shown) -> None:
    shown.say(*PIECES[:3])
    shown.tell(*shown.ended("failed", "".join(PIECES[:2])))


def _more_at_the_end(shown: Shown) -> None:
    shown.say(*PIECES[:3])
    shown.tell(*shown.ended())


def _half_an_answer(shown: Shown) -> None:
    shown.say(*PIECES[:3])
    shown.tell(*shown.ended(text="".join(PIECES[:3])))


def _a_gap(shown: Shown) -> None:
    shown.tell(events.text_delta(shown.message, 0, PIECES[0]), skip=1)


def _an_id_again(shown: Shown) -> None:
    shown.tell(events.text_delta(shown.message, 0, PIECES[0]), skip=-1)


def _a_snapshot_of_before(shown: Shown) -> None:
    shown.place = 0
    shown.snapshot([shown.entry("")])


def _another_epoch(shown: Shown) -> None:
    shown.tell(events.text_delta(shown.message, 0, PIECES[0]), epoch="2")


def _no_entry(shown: Shown) -> None:
    shown.snapshot([])


def _another_order(shown: Shown) -> None:
    user = events.message("thread_1", "user", [events.text_part("Hi")])
    shown.tell(events.message_created(user))
    shown.snapshot([events.entry(user), shown.entry("")])


def _an_entry_between(shown: Shown) -> None:
    first, second = (events.message("thread_1", "user", [events.text_part("Hi")]) for _ in range(2))
    shown.tell(events.message_created(second))
    shown.snapshot([shown.entry(""), events.entry(first), events.entry(second)])


def _an_entry_twice(shown: Shown) -> None:
    shown.tell(events.message_created(shown.message))


def _an_entry_twice_in_a_snapshot(shown: Shown) -> None:
    shown.snapshot([shown.entry(""), shown.entry("")])


def _a_word_of_no_message(shown: Shown) -> None:
    shown.tell(events.text_delta({**shown.message, "id": "msg_2"}, 0, PIECES[0]))


def _after_the_thread(shown: Shown) -> None:
    shown.tell(events.thread_deleted("thread_1"))
    shown.say(PIECES[0])


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (_twice, "doubled words"),
        (_from_the_start, "doubled words"),
        (_more_than_all, "doubled words"),
        (_lost, "lost words"),
        (_late_begin, "lost words"),
        (_moved, "lost words"),
        (_asked_again, "two answers mixed"),
        (_of_another, "two answers mixed"),
        (_of_nobody, "words of nobody's"),
        (_by_a_snapshot, "lost words"),
        (_after_the_end, "after the end"),
        (_a_second_end, "an end taken back"),
        (_an_end_and_its_message_again, "after the end"),
        (_an_end_taken_back, "an end taken back"),
        (_queued_again, "a status went back"),
        (_less, "shrunk"),
        (_less_at_the_end, "shrunk"),
        (_more_at_the_end, "lost words"),
        (_half_an_answer, "completed, and not whole"),
        (_a_gap, "a gap"),
        (_an_id_again, "an offset twice"),
        (_a_snapshot_of_before, "an id went back"),
        (_another_epoch, "another epoch without a snapshot"),
        (_no_entry, "an entry lost"),
        (_another_order, "another order"),
        (_an_entry_between, "an entry between"),
        (_an_entry_twice, "an entry twice"),
        (_an_entry_twice_in_a_snapshot, "an entry twice"),
        (_a_word_of_no_message, "of an unknown message"),
        (_after_the_thread, "after thread.deleted"),
    ],
)
def test_what_a_viewer_may_not_see_is_reported(shown: Shown, what: Callable[[Shown], None], found: str) -> None:
    what(shown)
    assert found in [*shown.found, *("shrunk" for _ in shown.view.shrunk)]


def test_a_beginning_of_an_answer_fits_and_nothing_else_does() -> None:
    known = {"t1": WORDS}.get
    assert [misfit(TEXT[:at], known) for at in (0, len(PIECES[0]), len(TEXT))] == [None] * 3
    words = TEXT.split(" ")
    for at in range(WORDS - 1):
        assert misfit(" ".join(words[:at] + words[at + 1 :]), known) == "lost words"
        assert misfit(" ".join(words[: at + 1] + words[at:]), known) == "doubled words"


# What was done, and what it excuses


class Case:
    """A run of a worker with pid 1, begun 100 s ago, and what was done since."""

    def __init__(self, background: bool = False) -> None:
        self.ledger = Ledger()
        self.now = time.time()
        self.held = Held("thread_1", "t1", "a", self.now - 100, background, pids=[1])
        self.ledger.runs["run_1"] = self.held

    def did(self, kind: str, ago: float, seconds: float = 0, pid: int = 1) -> None:
        self.ledger.faults.append(Fault(kind, self.now - ago, (pid,), self.now - ago + seconds))

    def ended(self, status: str, code: str = "") -> bool:
        """Tell whether such an end, now, is reported."""
        error = {"code": code} if status == "failed" else None
        details = {"reason": code} if status == "incomplete" else None
        run = {"id": "run_1", "status": status, "last_error": error, "incomplete_details": details}
        self.ledger.judge_end(run, self.now)
        return bool(self.ledger.violations)

    def asked(self, *ago: float) -> list[str]:
        """Give what is reported of having been asked so many seconds ago."""
        self.ledger.asks["t1", "a"] = [self.now - one for one in ago]
        self.ledger.judge_asks("run_1", True)
        return [one.kind for one in self.ledger.violations]


def test_an_end_that_is_not_completed_needs_its_own_cause() -> None:
    assert not Case().ended("completed")
    assert Case().ended("failed", "worker_lost")
    assert Case().ended("failed", "upstream_cut")
    assert Case().ended("cancelled")
    assert Case().ended("incomplete", "server_shutdown")


@pytest.mark.parametrize(
    ("kind", "ago", "seconds", "pid", "is_cause"),
    [
        ("kill", 20, 0, 1, True),
        ("kill", 20, 0, 2, False),
        ("kill", 200, 0, 1, False),
        ("stop", 20, 9, 1, True),
        ("stop", 20, 5, 1, False),
        ("stop", 20, 15, 2, False),
        ("readonly", 20, 15, 1, False),
        ("clock", 20, 15, 1, False),
        ("compute", 20, 12, 1, False),
        ("deploy", 20, 0, 1, False),
    ],
)
def test_a_worker_is_lost_only_where_it_was_killed_or_stopped_for_its_lease(
    kind: str, ago: float, seconds: float, pid: int, is_cause: bool
) -> None:
    case = Case()
    if kind == "kill" and ago > 100:
        # As a process: it ended before the run began.
        case.held.begun = case.now
    case.did(kind, ago, seconds, pid)
    assert case.ended("failed", "worker_lost") is not is_cause


def test_a_background_answer_survives_its_worker() -> None:
    for kind in ("kill", "deploy"):
        case = Case(background=True)
        case.did(kind, 20)
        assert case.ended("failed", "worker_lost")


def test_a_deploy_excuses_a_shutdown_and_a_cancel_what_was_cancelled() -> None:
    case = Case()
    case.did("deploy", 20)
    assert not case.ended("incomplete", "server_shutdown")
    case = Case()
    case.held.wanted = "cancel"
    assert not case.ended("cancelled")


def test_what_a_snapshot_mends_is_excused_by_what_was_away_and_by_nothing_else() -> None:
    for kind, ago, found in (("pause", 5, True), ("pause", 20, False), ("terminate", 5, True), ("kill", 5, False)):
        case = Case()
        case.did(kind, ago)
        assert (case.ledger.told("an entry between", "") is not None) is found
        assert case.ledger.told("another order", "") is None
    for kind, ago, pid, found in (
        ("flush", 5, 1, True),
        ("flush", 25, 1, False),
        ("pause", 5, 1, False),
        ("flush", 5, 2, False),
    ):
        case = Case()
        case.did("stop", 20, 15, pid)
        case.did(kind, ago)
        assert (case.ledger.told("after the end", "run_1") is not None) is found


def test_a_model_is_asked_once() -> None:
    assert Case().asked(50) == []
    assert Case().asked() == ["never asked, and answered"]
    assert Case().asked(50, 40) == ["asked twice"]
    killed = Case()
    killed.did("kill", 49.95)
    assert killed.asked(50, 40) == ["asked twice"]
    killed = Case(background=True)
    killed.did("kill", 49.95)
    assert killed.asked(50, 40) == []
    killed = Case(background=True)
    killed.did("kill", 45)
    assert killed.asked(50, 40) == ["asked twice"]


@pytest.mark.parametrize(
    ("faults", "words", "is_excused"),
    [
        ([("kill", 20)], 1, False),
        ([("flush", 20)], 1, False),
        ([("kill", 20), ("flush", 19)], 40, True),
        ([("kill", 20), ("flush", 19)], 80, False),
        ([("kill", 20), ("flush", 19), ("readonly", 21)], 80, True),
        ([("kill", 20), ("flush", 60)], 1, False),
        ([("kill", 20), ("readonly", 19)], 1, False),
    ],
)
def test_words_go_back_only_where_the_log_was_lost_with_the_worker_and_only_those_not_stored(
    faults: list[tuple[str, float]], words: int, is_excused: bool
) -> None:
    case = Case()
    case.ledger.paces["t1"] = 0.1
    for kind, ago in faults:
        case.did(kind, ago)
    assert (case.ledger.shrunk(case.held, Shrunk(case.now, "run_1", words, "")) is not None) is is_excused


def test_a_seed_makes_one_plan_of_all_kinds_that_do_not_get_in_each_others_way() -> None:
    made = plan("1", 3600, list(FAULTS), 4)
    assert made == plan("1", 3600, list(FAULTS), 4) != plan("2", 3600, list(FAULTS), 4)
    assert {one.kind for one in made} == set(FAULTS)
    ends: dict[Any, float] = {}
    for one in made:
        held = (FAULTS[one.kind].holds, one.target if FAULTS[one.kind].holds in ("gunicorn", "clock") else None)
        assert one.at >= ends.get(held, 0)
        ends[held] = one.at + one.seconds
    assert {one.kind for one in plan("1", 600, ["kill", "flush"], 4)} == {"kill", "flush"}


def test_of_errors_that_came_of_others_the_last_is_counted() -> None:
    one = "Traceback (most recent call last)\n  File x\na.B: said\n  more"
    log = f"[1] begins\n{one}\n\nThe above exception was the direct cause of the following exception:\n\n"
    log += "Traceback (most recent call last)\n  File y\nc.D\n[2] goes on\n" + one
    assert tracebacks(iter(log.splitlines())) == {"c.D": 1, "a.B": 1}


# A little of it


def test_a_little_chaos_loses_and_doubles_nothing(
    tmp_path: Path, postgres: PostgresServer, redis_server: RedisServer
) -> None:
    """Tell by the fixtures whether the servers are installed."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--minutes", "0.4", "--seed", "12", "--every", "3"]
    command += ["--threads", "8", "--viewers", "2", "--longest", "6", "--keep", str(tmp_path / "chaos")]
    command += ["--only", "kill,deploy,redis,flush,cut,cancel,delete,repeat"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    figures = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert int({name.strip(): count for name, count in figures.items()}["answers whole"]) > 0
