"""The slots of a worker's answers: never more than the limit, nobody forgotten, callers in turn."""

from __future__ import annotations

import random

import openai

from assistream_flask.runs.run_slots import RunSlots, Ticket
from assistream_flask.store.sql import Owner
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, examples, text, wait_until


def owner(name: str) -> Owner:
    return Owner("test", name)


def test_who_has_many_waiting_has_as_many_turns_as_who_has_one() -> None:
    slots = RunSlots(1)
    first = slots.ask(owner("many"))
    many = [slots.ask(owner("many")) for _ in range(3)]
    one, other = slots.ask(owner("one")), slots.ask(owner("other"))
    order: list[Ticket] = []
    held = (owner("many"), first)
    by = {
        id(ticket): name for name, tickets in (("many", many), ("one", [one]), ("other", [other])) for ticket in tickets
    }
    for _ in range(5):
        slots.give_back(*held)
        (new,) = [ticket for ticket in (*many, one, other) if ticket.has_slot.is_set() and ticket not in order]
        order.append(new)
        held = (owner(by[id(new)]), new)
    assert [by[id(ticket)] for ticket in order] == ["many", "one", "other", "many", "many"]


def test_never_more_than_the_limit_have_a_slot_and_all_who_wait_get_one() -> None:
    choose = random.Random("slots")
    for _ in range(examples(500)):
        limit = choose.randrange(1, 5)
        slots, out = RunSlots(limit), list[tuple[Owner, Ticket]]()
        for _ in range(choose.randrange(1, 40)):
            if out and choose.random() < 0.45:
                slots.give_back(*out.pop(choose.randrange(len(out))))
            else:
                who = owner(choose.choice("abc"))
                out.append((who, slots.ask(who)))
            having = sum(ticket.has_slot.is_set() for _, ticket in out)
            assert having == min(limit, len(out))
        while out:
            out.sort(key=lambda one: not one[1].has_slot.is_set())
            assert out[0][1].has_slot.is_set()
            slots.give_back(*out.pop(0))


def test_a_run_that_finds_no_slot_waits_queued_and_is_answered(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one two three", delay=0.1)
    caller = Caller(make_app(worker_runs=1))
    caller.run("critic", "tutor")
    wait_until(lambda: any(entry["run"]["status"] == "in_progress" for entry in caller.entries()[1:]))
    assert sorted(entry["run"]["status"] for entry in caller.entries()[1:]) == ["in_progress", "queued"]
    assert [text(entry) for entry in caller.wait(20)[1:]] == ["one two three"] * 2


def test_a_run_that_waits_for_a_slot_can_be_cancelled(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one", first_delay=600)
    app = make_app(worker_runs=1)
    caller = Caller(app)
    (busy,) = caller.run("tutor")
    wait_until(lambda: caller.entry(busy)["run"]["status"] == "in_progress")
    other = Caller(app)
    (waiting,) = other.run("tutor")
    other.cancel(waiting)
    wait_until(lambda: other.entry(waiting)["run"]["status"] == "cancelled")
    assert caller.entry(busy)["run"]["status"] == "in_progress"
    caller.cancel(busy)
    server.replies = "two"
    caller.run("tutor")
    assert text(caller.wait(20)[-1]) == "two"


def test_a_client_without_a_free_connection_is_no_silent_server(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("one two three four five six", delay=0.15)
    http = openai.DefaultHttpxClient(limits=openai.DEFAULT_CONNECTION_LIMITS.__class__(max_connections=1))
    with openai.OpenAI(api_key="none", base_url=server.base_url, http_client=http) as client:
        caller = Caller(make_app(client=client, stall_seconds=0.4))
        caller.run("critic", "tutor")
        found = caller.wait(30)[1:]
    assert [(entry["run"]["status"], entry["run"]["last_error"]) for entry in found] == [("completed", None)] * 2
