"""An active run: its phases, and that nothing brings it back from a later one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from assistream_flask import events
from assistream_flask.errors import RunError
from assistream_flask.events import Json
from assistream_flask.log.protocol import EventId
from assistream_flask.platform.interrupt import Interrupted
from assistream_flask.runs.active_run import ActiveRun, Checkpoint, Phase
from assistream_flask.runs.message_accumulator import Ending, MessageAccumulator, Stop
from assistream_flask.store.sql import Owner
from assistream_flask.upstream.answer_stream import AnswerStream
from assistream_flask.upstream.deltas import End, Text
from tests.conftest import examples

ENDINGS: list[Ending] = [End(None, None), RunError("upstream_cut"), Stop.CANCELLED, Stop.SHUTDOWN]
STATUSES = ["completed", "failed", "cancelled", "incomplete"]
LATER = {
    Phase.QUEUED: set(Phase),
    Phase.IN_PROGRESS: set(Phase) - {Phase.QUEUED},
    Phase.INTERRUPTED: {Phase.INTERRUPTED, Phase.ENDED, Phase.LEFT},
    Phase.ENDED: {Phase.ENDED, Phase.LEFT},
    Phase.LEFT: {Phase.LEFT},
}


@pytest.fixture
def active() -> ActiveRun:
    return new_run()


def new_run() -> ActiveRun:
    run = events.run("thread_1", "tutor", "m")
    accumulator = MessageAccumulator(run, events.message("thread_1", "assistant", []), [])
    return ActiveRun(Owner("test", "me"), accumulator, None, position=0, event_id=None, group_id=None)


def began(active: ActiveRun) -> ActiveRun:
    active.begin()
    active.add([Text(0, "so far")])
    return active


@pytest.mark.parametrize(("ending", "status"), [*zip(ENDINGS, STATUSES, strict=True)])
def test_a_run_goes_from_queued_over_in_progress_to_its_end_and_keeps_its_text(
    active: ActiveRun, ending: Ending, status: str
) -> None:
    phases = [active.phase, began(active).phase]
    told = active.end(ending)
    assert [*phases, active.phase] == [Phase.QUEUED, Phase.IN_PROGRESS, Phase.ENDED]
    assert told is not None
    assert [event.name for event in told][-1] == f"thread.run.{status}"
    run, message, *_ = active.state()
    assert (run["status"], message["content"]) == (status, [events.text_part("so far")])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_ends_once(active: ActiveRun, ending: Ending) -> None:
    began(active).end(Stop.CANCELLED)
    assert active.end(ending) is None
    assert active.run["status"] == "cancelled"


def test_a_run_that_another_worker_has_is_not_ended_here_and_does_not_grow(active: ActiveRun) -> None:
    began(active).leave()
    assert active.phase is Phase.LEFT
    assert active.end(Stop.CANCELLED) is None
    with pytest.raises(Interrupted):
        active.add([Text(0, " and more")])
    assert active.grow() == []
    run, message, *_ = active.state()
    assert (run["status"], message["content"]) == ("in_progress", [events.text_part("so far")])


@pytest.mark.parametrize("stop", [lambda one: one.interrupt(Stop.CANCELLED), lambda one: one.leave()])
def test_a_run_that_is_to_stop_waits_no_more_and_begins_nothing(
    active: ActiveRun, stop: Callable[[ActiveRun], None]
) -> None:
    stop(active)
    loading = RunError("model_loading")
    for call in (active.begin, lambda: active.wait_for_model(loading), lambda: active.waits.wait(int)):
        with pytest.raises(Interrupted):
            call()
    assert active.run["status"] == "queued"


def test_the_last_interruption_says_how_a_run_ends(active: ActiveRun) -> None:
    active.interrupt(RunError("run_time_limit"))
    active.interrupt(Stop.SHUTDOWN)
    assert (active.phase, active.ending) == (Phase.INTERRUPTED, Stop.SHUTDOWN)


def test_a_run_whose_time_is_over_says_what_the_model_server_said_if_its_model_was_loading(active: ActiveRun) -> None:
    assert active.overdue() is None
    active.limit(-1)
    error = active.overdue()
    assert error is not None
    assert error.code == "run_time_limit"
    active.wait_for_model(RunError("model_loading", said="loading 40 GB"))
    error = active.overdue()
    assert error is not None
    assert (error.code, error.said) == ("model_loading", "loading 40 GB")
    active.begin()
    assert not active.is_loading


def do(active: ActiveRun, choose: random.Random) -> bool:
    """Do something with the run; tell whether that ended it."""
    ending = choose.choice(ENDINGS)
    match choose.randrange(5):
        case 0:
            active.begin()
        case 1:
            active.leave()
        case 2:
            active.add([Text(0, "x")])
        case 3:
            active.interrupt(ending)
        case _:
            return active.end(ending) is not None
    return False


def test_whatever_is_done_with_a_run_no_phase_comes_back_and_it_ends_once() -> None:
    choose = random.Random("phases")
    for _ in range(examples(2000)):
        active, ends, before = new_run(), 0, Phase.QUEUED
        for _ in range(choose.randrange(1, 9)):
            try:
                ends += do(active, choose)
            except Interrupted:
                assert active.phase in (Phase.INTERRUPTED, Phase.ENDED, Phase.LEFT)
            assert active.phase in LATER[before]
            before = active.phase
        assert ends <= 1
        assert active.is_over == (ends == 1)


def test_a_stream_that_told_only_what_was_delivered_has_come_further_all_the_same(active: ActiveRun) -> None:
    class Known(AnswerStream):
        def state(self) -> Json:
            return {"sequence": 9}

    began(active).read(Known(None))
    active.catch_up()
    assert active.resume_state == {"sequence": 9}


def test_what_is_stored_is_elsewhere_until_it_is_stored_as_of_the_log_that_tells_it() -> None:
    checkpoint = Checkpoint(EventId("a", 1))
    assert not checkpoint.is_of_another_log
    checkpoint.move(EventId("b", 1))
    assert checkpoint.is_of_another_log
    assert checkpoint.is_due
    checkpoint.begin()
    checkpoint.done(EventId("b", 1))
    assert not checkpoint.is_of_another_log
    assert not checkpoint.is_due
    checkpoint.move(None)
    assert not checkpoint.is_of_another_log
