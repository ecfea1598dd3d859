"""The contract of the store of tool calls, for every database in ``DATABASES``."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from assistream_flask import events
from assistream_flask.events import Json
from assistream_flask.store import tables
from assistream_flask.store.rows import LAPSED, RELEASED, LeasedRun, State
from assistream_flask.store.sql import ThreadStore, TooManyRunsError
from assistream_flask.store.thread_change import (
    NOT_EXECUTED,
    NOT_KNOWN,
    UNANSWERED,
    StoredCall,
    ThreadChange,
    items_of,
)
from assistream_flask.store.tool_calls import ToolCallStore
from assistream_flask.types import Message, Run
from tests.conftest import at_once
from tests.contract.test_store import (
    DATABASES,
    LASTING,
    ME,
    entries,
    new_thread,
    new_url,
    over,
    pair,
    seen,
    start,
    user,
)

T = TypeVar("T")
WORKER = "w1"
ANY = events.run("", "", None)
"""Stands for the run that a call will be of."""
STEP = events.tool_calls_step(ANY, 0)


@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest) -> Iterator[ThreadStore]:
    store = ThreadStore(new_url(request))
    yield store
    store.close()


@pytest.fixture(params=LASTING)
def stores(request: pytest.FixtureRequest) -> Iterator[list[ThreadStore]]:
    """Give those of two workers."""
    url = new_url(request)
    stores = [ThreadStore(url) for _ in range(2)]
    yield stores
    for one in stores:
        one.close()


@pytest.fixture
def calls(store: ThreadStore) -> ToolCallStore:
    return ToolCallStore(store)


def state(run: Run, message: Message, claim: int = 0) -> State:
    return run, message, [STEP], "0a-1", None, claim


def call(run: Run, number: int, status: str = "pending", **more: Any) -> StoredCall:
    own = {"round": 1, "step_id": "step_1", "name": "add", "kind": "server", "arguments": '{"a": 1}', **more}
    return StoredCall(run_id=run["id"], call_id=f"call_{number}", number=number, status=status, **own)


def asked(number: int, arguments: str = '{"a": 1}') -> Json:
    return {"type": "function_call", "call_id": f"call_{number}", "name": "add", "arguments": arguments}


def answered(number: int, output: str) -> Json:
    return {"type": "function_call_output", "call_id": f"call_{number}", "output": output}


def words(text: str) -> Json:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def waits(run: Run) -> Run:
    return {**run, "status": "requires_action"}


def stored_items(store: ThreadStore, run_ids: list[str]) -> dict[str, list[tuple[int, Json]]]:
    with store.read() as connection:
        return items_of(connection, run_ids)


def begin(store: ThreadStore, thread_id: str, *made: StoredCall | str, **more: Any) -> tuple[Run, Message]:
    """Give a run with one round of calls, as their statuses say or as they are."""
    run, message = start(store, thread_id, **more)
    rows = [call(run, n, one) if isinstance(one, str) else one._replace(run_id=run["id"]) for n, one in enumerate(made)]
    items = [asked(row.number, row.arguments) for row in rows]
    assert ToolCallStore(store).begin_round(WORKER, state(run, message), {"round": 1}, items, rows)
    return run, message


def park(store: ThreadStore, run: Run, message: Message, seconds: float = 3600) -> None:
    assert ToolCallStore(store).park(WORKER, state(waits(run), message), {"round": 1}, seconds)


def statuses(calls: ToolCallStore, run: Run) -> list[str]:
    return [one.status for one in calls.of_run(run["id"])]


def lapse(store: ThreadStore, run: Run) -> None:
    with store.write() as connection:
        connection.execute(tables.runs.update().where(tables.runs.c.id == run["id"]).values(lease=5.0))


def take(store: ThreadStore, run: Run, worker: str = "w2") -> LeasedRun:
    lapse(store, run)
    taken = store.claim(seen(store, run), worker, 3600)
    assert taken is not None
    return taken


# Rounds


def test_a_round_is_stored_with_its_run_its_items_and_its_calls(store: ThreadStore, calls: ToolCallStore) -> None:
    run, message = start(store, new_thread(store)["id"])
    run["status"] = "in_progress"
    first = [call(run, 0, needs="approval", decision={"approve": True}), call(run, 1)]
    assert calls.begin_round(WORKER, state(run, message), {"round": 1}, [words("Hm."), asked(0), asked(1)], first)
    second = [call(run, 2, round=2)]
    assert calls.begin_round(WORKER, state(run, message), {"round": 2, "more": "é"}, [asked(2)], second)
    assert calls.of_run(run["id"]) == first + second
    assert stored_items(store, [run["id"], "run_unknown"]) == {
        run["id"]: [(1, words("Hm.")), (1, asked(0)), (1, asked(1)), (2, asked(2))]
    }
    [held] = store.held()
    assert (held.run, held.loop) == (run, {"round": 2, "more": "é"})
    assert calls.save_loop(WORKER, state(run, message), {"round": 2, "is_done": True})
    [held] = store.held()
    assert held.loop == {"round": 2, "is_done": True}
    # What knows nothing of loops leaves it as it is.
    assert store.save(WORKER, run, message, [], None)
    assert store.held()[0].loop == held.loop


def test_of_a_run_that_is_not_the_workers_nothing_is_stored(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    done = start(store, thread_id)
    store.save(WORKER, *over(*done), [], None)
    refused: list[tuple[str, State]] = [
        ("w2", state(run, message)),
        (WORKER, state(run, message, claim=1)),
        (WORKER, state(*done)),
        (WORKER, state(*pair(thread_id))),
    ]
    for worker, one in refused:
        assert not calls.begin_round(worker, one, {"round": 1}, [asked(0)], [call(one[0], 0)])
        assert not calls.save_loop(worker, one, {"round": 1})
        assert not calls.park(worker, one, {"round": 1}, 60)
        assert (calls.of_run(one[0]["id"]), stored_items(store, [one[0]["id"]])) == ([], {})
    assert [held.loop for held in store.held()] == [None]


def test_a_round_that_is_stored_twice_is_there_once(store: ThreadStore, calls: ToolCallStore) -> None:
    # Whoever got no answer to the COMMIT stores it again.
    run, message = begin(store, new_thread(store)["id"], "completed")
    for _ in range(2):
        assert calls.begin_round(
            WORKER, state(run, message), {"round": 2}, [asked(1), words("Hm.")], [call(run, 1, round=2)]
        )
    assert [one.call_id for one in calls.of_run(run["id"])] == ["call_0", "call_1"]
    assert stored_items(store, [run["id"]])[run["id"]] == [(1, asked(0)), (2, asked(1)), (2, words("Hm."))]


def test_a_round_that_cannot_be_stored_leaves_the_run_as_it_was(store: ThreadStore, calls: ToolCallStore) -> None:
    run, message = begin(store, new_thread(store)["id"], "completed")
    # The second has the id of a call of the first round.
    with pytest.raises(sa.exc.IntegrityError):
        calls.begin_round(
            WORKER, state(run, message), {"round": 2}, [asked(1)], [call(run, 1, round=2), call(run, 0, round=2)]
        )
    assert [held.loop for held in store.held()] == [{"round": 1}]
    assert stored_items(store, [run["id"]])[run["id"]] == [(1, asked(0))]


# Execution


def test_a_call_is_claimed_once_by_the_worker_that_has_its_run(store: ThreadStore, calls: ToolCallStore) -> None:
    run, message = begin(store, new_thread(store)["id"], "pending", "requires_action", "completed")
    run_id, now = run["id"], events.now()
    assert not calls.claim("w2", 0, run_id, "call_0")
    assert not calls.claim(WORKER, 1, run_id, "call_0")
    assert not calls.claim(WORKER, 0, "run_unknown", "call_0")
    assert not calls.claim(WORKER, 0, run_id, "call_unknown")
    assert calls.claim(WORKER, 0, run_id, "call_0")
    assert not calls.claim(WORKER, 0, run_id, "call_0")
    for other in ("call_1", "call_2"):
        assert not calls.claim(WORKER, 0, run_id, other)
        assert not calls.claim(WORKER, 0, run_id, other, again=True)
    claimed = calls.of_run(run_id)[0]
    assert (claimed.status, claimed.number, claimed.completed_at) == ("claimed", 0, None)
    assert claimed.started_at is not None
    assert now <= claimed.started_at <= now + 5
    # One that may be executed twice, after its worker died.
    taken = take(store, run)
    assert not calls.claim(WORKER, 0, run_id, "call_0", again=True)
    assert calls.claim("w2", taken.claim, run_id, "call_0", again=True)
    store.save("w2", *over(run, message), [], None, claim=taken.claim)
    assert not calls.claim("w2", taken.claim, run_id, "call_0", again=True)


def test_the_end_of_a_call_is_stored_once_by_the_worker_that_has_its_run(
    store: ThreadStore, calls: ToolCallStore
) -> None:
    run, _ = begin(store, new_thread(store)["id"], "pending", "claimed", "requires_action", "denied")
    run_id = run["id"]
    assert not calls.finish("w2", 0, run_id, "call_0", "completed", "2", None)
    assert not calls.finish(WORKER, 1, run_id, "call_0", "completed", "2", None)
    assert calls.finish(WORKER, 0, run_id, "call_0", "failed", "No such day.", "invalid_arguments")
    assert calls.finish(WORKER, 0, run_id, "call_1", "completed", "é\N{PILE OF POO}", None)
    for other in ("call_0", "call_1", "call_2", "call_3"):
        assert not calls.finish(WORKER, 0, run_id, other, "completed", "other", None)
    found = [(one.status, one.output, one.error, one.completed_at is None) for one in calls.of_run(run_id)]
    assert found == [
        ("failed", "No such day.", "invalid_arguments", False),
        ("completed", "é\N{PILE OF POO}", None, False),
        ("requires_action", None, None, True),
        ("denied", None, None, True),
    ]


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed", "cancelled", "expired"])
def test_with_a_run_its_calls_are_over(store: ThreadStore, calls: ToolCallStore, end: str) -> None:
    run, message = begin(store, new_thread(store)["id"], "requires_action", "pending", "claimed", "completed")
    assert store.save(WORKER, {**run, "status": "in_progress"}, message, [STEP], None)
    assert statuses(calls, run) == ["requires_action", "pending", "claimed", "completed"]
    assert store.save(WORKER, *over(run, message, end), [STEP], None)
    found = [(one.status, one.output, one.completed_at is None) for one in calls.of_run(run["id"])]
    assert found == [
        ("interrupted", UNANSWERED, False),
        ("interrupted", NOT_EXECUTED, False),
        ("interrupted", NOT_KNOWN, False),
        ("completed", None, True),
    ]


# Parked runs


def test_a_parked_run_is_nobodys_until_its_question_expires(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = begin(store, thread_id, "requires_action")
    park(store, run, message)
    assert not store.save(WORKER, run, message, [], None)
    store.renew(WORKER, [run["id"]], 3600)
    for which in (LAPSED, RELEASED, tables.runs.c.worker != "w2"):
        assert store.held(which) == []
    assert store.busy_before(thread_id, 1 << 62, None)
    with pytest.raises(TooManyRunsError):
        store.add(ME, thread_id, None, [pair(thread_id)], max_runs=1)
    lapse(store, run)
    [held] = store.held(LAPSED)
    assert (held.run, held.worker, held.loop) == (waits(run), "", {"round": 1})
    store.beat("w2", "host/2", is_shared=True)
    taken = store.claim(held, "w2", 3600)
    assert taken is not None
    assert (taken.worker, taken.claim) == ("w2", 1)
    assert store.claim(held, "w3", 3600) is None


def test_parked_runs_have_room_of_their_own_beside_those_that_go_on(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id, other = new_thread(store)["id"], new_thread(store)["id"]

    def refused(*, runs: int, parked: int) -> bool:
        """Show that one more is too many; tell whether parked ones are why."""
        with pytest.raises(TooManyRunsError) as error:
            store.add(ME, other, None, [pair(other)], max_runs=runs, max_parked=parked)
        return error.value.with_parked

    for _ in range(2):
        park(store, *begin(store, thread_id, "requires_action"))
    assert refused(runs=1, parked=1) is True
    assert refused(runs=0, parked=9) is False
    assert store.add(ME, other, None, [pair(other)], max_runs=1, max_parked=2) is not None
    # It is under way, and counts for the one limit; the other two for the other.
    assert refused(runs=1, parked=2) is False
    assert refused(runs=2, parked=0) is True
    # Room that parked ones leave is for nobody else, and what goes on again counts as all that does.
    assert refused(runs=1, parked=9) is False
    assert store.add(ME, other, None, [pair(other)], max_runs=2, max_parked=2) is not None


def test_a_run_that_is_to_be_cancelled_is_not_parked(store: ThreadStore, calls: ToolCallStore) -> None:
    run, message = begin(store, new_thread(store)["id"], "requires_action")
    store.request_cancel(run["id"])
    assert not calls.park(WORKER, state(waits(run), message), {"round": 1}, 60)
    assert store.to_cancel(WORKER, [run["id"]]) == [run["id"]]
    assert store.save(WORKER, *over(run, message, "cancelled"), [], None)


def test_parked_gives_the_threads_runs_that_wait_in_order_and_no_others(
    store: ThreadStore, calls: ToolCallStore
) -> None:
    thread_id, other = (new_thread(store)["id"] for _ in range(2))
    waiting = [begin(store, one, "requires_action") for one in (thread_id, thread_id, other)]
    started = start(store, thread_id)[0]
    store.save(WORKER, waits(started), pair(thread_id)[1], [], None)
    for one in waiting:
        park(store, *one)
    first, second, _ = (run["id"] for run, _ in waiting)
    with calls.changing(thread_id) as change:
        assert change is not None
        assert [held.run["id"] for held in change.parked()] == [first, second]
        assert [held.run["id"] for held in change.parked(second)] == [second]
        assert change.parked(waiting[2][0]["id"]) == change.parked(started["id"]) == []
        assert [one.run_id for one in change.calls(first)] == [first]
        change.save(*over(*waiting[2], "cancelled"), [], worker="", lease=0)
    assert [calls.has_parked(one) for one in (thread_id, other)] == [True, False]
    store.delete_thread(thread_id)
    with calls.changing(thread_id) as change:
        assert change is None


def test_an_answer_is_stored_with_the_run_that_goes_on(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    asks, waits_for = (call(ANY, n, "requires_action", needs=needs) for n, needs in enumerate(("approval", "output")))
    run, message = begin(store, thread_id, asks, waits_for)
    park(store, run, message)
    with calls.changing(thread_id) as change:
        assert change is not None
        [held] = change.parked(run["id"])
        first, second = change.calls(run["id"])
        approved = first._replace(
            status="pending", arguments='{"a": 2}', decision={"approve": True}, remember=True, name="ignored"
        )
        change.put(approved)
        again = change.save(held.run, held.message, held.steps, worker="", lease=60)
        assert (again.worker, again.claim, again.run) == ("", 1, waits(run))
    assert calls.of_run(run["id"]) == [approved._replace(name="add"), second]
    assert store.held(LAPSED) == []
    with calls.changing(thread_id) as change:
        assert change is not None
        [held] = change.parked()
        change.put(second._replace(status="completed", output="2026-01-01"))
        gone_on = change.save({**run, "status": "in_progress"}, held.message, held.steps, worker="w2", lease=60)
        assert (gone_on.worker, gone_on.claim) == ("w2", 2)
    assert [held.worker for held in store.held()] == ["w2"]
    assert calls.claim("w2", 2, run["id"], "call_0")
    assert calls.approved(thread_id) == {"add"}
    assert calls.approved(new_thread(store)["id"]) == set()


def test_a_run_that_is_answered_with_no_lease_is_anybodys(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = begin(store, thread_id, "requires_action")
    park(store, run, message)
    with calls.changing(thread_id) as change:
        assert change is not None
        change.save({**run, "status": "queued"}, message, [], worker="", lease=0)
    [held] = store.held(RELEASED)
    assert store.claim(held, "w2", 3600) is not None


def test_what_fails_in_a_change_leaves_all_as_it_was(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = begin(store, thread_id, "requires_action")
    park(store, run, message)
    before = calls.of_run(run["id"])

    def answer(twice: bool) -> None:
        with calls.changing(thread_id) as change:
            assert change is not None
            change.put(before[0]._replace(status="completed", output="2"))
            for _ in range(1 + twice):
                change.save({**run, "status": "in_progress"}, message, [], worker="w2", lease=60)
            if not twice:
                raise KeyError("the power went")

    with pytest.raises(KeyError):
        answer(twice=False)
    with pytest.raises(RuntimeError, match="not parked"):
        answer(twice=True)
    assert calls.of_run(run["id"]) == before
    with calls.changing(thread_id) as change:
        assert change is not None
        assert [held.claim for held in change.parked()] == [0]


def test_a_page_holds_a_call_until_its_time_is_over(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    asked_for = (("requires_action", "output"), ("requires_action", "approval"), ("completed", "output"))
    run, _ = begin(store, thread_id, *(call(ANY, n, one, needs=needs) for n, (one, needs) in enumerate(asked_for)))

    def hold(call_id: str, page: str, seconds: float = 60) -> float | None:
        with calls.changing(thread_id) as change:
            assert change is not None
            return change.hold(run["id"], call_id, page, seconds)

    until = hold("call_0", "page 1")
    assert until is not None
    assert store.now() < until < store.now() + 61
    assert hold("call_0", "page 2") is None
    longer = hold("call_0", "page 1", 120)
    assert longer is not None
    assert longer > until
    assert hold("call_0", "page 1", -1) is not None
    assert hold("call_0", "page 2") is not None
    assert hold("call_0", "page 1") is None
    assert hold("call_1", "page 1") is hold("call_2", "page 1") is hold("call_9", "page 1") is None


def test_a_new_message_closes_the_question_in_one_transaction_with_it(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = begin(store, thread_id, "requires_action", "completed")
    park(store, run, message)

    def close(change: ThreadChange) -> None:
        for held in change.parked():
            ended, cut = over(held.run, held.message, "cancelled")
            saved = change.save(ended, cut, held.steps, worker="", lease=0)
            assert saved.run["status"] == "cancelled"

    many = [pair(thread_id) for _ in range(2)]
    with pytest.raises(TooManyRunsError):
        store.add(ME, thread_id, user(thread_id), many, max_runs=1, change=close)
    assert statuses(calls, run) == ["requires_action", "completed"]
    # Its place is free by then.
    assert store.add(ME, thread_id, user(thread_id), many[:1], max_runs=1, change=close) == 2
    assert statuses(calls, run) == ["interrupted", "completed"]
    assert [one["run"] and one["run"]["status"] for one in entries(store, thread_id)] == ["cancelled", None, "queued"]


# What is resent


def test_each_call_is_resent_with_an_output_behind_the_items_of_its_round(
    store: ThreadStore, calls: ToolCallStore
) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    by_status = ("completed", "denied", "pending", "claimed", "requires_action", "interrupted")
    outputs = {"completed": "2", "denied": "The user did not allow it."}
    rows = [call(run, n, status, output=outputs.get(status)) for n, status in enumerate(by_status)]
    rows[0] = rows[0]._replace(arguments='{"a": 2}')
    reasoning = {"type": "reasoning", "id": "rs_1", "encrypted_content": "x", "summary": []}
    # The last is of a call that was stored nowhere.
    said = [reasoning, asked(0), words("Hm."), *map(asked, range(1, 7))]
    assert calls.begin_round(WORKER, state(run, message), {"round": 1}, said, rows)
    second = call(run, 7, "completed", round=2, output="")
    assert calls.begin_round(WORKER, state(run, message), {"round": 2}, [asked(7)], [second])
    assert calls.begin_round(WORKER, state(run, message), {"round": 3}, [words("Done.")], [])
    expected = [
        reasoning, asked(0, '{"a": 2}'), words("Hm."), *map(asked, range(1, 7)),
        answered(0, "2"), answered(1, "The user did not allow it."), answered(2, NOT_EXECUTED), answered(3, NOT_KNOWN),
        answered(4, UNANSWERED), answered(5, NOT_KNOWN), answered(6, NOT_EXECUTED),
        asked(7), answered(7, ""),
        words("Done."),
    ]  # fmt: skip
    assert calls.said(run["id"]) == expected
    store.add(ME, thread_id, user(thread_id))
    [one, question] = store.history(start(store, thread_id, group_id="later")[1]["id"], 100_000, 1000)[0]
    assert (one.speaker, one.items, question.items) == ("tutor", expected, ())
    assert calls.said("run_unknown") == []


def test_items_are_told_of_the_newest_runs_and_no_more_than_the_limit(store: ThreadStore, calls: ToolCallStore) -> None:
    thread_id = new_thread(store)["id"]
    for n in range(40):
        run, message = start(store, thread_id)
        if n % 2:
            assert calls.begin_round(WORKER, state(run, message), {"round": 1}, [words(f"{n:0>100}")], [])
    asking = start(store, thread_id, group_id="later")[1]["id"]

    def with_items(characters: int, count: int = 1000) -> list[int]:
        found, _ = store.history(asking, characters, count)
        numbers = [int(one.items[0]["content"][0]["text"]) if one.items else -1 for one in found]
        return [n for n in numbers if n >= 0]

    assert with_items(100_000) == list(range(1, 40, 2))
    assert with_items(100_000, count=3) == [37, 39]
    size = len(events.dumps(words(f"{1:0>100}")))
    assert with_items(2 * size) == [37, 39]
    assert with_items(size - 1) == []


class Statements:
    """Counts the queries of a store."""

    def __init__(self, store: ThreadStore) -> None:
        self.count = 0
        with store.read() as connection:
            sa.event.listen(connection.engine, "before_cursor_execute", self._count)

    def _count(self, connection: object, cursor: object, statement: str, *_: object) -> None:
        self.count += statement.startswith("SELECT")


def test_a_history_without_items_costs_no_query_more(store: ThreadStore) -> None:
    statements, thread_id = Statements(store), new_thread(store)["id"]

    def cost(group_id: str) -> int:
        asking = start(store, thread_id, group_id=group_id)[1]["id"]
        before = statements.count
        store.history(asking, 100_000, 1000)
        return statements.count - before

    store.add(ME, thread_id, user(thread_id))
    assert cost("first") == 1
    assert [cost(group_id) for group_id in ("second", "third")] == [1, 1]


def test_questions_are_looked_for_in_a_thread_that_has_one_only(store: ThreadStore) -> None:
    changes: list[ThreadChange] = []
    thread_id = new_thread(store)["id"]
    store.add(ME, thread_id, user(thread_id), change=changes.append)
    run, message = start(store, thread_id)
    store.add(ME, thread_id, user(thread_id), change=changes.append)
    assert not changes
    park(store, run, message)
    store.add(ME, thread_id, user(thread_id), change=changes.append)
    assert len(changes) == 1


@pytest.mark.parametrize(
    ("query", "indices"),
    [
        (
            "SELECT 1 FROM assistream_items WHERE run_id = 'x'",
            "assistream_items_pkey|autoindex_assistream_items_1",
        ),
        ("DELETE FROM assistream_items WHERE thread_id = 'x'", "assistream_items_thread"),
    ],
)
def test_no_thread_is_looked_through_for_runs_with_items(store: ThreadStore, query: str, indices: str) -> None:
    with store.write() as connection:
        if connection.dialect.name == "postgresql":
            # The table is too small to be worth an index.
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            plan = connection.exec_driver_sql(f"EXPLAIN {query}")
        else:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}")
        assert re.search(indices, str(plan.all()))


# With the thread


def test_calls_and_items_go_with_their_thread_also_where_no_foreign_key_is_held(
    store: ThreadStore, calls: ToolCallStore
) -> None:
    kept, gone = (begin(store, new_thread(store)["id"], "pending", "completed")[0] for _ in range(2))
    with store.read() as connection:
        engine = connection.engine
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "checkout", lambda raw, *_: raw.execute("PRAGMA foreign_keys=OFF"))
    store.delete_thread(gone["thread_id"])
    with store.read() as connection:
        for table, count in ((tables.tool_calls, 2), (tables.items, 2)):
            assert connection.execute(sa.select(table.c.run_id)).scalars().all() == [kept["id"]] * count


def test_steps_that_an_older_release_stored_stand_before_all_text(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    step: Any = events.reasoning_step(run, 3)
    del step["content_index"]
    newer = events.reasoning_step(run, 2)
    store.save(WORKER, run, message, [step, newer], None)
    assert [one["content_index"] for one in entries(store, thread_id)[0]["steps"]] == [0, 2]
    assert [one["content_index"] for one in store.held()[0].steps] == [0, 2]


# Many at once


class Execution:
    """One worker's, of the calls of a run that another may take from it."""

    def __init__(self, store: ThreadStore, worker: str, executed: list[tuple[str, str]]) -> None:
        self.store, self.calls, self.worker, self.executed = store, ToolCallStore(store), worker, executed

    def execute(self, rows: Sequence[StoredCall], claim: int) -> None:
        for row in rows:
            if self.calls.claim(self.worker, claim, row.run_id, row.call_id):
                self.executed.append((row.run_id, row.call_id))
                self.calls.finish(self.worker, claim, row.run_id, row.call_id, "completed", self.worker, None)

    def take_over(self, run: Run, after: int) -> None:
        for _ in range(after):
            self.calls.of_run(run["id"])
        claim = take(self.store, run, self.worker).claim
        while left := [row for row in self.calls.of_run(run["id"]) if row.status in ("pending", "claimed")]:
            for row in left:
                if row.status == "claimed":
                    self.calls.finish(self.worker, claim, run["id"], row.call_id, "interrupted", NOT_KNOWN, None)
            self.execute([row for row in left if row.status == "pending"], claim)


@pytest.mark.slow
def test_of_two_workers_of_whom_one_takes_the_others_run_each_call_is_executed_by_one(
    stores: list[ThreadStore],
) -> None:
    executed: list[tuple[str, str]] = []
    last, next_ = (Execution(store, worker, executed) for store, worker in zip(stores, ("w1", "w2"), strict=True))
    chance, outputs = random.Random(7), Counter[str | None]()
    thread_id = new_thread(stores[0])["id"]
    for _ in range(150):
        run, message = begin(stores[0], thread_id, *["pending"] * 8)
        rows = last.calls.of_run(run["id"])
        jobs: list[Callable[[], None]] = [
            partial(last.execute, chance.sample(rows, len(rows)), 0),
            partial(last.execute, chance.sample(rows, len(rows)), 0),
            partial(next_.take_over, run, chance.randrange(6)),
        ]
        assert at_once(3, call_of(jobs)) == [None] * 3
        ended = last.calls.of_run(run["id"])
        assert {row.status for row in ended} <= {"completed", "interrupted"}
        outputs.update(row.output for row in ended)
        assert stores[1].save("w2", *over(run, message), [], None, claim=1)
    assert len(executed) == len(set(executed)) == 150 * 8
    # Else they were not at it together.
    assert outputs["w1"]
    assert outputs["w2"]


def call_of(jobs: Sequence[Callable[[], T]]) -> Callable[[int], T]:
    return lambda n: jobs[n]()


def answer(store: ThreadStore, run: Run, message: Message, number: int, output: str) -> str:
    with ToolCallStore(store).changing(run["thread_id"]) as change:
        assert change is not None
        if not change.parked(run["id"]):
            return "late"
        rows = change.calls(run["id"])
        if rows[number].status != "requires_action":
            return "answered before"
        rows[number] = rows[number]._replace(status="completed", output=output)
        change.put(rows[number])
        if any(row.status == "requires_action" for row in rows):
            change.save(waits(run), message, [], worker="", lease=60)
            return "first"
        change.save({**run, "status": "in_progress"}, message, [], worker="w2", lease=60)
        return "last"


@pytest.mark.slow
def test_of_many_answers_to_a_question_one_is_stored_and_its_run_goes_on_once(stores: list[ThreadStore]) -> None:
    thread_id = new_thread(stores[0])["id"]
    for _ in range(20):
        run, message = begin(stores[0], thread_id, "requires_action", "requires_action")
        park(stores[0], run, message)
        jobs = [partial(answer, stores[n % 2], run, message, n // 2 % 2, str(n)) for n in range(10)]
        found = Counter(at_once(10, call_of(jobs)))
        assert (found["first"], found["last"], found.total()) == (1, 1, 10), found
        assert [held.claim for held in stores[0].held(tables.runs.c.id == run["id"])] == [2]


def expire(store: ThreadStore, read: LeasedRun) -> str:
    return "late" if store.claim(read, "w3", 60) is None else "expired"


@pytest.mark.slow
def test_a_question_that_expires_as_it_is_answered_is_the_ones_or_the_others(stores: list[ThreadStore]) -> None:
    thread_id = new_thread(stores[0])["id"]
    for n in range(60):
        run, message = begin(stores[0], thread_id, "requires_action")
        park(stores[0], run, message)
        lapse(stores[0], run)
        jobs = [partial(answer, stores[0], run, message, 0, "2"), partial(expire, stores[1], seen(stores[1], run))]
        found = at_once(2, call_of(jobs[:: 1 if n % 2 else -1]))
        assert sorted(found) in (["expired", "late"], ["last", "late"])


def go_on(store: ThreadStore, run: Run, message: Message) -> None:
    calls = ToolCallStore(store)
    calls.begin_round(WORKER, state(run, message), {"round": 2}, [asked(9)], [call(run, 9, round=2)])
    calls.claim(WORKER, 0, run["id"], "call_0")
    store.save(WORKER, *over(run, message), [], None)


@pytest.mark.slow
def test_a_thread_is_deleted_beside_workers_that_store_rounds_and_ends_in_it(stores: list[ThreadStore]) -> None:
    for _ in range(40):
        thread_id = new_thread(stores[0])["id"]
        going = [begin(stores[0], thread_id, "pending", "claimed") for _ in range(3)]
        jobs = [partial(go_on, stores[n % 2], *one) for n, one in enumerate(going)]
        assert at_once(4, call_of([*jobs, partial(stores[1].delete_thread, thread_id)])) == [None] * 4
    with stores[0].read() as connection:
        for table in (tables.tool_calls, tables.items, tables.runs, tables.messages):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 0
