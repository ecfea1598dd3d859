"""Many answers at once share one tick: nothing of them is lost, and none is held up by another's failure."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from assistream_flask import lean, pace, publisher
from assistream_flask.live import Live
from assistream_flask.pace import Pacer
from assistream_flask.testing import OfflineServer, Reply

from .conftest import KEY, Caller, MakeApp, text, wait_until

WORDS = " ".join(f"word{number}" for number in range(60))


@pytest.fixture
def quick(server: OfflineServer) -> Iterator[openai.OpenAI]:
    """A client that is read leanly, as the blueprint's own is."""
    with server.client(api_key=KEY, http_client=lean(openai.DefaultHttpxClient(verify=False))) as client:
        yield client


@pytest.fixture(params=["lean", "ordinary"])
def client(request: pytest.FixtureRequest, quick: openai.OpenAI) -> openai.OpenAI | None:
    return quick if request.param == "lean" else None


def test_many_answers_at_once_are_told_whole_and_in_fewer_events(
    make_app: MakeApp, server: OfflineServer, client: openai.OpenAI | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    tell = publisher.Publisher._tell

    def counted(self: publisher.Publisher, grown: Any) -> None:
        told.append(sum(len(events) for _, events in grown))
        tell(self, grown)

    monkeypatch.setattr(publisher.Publisher, "_tell", counted)
    monkeypatch.setattr(publisher, "_FEW", 0)
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
    monkeypatch.setattr(Pacer, "wait", lambda *_: pytest.fail("there is no hurry"))
    server.replies = Reply("one two three", delay=0.01)
    caller = Caller(make_app(client=quick, pace_seconds=100))
    caller.run("tutor", "critic")
    assert [text(one) for one in caller.wait()[1:]] == ["one two three"] * 2


def test_the_first_words_of_each_are_told_at_once_and_a_cancel_does_not_wait_for_a_tick(
    make_app: MakeApp, server: OfflineServer, client: openai.OpenAI | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "_FEW", 0)
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
    monkeypatch.setattr(publisher, "_FEW", 0)
    monkeypatch.setattr(pace, "_PATIENCE", 0.01)
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
    monkeypatch.setattr(publisher, "_FEW", 0)
    grow = Live.grow

    def broken(self: Live) -> Any:
        if self.begun and self.reply.message["assistant_id"] == "critic" and self.pending:
            self.pending = []
            raise IndexError("nobody's fault")
        return grow(self)

    monkeypatch.setattr(Live, "grow", broken)
    server.replies = Reply(WORDS, delay=0.01)
    caller = Caller(make_app(pace_seconds=0.05))
    caller.run("critic", "tutor")
    critic, tutor = caller.wait(30)[1:]
    assert (critic["run"]["status"], critic["run"]["last_error"]["code"]) == ("failed", "server_error")
    assert (tutor["run"]["status"], text(tutor)) == ("completed", WORDS)


# The pacer


@pytest.fixture
def pacer() -> Iterator[Callable[[float], Pacer]]:
    made: list[Pacer] = []

    def make(seconds: float) -> Pacer:
        made.append(Pacer(seconds, lambda: None))
        return made[-1]

    yield make
    for one in made:
        one.close()


def waiting(pacer: Pacer, connection: socket.socket) -> threading.Thread:
    thread = threading.Thread(target=pacer.wait, args=[connection, queue.SimpleQueue()], daemon=True)
    thread.start()
    return thread


def test_who_waits_is_let_go_at_a_tick_at_which_there_is_something_to_read(
    pacer: Callable[[float], Pacer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_PATIENCE", 1000)
    one, (ours, theirs) = pacer(0.01), socket.socketpair()
    with ours, theirs:
        thread = waiting(one, ours)
        thread.join(0.2)
        assert thread.is_alive()
        theirs.send(b"x")
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("how", ["nothing comes for long", "the other end leaves", "the pacer is closed"])
def test_nobody_waits_for_ever(how: str, pacer: Callable[[float], Pacer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_PATIENCE", 0.05 if how == "nothing comes for long" else 1000)
    one, (ours, theirs) = pacer(0.01), socket.socketpair()
    with ours, theirs:
        thread = waiting(one, ours)
        time.sleep(0.03)
        if how == "the other end leaves":
            theirs.close()
        elif how == "the pacer is closed":
            one.close()
        thread.join(10)
        assert not thread.is_alive()


def test_a_connection_that_is_closed_already_is_not_waited_for(pacer: Callable[[float], Pacer]) -> None:
    connection = socket.socket()
    connection.close()
    pacer(1000).wait(connection, queue.SimpleQueue())
