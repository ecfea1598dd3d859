"""Many answers at once share one tick: nothing of them is lost, and none is held up by another's failure."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import openai
import pytest

from assistream_flask import Assistant, events, lean
from assistream_flask.errors import RunError
from assistream_flask.events import Json
from assistream_flask.fast import batch_scheduler, read_gate
from assistream_flask.fast.batch_scheduler import BatchScheduler, ReadSlot
from assistream_flask.log.memory import MemoryLog
from assistream_flask.platform.interrupt import Interrupted, Interruptible
from assistream_flask.runs import delta_publisher, message_accumulator
from assistream_flask.runs.active_run import ActiveRun
from assistream_flask.runs.log_appender import LogAppender
from assistream_flask.runs.run_reader import _feed
from assistream_flask.store.sql import Owner
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.testing._background import Stored
from assistream_flask.upstream import answer_stream, background
from assistream_flask.upstream.deltas import Begun, Delta, Text
from tests.conftest import KEY, Caller, MakeApp, text, wait_until

WORDS = " ".join(f"word{number}" for number in range(60))


@pytest.fixture
def quick(server: OfflineServer) -> Iterator[openai.OpenAI]:
    """Give a client that is read leanly, as the blueprint's own is."""
    with server.client(api_key=KEY, http_client=lean(openai.DefaultHttpxClient(verify=False))) as client:
        yield client


@pytest.fixture(params=["lean", "ordinary"])
def client(request: pytest.FixtureRequest, quick: openai.OpenAI) -> openai.OpenAI | None:
    return quick if request.param == "lean" else None


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give how many events were told each time, from now on."""
    told: list[int] = []
    tell = delta_publisher.DeltaPublisher._tell

    def count(self: delta_publisher.DeltaPublisher, grown: Any) -> None:
        told.append(sum(len(events) for _, events in grown))
        tell(self, grown)

    monkeypatch.setattr(delta_publisher.DeltaPublisher, "_tell", count)
    return told


def test_many_answers_at_once_are_told_whole_and_in_fewer_events(
    make_app: MakeApp, server: OfflineServer, client: openai.OpenAI | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = counted(monkeypatch)
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    server.replies = Reply(WORDS, delay=0.01)
    callers = [Caller(make_app(client=client, pace_seconds=0.1))]
    callers += [Caller(callers[0].client.application) for _ in range(14)]
    for caller in callers:
        caller.run("tutor", "poet")
    for caller in callers:
        entries = caller.wait(60)
        assert [text(one) for one in entries[1:]] == [WORDS] * 2
        assert [one["run"]["status"] for one in entries[1:]] == ["completed"] * 2
    assert 0 < sum(told) < 30 * 60 / 2


def test_a_few_answers_are_told_as_they_come(
    make_app: MakeApp, server: OfflineServer, quick: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchScheduler, "wait", lambda *_: pytest.fail("there is no hurry"))
    server.replies = Reply("one two three", delay=0.01)
    caller = Caller(make_app(client=quick, pace_seconds=100))
    caller.run("tutor", "critic")
    assert [text(one) for one in caller.wait()[1:]] == ["one two three"] * 2


def test_a_stream_that_is_faster_than_it_is_read_is_read_in_no_tick(
    make_app: MakeApp, server: OfflineServer, quick: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    monkeypatch.setattr(read_gate, "_FLOOD_BYTES", 1)
    waited: list[bool] = []

    def wait(self: BatchScheduler[Any], one: Any) -> None:
        waited.append(one.slot.is_flooded)

    monkeypatch.setattr(BatchScheduler, "wait", wait)
    server.replies = Reply(WORDS * 40)
    caller = Caller(make_app(client=quick))
    caller.run("tutor", "critic")
    assert [text(one) for one in caller.wait(60)[1:]] == [WORDS * 40] * 2
    # What came with the head was no read of its own.
    assert True not in waited


def test_a_flood_is_told_in_turns_also_where_answers_are_few(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FLOODED", 0)
    told = counted(monkeypatch)
    words = WORDS * 40
    server.replies = Reply(words)
    caller = Caller(make_app())
    caller.run("tutor")
    assert text(caller.wait(60)[1]) == words
    assert 1 < sum(told) < len(words.split()) / 3


def test_the_first_words_of_each_are_told_at_once_and_a_cancel_does_not_wait_for_a_tick(
    make_app: MakeApp, server: OfflineServer, client: openai.OpenAI | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    server.replies = Reply("one two three", fault="stall")
    caller = Caller(make_app(client=client, pace_seconds=1000))
    (run,) = caller.run("tutor")
    wait_until(lambda: text(caller.entry(run)).startswith("one"))
    caller.cancel(run)
    entry = caller.wait()[1]
    assert entry["run"]["status"] == "cancelled"
    assert "one two ".startswith(text(entry))


def test_what_waits_for_a_tick_is_told_when_the_answer_ends(
    make_app: MakeApp, server: OfflineServer, client: openai.OpenAI | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    monkeypatch.setattr(batch_scheduler, "_PATIENCE", 0.01)
    server.replies = [Reply(WORDS, fault="cut"), Reply(WORDS)]
    caller = Caller(make_app(client=client, pace_seconds=0.2))
    caller.run("tutor")
    cut = caller.wait()[1]
    assert cut["run"]["status"] == "failed"
    assert WORDS.startswith(text(cut))
    assert len(text(cut)) > len(WORDS) / 3
    caller.run("tutor")
    assert text(caller.wait()[-1]) == WORDS


def test_one_that_fails_in_a_tick_fails_alone(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    grow = ActiveRun.grow

    def broken(self: ActiveRun) -> Any:
        if self.pacing.has_begun and self.message["assistant_id"] == "critic" and self._arrived:
            self._arrived = []
            raise IndexError("nobody's fault")
        return grow(self)

    monkeypatch.setattr(ActiveRun, "grow", broken)
    server.replies = Reply(WORDS, delay=0.01)
    caller = Caller(make_app(pace_seconds=0.05))
    caller.run("critic", "tutor")
    critic, tutor = caller.wait(30)[1:]
    assert (critic["run"]["status"], critic["run"]["last_error"]["code"]) == ("failed", "server_error")
    assert (tutor["run"]["status"], text(tutor)) == ("completed", WORDS)


def test_a_response_that_is_asked_for_again_and_again_is_waited_for_by_its_reader_and_not_in_a_tick(
    make_app: MakeApp, server: OfflineServer, client: openai.OpenAI | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    follow, ask = Stored.follow, background.Poll._ask
    asked: list[bool] = []

    def short(self: Stored, after: int, fault: str | None) -> Iterator[float | bytes]:
        """End before the answer does."""
        frames = 0
        for step in follow(self, after, fault):
            frames += isinstance(step, bytes)
            if frames > 6:
                return
            yield step

    def seen(self: background.Poll) -> Any:
        asked.append(any(frame.name == "_tick" for frame in traceback.extract_stack()))
        return ask(self)

    monkeypatch.setattr(Stored, "follow", short)
    monkeypatch.setattr(background.Poll, "_ask", seen)
    server.replies = Reply(WORDS, delay=0.03)
    caller = Caller(make_app([Assistant("tutor", model="m", background=True)], client=client))
    caller.run("tutor")
    entry = caller.wait(30)[1]
    assert (entry["run"]["status"], text(entry)) == ("completed", WORDS)
    assert asked
    assert not any(asked)


def test_a_response_that_breaks_in_a_tick_goes_on_behind_what_that_tick_tells(
    make_app: MakeApp, server: OfflineServer, quick: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_publisher, "_FEW", 0)
    iterate, grow = answer_stream.AnswerStream.__iter__, ActiveRun.grow
    broken: list[bool] = []

    def cut(self: answer_stream.AnswerStream) -> Iterator[list[Delta]]:
        for parts in iterate(self):
            yield parts
            if parts and isinstance(parts[-1], Text):
                broken.append(any(frame.name == "_tick" for frame in traceback.extract_stack()))
                if broken[-1] and sum(broken) == 1:
                    raise RunError("upstream_cut")

    def slow(self: ActiveRun) -> Any:
        # Longer than it takes to ask for the rest.
        time.sleep(0.4 if any(broken) else 0)
        return grow(self)

    monkeypatch.setattr(answer_stream.AnswerStream, "__iter__", cut)
    monkeypatch.setattr(ActiveRun, "grow", slow)
    server.replies = Reply(WORDS, delay=0.02)
    caller = Caller(make_app([Assistant("tutor", model="m", background=True)], client=quick))
    caller.run("tutor")
    entry = caller.wait(30)[1]
    assert (entry["run"]["status"], text(entry)) == ("completed", WORDS)
    assert any(broken)


# The publisher, by itself


@pytest.fixture
def live() -> ActiveRun:
    run = events.run("thread_1", "tutor", "m")
    reply = message_accumulator.MessageAccumulator(run, events.message("thread_1", "assistant", []), [])
    one = ActiveRun(Owner("test", "me"), reply, None, position=0, event_id=None, group_id=None)
    one.read(answer_stream.translate([]))
    return one


def alone() -> delta_publisher.DeltaPublisher:
    return delta_publisher.DeltaPublisher(LogAppender(MemoryLog()), 0.01, lambda: 0, lambda live, parts: True)


def test_others_have_their_turn_before_a_read_and_not_with_its_parts_in_hand(
    live: ActiveRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    monkeypatch.setattr(live.reader.turn, "share", lambda **_: did.append("shared"))

    def batches() -> Iterator[list[Delta]]:
        did.append("read")
        yield [Text(0, "a")]

    live.reader.batches = batches()
    assert alone().next(live) == [Text(0, "a")]
    assert did == ["shared", "read"]


def test_what_is_known_of_a_response_is_kept_for_its_cancel_also_where_the_run_is_over(live: ActiveRun) -> None:
    class Known(answer_stream.AnswerStream):
        def state(self) -> Json:
            return {"response_id": "resp_1"}

    live.read(Known(None))
    live.end(message_accumulator.Stop.CANCELLED)
    with pytest.raises(Interrupted):
        alone().add(live, [Begun()])
    assert live.resume_state == {"response_id": "resp_1"}


def test_what_arrives_for_a_run_that_is_handed_over_is_left_to_the_next_worker_whole(live: ActiveRun) -> None:
    class Known(answer_stream.AnswerStream):
        number = 0

        def state(self) -> Json:
            self.number += 1
            return {"sequence": self.number}

    live.read(Known(None))
    publish = alone()
    publish.add(live, [Text(0, "one ")])
    live.leave()
    with pytest.raises(Interrupted):
        publish.add(live, [Text(0, "two")])
    _, message, _, _, state, _ = live.state()
    assert (cast(Any, message)["content"][0]["text"]["value"], state) == ("one ", {"sequence": 1})


def test_nobody_waits_for_a_feeder_that_was_stopped_before_it_began() -> None:
    slot, waits = ReadSlot(), Interruptible(lambda: None)
    items = slot.through(iter(["never read"]))
    assert next(items) == []
    slot.is_fed = True
    waits.interrupt()
    _feed(waits, slot)
    assert slot.pending()
    assert list(items) == [[]]


# The batch scheduler


class Reader:
    """One that reads a socket, a turn at a time, and stops when it is to read for itself."""

    def __init__(self, connection: socket.socket) -> None:
        self.slot = ReadSlot()
        self.slot.socket = connection
        self.got: list[bytes | None] = []


MakeScheduler = Callable[[float], BatchScheduler[Reader]]


@pytest.fixture
def scheduler() -> Iterator[MakeScheduler]:
    made: list[BatchScheduler[Reader]] = []

    def make(seconds: float) -> BatchScheduler[Reader]:
        def tick(ready: Sequence[Reader]) -> None:
            for one in ready:
                assert one.slot.read()
                one.got.append(one.slot.data)
                if one.slot.data == b"stop":
                    one.slot.handed_back.put("more than bytes")
                else:
                    new.again(one)

        new: BatchScheduler[Reader] = BatchScheduler(seconds, tick)
        made.append(new)
        return new

    yield make
    for one in made:
        one.close()


def waiting(scheduler: BatchScheduler[Reader], reader: Reader) -> threading.Thread:
    thread = threading.Thread(target=lambda: reader.got.append(scheduler.wait(reader)), daemon=True)
    thread.start()
    return thread


def test_what_there_is_to_read_is_read_a_turn_at_a_time_until_something_is_left_to_the_reader(
    scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_scheduler, "_PATIENCE", 1000)
    one, (ours, theirs) = scheduler(0.01), socket.socketpair()
    with ours, theirs:
        reader = Reader(ours)
        thread = waiting(one, reader)
        for number, sent in enumerate((b"one", b"two", b"stop"), 1):
            thread.join(0.1)
            assert thread.is_alive()
            theirs.send(sent)
            while len(reader.got) < number:
                time.sleep(0.001)
        thread.join(10)
        assert reader.got == [b"one", b"two", b"stop", "more than bytes"]


@pytest.mark.parametrize(
    "how", ["nothing comes for long", "it is closed", "its number is another's", "the scheduler is closed"]
)
def test_nobody_waits_for_ever(how: str, scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_scheduler, "_PATIENCE", 0.05 if how == "nothing comes for long" else 1000)
    one, (ours, theirs) = scheduler(0.01), socket.socketpair()
    with ours, theirs:
        reader = Reader(ours)
        thread = waiting(one, reader)
        time.sleep(0.03)
        if how == "it is closed":
            ours.close()
        elif how == "its number is another's":
            number = ours.fileno()
            ours.close()
            others = socket.socketpair()
            assert number in (others[0].fileno(), others[1].fileno())
            waiting(one, Reader(others[0]))
        elif how == "the scheduler is closed":
            one.close()
        thread.join(10)
        assert reader.got == [None]
    if how == "its number is another's":
        for other in others:
            other.close()


def test_a_connection_that_is_closed_already_is_not_waited_for(scheduler: MakeScheduler) -> None:
    connection = socket.socket()
    connection.close()
    assert scheduler(1000).wait(Reader(connection)) is None
