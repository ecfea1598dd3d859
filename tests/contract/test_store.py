"""The store's contract, for every database in ``DATABASES``."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa

from assistream_flask import events
from assistream_flask.errors import ConfigurationError
from assistream_flask.events import Said, text_of, text_part
from assistream_flask.store import database, tables
from assistream_flask.store.sql import (
    LAPSED,
    RELEASED,
    AnsweredBefore,
    LeasedRun,
    Owner,
    State,
    StoredAnswer,
    ThreadStore,
    TooManyMessagesError,
    TooManyRunsError,
    TooManyThreadsError,
    thread_object,
)
from assistream_flask.types import ContentPart, Message, Run, Thread
from tests.conftest import at_once
from tests.postgres_server import PostgresServer

LASTING = ["sqlite file", pytest.param("postgresql", marks=pytest.mark.server)]
DATABASES = [*LASTING, "sqlite in memory"]
ME, OTHER, ELSEWHERE = Owner("blue", "me"), Owner("blue", "other"), Owner("green", "me")
FUTURE = time.time() + 3600


def new_url(request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.new_database()
    folder: Path = request.getfixturevalue("tmp_path")
    return f"sqlite:///{folder / 'threads.sqlite3'}" if request.param == "sqlite file" else "sqlite://"


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    return new_url(request)


@pytest.fixture(params=LASTING)
def lasting(request: pytest.FixtureRequest) -> str:
    """Give the URL of a database that more than one store can open."""
    return new_url(request)


@pytest.fixture
def store(url: str) -> Iterator[ThreadStore]:
    store = ThreadStore(url)
    yield store
    store.close()


def new_thread(store: ThreadStore, owner: Owner = ME, metadata: Any = None) -> Thread:
    thread = thread_object({"id": events.new_id("thread"), "created_at": events.now(), "metadata": metadata or {}})
    store.create_thread(owner, thread)
    return thread


def user(thread_id: str, text: str = "hi") -> Message:
    return events.message(thread_id, "user", [events.text_part(text)])


def pair(thread_id: str, assistant_id: str = "tutor") -> tuple[Run, Message]:
    run = events.run(thread_id, assistant_id, "gpt")
    message = events.message(thread_id, "assistant", [], assistant_id=assistant_id, run_id=run["id"])
    run["message_id"] = message["id"]
    return run, message


def start(store: ThreadStore, thread_id: str, **more: Any) -> tuple[Run, Message]:
    run, message = pair(thread_id)
    arguments = {"worker": "w1", "lease": 3600, "group_id": "g", "event_id": "0a-0", **more}
    assert store.add(ME, thread_id, None, [(run, message)], **arguments) is not None
    return run, message


def entries(store: ThreadStore, thread_id: str) -> list[Any]:
    found = store.page(thread_id, 200) or ([], False)
    return [stored.entry for stored in found[0]]


def over(run: Run, message: Message, status: Any = "completed") -> tuple[Run, Message]:
    return {**run, "status": status, "completed_at": 5}, {**message, "status": "completed", "completed_at": 5}


# The database


def test_a_file_is_in_wal_mode_with_foreign_keys_on(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    store = ThreadStore(f"sqlite:///{path}")
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    store.close()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_file_and_those_beside_it_are_this_users_alone(tmp_path: Path) -> None:
    with contextlib.closing(ThreadStore(f"sqlite:///{tmp_path / 'a.sqlite3'}")) as store:
        new_thread(store)
        assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
            ("a.sqlite3", "a.sqlite3-shm", "a.sqlite3-wal"), 0o600
        )


def test_a_file_that_is_there_keeps_the_mode_that_the_operator_gave_it(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite3"
    file.touch()
    file.chmod(0o660)
    ThreadStore(f"sqlite:///{file}").close()
    assert mode(file) == 0o660


def test_the_schema_is_created_at_first_use_and_its_version_recorded_once(lasting: str) -> None:
    for _ in range(2):
        ThreadStore(lasting).close()
    store = ThreadStore(lasting)
    with store.read() as connection:
        assert connection.execute(sa.select(tables.schema)).all() == [(tables.VERSION,)]
    store.close()


def test_a_newer_schema_is_refused_with_what_to_do(lasting: str) -> None:
    store = ThreadStore(lasting)
    with store.write() as connection:
        connection.execute(tables.schema.update().values(version=tables.VERSION + 1))
    thread = new_thread(store)
    with pytest.raises(ConfigurationError, match="upgrade assistream"):
        ThreadStore(lasting)
    # A worker of the older release, which is running already, is not stopped.
    assert store.threads(ME, 10, None) == ([thread], False)
    store.close()


@pytest.mark.parametrize("bad", ["", "nonsense", "nosuch://x", "sqlite+nosuch://", "postgresql://host:port/x"])
def test_a_url_that_cannot_work_is_refused_with_what_to_do(bad: str) -> None:
    for use in (ThreadStore, database.check):
        with pytest.raises(ConfigurationError, match="ASSISTREAM_DATABASE_URL"):
            use(bad)


@pytest.mark.parametrize("use", [ThreadStore, database.check])
@pytest.mark.parametrize("name", ["mysql", "mysql+pymysql", "mariadb", "mariadb+pymysql", "oracle", "mssql+pyodbc"])
def test_a_database_of_another_kind_is_refused_with_those_that_there_are(
    name: str, use: Callable[[str], object]
) -> None:
    kind = name.partition("+")[0]
    says = f"names a {kind} database, and threads are kept in SQLite or PostgreSQL only: give sqlite:///.* or postgresql://"
    with pytest.raises(ConfigurationError, match=says) as error:
        use(f"{name}://user:pa55@host/database")
    assert "pa55" not in str(error.value)


@pytest.mark.parametrize("use", [ThreadStore, database.check])
@pytest.mark.parametrize("name", ["sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg_async"])
def test_a_driver_for_asyncio_is_refused_with_what_to_give(name: str, use: Callable[[str], object]) -> None:
    backend, _, driver = name.partition("+")
    with pytest.raises(ConfigurationError, match=f"the driver {driver}, which is for asyncio: give {backend}://"):
        use(f"{name}://host/database")


def test_stores_that_open_a_new_database_at_once_agree_on_its_schema(lasting: str) -> None:
    stores = at_once(8, lambda _: ThreadStore(lasting))
    assert [store for store in stores if not isinstance(store, ThreadStore)] == []
    for store in stores:
        assert isinstance(store, ThreadStore)
        store.close()


def test_what_was_stored_is_there_after_a_restart(lasting: str) -> None:
    store = ThreadStore(lasting)
    thread = new_thread(store)
    message = user(thread["id"], "é\u2028\n\0😀")
    store.add(ME, thread["id"], message)
    store.close()
    store = ThreadStore(lasting)
    assert entries(store, thread["id"]) == [events.entry(message)]
    store.close()


# Threads


def test_a_thread_comes_back_as_it_went_in(store: ThreadStore) -> None:
    thread = new_thread(store, metadata={"k": ["é", None, 1.5]})
    assert store.threads(ME, 10, None) == ([thread], False)


def test_a_thread_is_its_owners_and_nobody_elses(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    assert store.owns(ME, thread_id)
    for someone in (OTHER, ELSEWHERE, Owner("green", "other"), Owner("", "")):
        assert not store.owns(someone, thread_id)
        assert store.threads(someone, 10, None) == ([], False)
        assert store.threads(someone, 10, thread_id) is None
    assert not store.owns(ME, "thread_unknown")


def test_threads_are_paged_newest_first(store: ThreadStore) -> None:
    made = [new_thread(store) for _ in range(5)][::-1]
    new_thread(store, OTHER)
    assert store.threads(ME, 5, None) == (made, False)
    assert store.threads(ME, 2, None) == (made[:2], True)
    assert store.threads(ME, 2, made[1]["id"]) == (made[2:4], True)
    assert store.threads(ME, 2, made[3]["id"]) == (made[4:], False)
    assert store.threads(ME, 2, made[4]["id"]) == ([], False)
    assert store.threads(ME, 2, "thread_unknown") is None


def test_deleting_a_thread_deletes_all_that_is_in_it_and_nothing_else(store: ThreadStore) -> None:
    keep, gone = new_thread(store)["id"], new_thread(store)["id"]
    for thread_id in (keep, gone):
        store.add(ME, thread_id, user(thread_id), [pair(thread_id)], worker="w", lease=3600)
    store.delete_thread(gone)
    assert not store.owns(ME, gone)
    assert entries(store, gone) == []
    assert len(entries(store, keep)) == 2
    assert [held.run["thread_id"] for held in store.held()] == [keep]
    store.delete_thread(gone)


def test_no_stored_answer_says_what_a_deleted_threads_words_were(store: ThreadStore) -> None:
    title = {"title": "Nobody may read this"}
    thread = thread_object({"id": events.new_id("thread"), "created_at": events.now(), "metadata": title})
    store.create_thread(ME, thread, StoredAnswer("made", "print", 201, thread, thread_id=thread["id"]))
    said = user(thread["id"], "Nor this")
    store.add(ME, thread["id"], said, answer=StoredAnswer("said", "print", 201, said, thread_id=thread["id"]))
    other = new_thread(store, metadata=title)
    store.remember(ME, StoredAnswer("other", "print", 201, other, thread_id=other["id"]))
    store.delete_thread(thread["id"])
    # The creation's key is not to create it once more.
    assert store.answer(ME, "made") == StoredAnswer("made", "print", 201, {**thread, "metadata": {}})
    assert store.answer(ME, "said") is None
    kept = store.answer(ME, "other")
    assert kept is not None
    assert kept.body == other


def test_the_database_itself_deletes_what_hangs_on_a_thread(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    store.add(ME, thread_id, user(thread_id), [pair(thread_id)])
    with store.write() as connection:
        connection.execute(tables.threads.delete())
    with store.read() as connection:
        for table in (tables.messages, tables.runs):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar() == 0


def test_the_number_of_a_deleted_thread_is_not_used_again(store: ThreadStore) -> None:
    first = new_thread(store)["id"]
    store.delete_thread(first)
    second = new_thread(store)["id"]
    with store.read() as connection:
        assert connection.execute(sa.select(tables.threads.c.number)).scalar_one() == 2
    assert store.owns(ME, second)


# Messages and runs


def test_entries_come_back_as_they_went_in_in_their_order(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    message, pairs = user(thread_id), [pair(thread_id, name) for name in ("b", "a", "c")]
    assert store.add(ME, thread_id, message, pairs) == 1
    later = user(thread_id)
    assert store.add(ME, thread_id, later) == 5
    expected = [events.entry(message), *(events.entry(reply, run) for run, reply in pairs), events.entry(later)]
    assert entries(store, thread_id) == expected
    for run, _ in pairs:
        assert store.run(thread_id, run["id"]) == run


def test_a_run_is_found_in_its_own_thread_only(store: ThreadStore) -> None:
    one, two = new_thread(store)["id"], new_thread(store)["id"]
    run, _ = start(store, one)
    assert store.run(one, run["id"]) is not None
    assert store.run(two, run["id"]) is None
    assert store.run(one, "run_unknown") is None


def test_nothing_is_added_to_a_thread_that_is_gone(store: ThreadStore) -> None:
    answer = StoredAnswer("key", "print", 201, {})
    assert store.add(ME, "thread_unknown", user("thread_unknown"), answer=answer) is None
    assert store.page("thread_unknown", 10) is None
    assert store.answer(ME, "key") is None


def test_a_page_is_the_newest_in_order_and_before_goes_back(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    ids = []
    for _ in range(5):
        message = user(thread_id)
        ids.append(message["id"])
        store.add(ME, thread_id, message)

    def page(limit: int, before: str | None = None) -> tuple[list[str], bool]:
        found = store.page(thread_id, limit, before)
        assert found is not None
        return [one.entry["message"]["id"] for one in found[0]], found[1]

    assert page(5) == (ids, False)
    assert page(2) == (ids[3:], True)
    assert page(2, ids[3]) == (ids[1:3], True)
    assert page(2, ids[1]) == (ids[:1], False)
    assert page(2, ids[0]) == ([], False)
    other = new_thread(store)["id"]
    assert store.page(other, 2, ids[1]) is None
    assert store.page(thread_id, 2, "msg_unknown") is None


def test_a_page_has_no_more_than_its_bytes_but_for_the_newest_and_says_that_there_are_older_ones(
    store: ThreadStore,
) -> None:
    thread_id, texts = new_thread(store)["id"], list[str]()
    for number in range(6):
        texts.append(f"{number}" + "x" * 1000)
        store.add(ME, thread_id, user(thread_id, texts[-1]))
    run, message = start(store, thread_id)
    step = events.reasoning_step(run, 0)
    step["step_details"] = {"type": "reasoning", "reasoning": {"text": "y" * 5000}}
    assert store.save("w1", run, message, [step], "0a-7")

    def page(most: int, limit: int = 200, before: str | None = None) -> tuple[list[str], bool]:
        found = store.page(thread_id, limit, before, most)
        assert found is not None
        return [text_of(one.entry["message"]["content"]) for one in found[0]], found[1]

    assert page(100_000) == ([*texts, ""], False)
    # What a model thought is on the page too.
    assert page(5000) == ([""], True)
    assert page(1) == ([""], True)
    assert page(7000) == ([texts[5], ""], True)
    newest = message["id"]
    assert page(3500, before=newest) == (texts[3:], True)
    assert page(3500, 2, before=newest) == (texts[4:], True)
    assert page(7000, before=newest) == (texts, False)
    assert page(7000, 6, before=newest) == (texts, False)
    # Whoever goes back by them has all of it, each once.
    back, before, more = list[str](), None, True
    while more:
        found = store.page(thread_id, 200, before, 2500)
        assert found is not None
        entries, more = found
        back = [text_of(one.entry["message"]["content"]) for one in entries] + back
        before = entries[0].entry["message"]["id"]
    assert back == [*texts, ""]


def test_what_a_page_leaves_out_is_not_read(store: ThreadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    thread_id = new_thread(store)["id"]
    for _ in range(20):
        store.add(ME, thread_id, user(thread_id, "x" * 1000))
    every, read = sa.CursorResult.all, list[int]()

    def counted(result: sa.CursorResult[Any]) -> Any:
        rows = every(result)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(sa.CursorResult, "all", counted)
    page = store.page(thread_id, 200, None, 2500)
    assert page is not None
    assert len(page[0]) == 2
    assert read == [2]


def test_a_page_tells_the_place_of_what_grows_and_of_nothing_else(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    store.add(ME, thread_id, user(thread_id))
    run, message = start(store, thread_id, event_id="0a-4")
    done_run, done_message = start(store, thread_id, event_id="0a-5")
    assert store.save("w1", *over(done_run, done_message), [], "0a-9")
    found = store.page(thread_id, 10)
    assert found is not None
    assert [one.event_id for one in found[0]] == [None, "0a-4", None]
    assert store.save("w1", run, message, [], "0a-7")
    found = store.page(thread_id, 10)
    assert found is not None
    assert found[0][1].event_id == "0a-7"


def said(message: Message) -> Said:
    return Said(message["assistant_id"], text_of(message["content"]), message["status"] == "completed")


def test_history_is_what_stands_before_a_message_in_its_thread(store: ThreadStore) -> None:
    thread_id, other = new_thread(store)["id"], new_thread(store)["id"]
    store.add(ME, other, user(other))
    message, (first, second, third, fourth) = user(thread_id), [pair(thread_id, one) for one in "abcd"]
    store.add(ME, thread_id, message, [first, second], mode="sequential", group_id="one")
    store.add(ME, thread_id, user(thread_id))

    def seen(one: tuple[Run, Message]) -> list[Said]:
        return store.history(one[1]["id"], 1000, 1000)[0]

    assert seen(first) == [said(message)]
    assert seen(second) == [said(message), said(first[1])]
    store.add(ME, thread_id, None, [third, fourth], mode="parallel", group_id="two")
    assert said(third[1]) not in seen(fourth)
    assert said(second[1]) in seen(fourth)
    assert store.history("msg_unknown", 1000, 1000) == ([], False)


@pytest.mark.parametrize("many", [1, 20, 300])
def test_history_is_read_from_its_end_and_no_further_than_its_limit(store: ThreadStore, many: int) -> None:
    thread_id = new_thread(store)["id"]
    texts = [f"{number:03}" for number in range(many)]
    for text in texts:
        store.add(ME, thread_id, {**user(thread_id), "content": [text_part(text)]})
    asked = pair(thread_id, "a")
    store.add(ME, thread_id, None, [asked], group_id="one")
    for characters, count in ((10_000, 1000), (1, 1000), (30, 1000), (150, 1000), (10_000, 1), (10_000, 17), (0, 1)):
        found, is_cut = store.history(asked[1]["id"], characters, count)
        assert [one.text for one in found] == texts[many - len(found) :]
        assert is_cut == (len(found) < many)
        # The one that passes the limit is there too: whoever shortens it knows best.
        assert len(found) == min(many, count, characters // 3 + 1)


def test_save_stores_run_message_and_steps(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    step = events.reasoning_step(run, 0)
    run = {**run, "status": "in_progress", "started_at": 7, "usage": cast(Any, {"total_tokens": 3})}
    message = {**message, "content": [events.text_part("é")]}
    assert store.save("w1", run, message, [step], "0a-3")
    assert entries(store, thread_id) == [events.entry(message, run, [step])]


@pytest.mark.parametrize("status", sorted(events.TERMINAL))
def test_save_changes_nothing_of_a_run_that_is_over(store: ThreadStore, status: str) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    final = over(run, message, status)
    assert store.save("w1", *final, [], None)
    assert not store.save("w1", run, {**message, "content": [events.text_part("late")]}, [], None)
    assert entries(store, thread_id) == [events.entry(final[1], final[0])]


def test_what_has_grown_is_stored_at_once_of_those_runs_that_are_the_workers_and_not_over(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    mine, also, theirs, ended = (start(store, thread_id, worker=name) for name in ("w1", "w1", "w2", "w1"))
    gone = start(store, other := new_thread(store)["id"])
    store.delete_thread(other)
    store.save("w1", *over(*ended), [], "0a-1")
    grown: list[ContentPart] = [events.text_part("grown")]
    step, state = events.reasoning_step(mine[0], 0), {"response_id": "resp_1"}
    states: list[State] = [
        (run, {**message, "content": grown}, [step], "0a-3", state, 0) for run, message in (mine, also, theirs, gone)
    ]
    states.append((*over(*ended)[:1], {**ended[1], "content": grown}, [], "0a-3", None, 0))
    assert store.save_grown("w1", states) == {mine[0]["id"], also[0]["id"]}
    assert store.save_grown("w1", states[2:]) == set()
    assert store.save_grown("w1", []) == set()
    found, _ = store.page(thread_id, 200) or ([], False)
    stored = {one.entry["run"]["id"]: one for one in found if one.entry["run"]}
    for run, _ in (mine, also):
        entry, event_id = stored[run["id"]]
        assert (entry["message"]["content"], entry["steps"], event_id) == (grown, [step], "0a-3")
    for run, _ in (theirs, ended):
        assert stored[run["id"]].entry["message"]["content"] == []
    held = {one.run["id"]: one.upstream for one in store.held()}
    assert held == {mine[0]["id"]: state, also[0]["id"]: state, theirs[0]["id"]: None}


def test_save_changes_nothing_of_another_workers_run_or_a_deleted_one(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    changed: Message = {**message, "content": [events.text_part("late")]}
    assert not store.save("w2", run, changed, [], None)
    assert entries(store, thread_id) == [events.entry(message, run)]
    store.delete_thread(thread_id)
    assert not store.save("w1", run, changed, [], None)
    assert entries(store, thread_id) == []


def test_adds_at_once_get_positions_without_gap_or_doubling(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]

    def add(_: int) -> int | None:
        position = None
        for _ in range(10):
            position = store.add(ME, thread_id, user(thread_id), [pair(thread_id)])
        return position

    assert all(isinstance(found, int) for found in at_once(8, add))
    with store.read() as connection:
        positions = connection.execute(sa.select(tables.messages.c.position).order_by(sa.text("1"))).scalars()
        assert list(positions) == list(range(1, 161))
    roles = [one["message"]["role"] for one in entries(store, thread_id)]
    assert roles == ["user", "assistant"] * 80


# Limits and idempotency


def test_the_limit_of_runs_counts_the_callers_runs_that_are_not_over(store: ThreadStore) -> None:
    one, two, others = new_thread(store)["id"], new_thread(store)["id"], new_thread(store, OTHER)["id"]
    store.add(OTHER, others, None, [pair(others), pair(others)], max_runs=2)
    run, message = start(store, one, max_runs=2)
    start(store, two, max_runs=2)
    refused = user(one)
    with pytest.raises(TooManyRunsError):
        store.add(ME, one, refused, [pair(one)], max_runs=2, answer=StoredAnswer("key", "print", 202, {}))
    assert store.answer(ME, "key") is None
    assert len(entries(store, one)) == 1
    assert store.add(ME, one, refused, max_runs=2) is not None
    store.save("w1", *over(run, message), [], None)
    start(store, one, max_runs=2)


def test_runs_asked_for_at_once_never_exceed_the_limit(store: ThreadStore) -> None:
    threads = [new_thread(store)["id"] for _ in range(8)]
    found = at_once(8, lambda at: store.add(ME, threads[at], None, [pair(threads[at])], max_runs=3))
    assert sorted(type(one).__name__ for one in found) == ["TooManyRunsError"] * 5 + ["int"] * 3
    assert len(store.held()) == 3


def test_the_limit_of_threads_counts_the_callers_own_and_a_deleted_one_makes_room(store: ThreadStore) -> None:
    def create(owner: Owner = ME, answer: StoredAnswer | None = None) -> str:
        thread = thread_object({"id": events.new_id("thread"), "created_at": 1, "metadata": {}})
        store.create_thread(owner, thread, answer, max_threads=2)
        return thread["id"]

    first, _ = create(), create()
    create(OTHER)
    with pytest.raises(TooManyThreadsError):
        create(ME, StoredAnswer("key", "print", 201, {}))
    assert store.answer(ME, "key") is None
    store.delete_thread(first)
    create(ME, StoredAnswer("key", "print", 201, {}))


def test_threads_made_at_once_never_exceed_the_limit(store: ThreadStore) -> None:
    made = [thread_object({"id": events.new_id("thread"), "created_at": 1, "metadata": {}}) for _ in range(8)]
    found = at_once(8, lambda at: store.create_thread(ME, made[at], max_threads=3))
    assert sorted(type(one).__name__ for one in found) == ["NoneType"] * 3 + ["TooManyThreadsError"] * 5
    threads = store.threads(ME, 50, None)
    assert threads is not None
    assert len(threads[0]) == 3


def test_the_limit_of_messages_counts_all_of_a_thread_and_nothing_is_stored_beyond_it(store: ThreadStore) -> None:
    full, other = new_thread(store)["id"], new_thread(store)["id"]
    assert store.add(ME, full, user(full), [pair(full)], max_messages=3) == 1
    with pytest.raises(TooManyMessagesError):
        store.add(ME, full, user(full), [pair(full)], max_messages=3, answer=StoredAnswer("key", "print", 202, {}))
    assert store.answer(ME, "key") is None
    assert store.add(ME, full, user(full), max_messages=3) == 3
    with pytest.raises(TooManyMessagesError):
        store.add(ME, full, user(full), max_messages=3)
    assert len(entries(store, full)) == 3
    assert store.add(ME, other, user(other), max_messages=3) == 1


def test_messages_added_at_once_never_exceed_the_limit(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    found = at_once(8, lambda _: store.add(ME, thread_id, user(thread_id), max_messages=3))
    assert sorted(type(one).__name__ for one in found) == ["TooManyMessagesError"] * 5 + ["int"] * 3
    assert len(entries(store, thread_id)) == 3


def test_an_answer_comes_back_to_the_caller_that_got_it_and_to_no_other(store: ThreadStore) -> None:
    answer = StoredAnswer("key", "print", 202, {"a": [1, "é"]}, "0a-1")
    store.remember(ME, answer)
    assert store.answer(ME, "key") == answer
    assert store.answer(ME, "Key") is None
    assert store.answer(OTHER, "key") is None
    assert store.answer(ELSEWHERE, "key") is None
    store.remember(OTHER, answer)


def test_a_second_answer_to_a_key_is_refused_with_all_that_goes_with_it(store: ThreadStore) -> None:
    thread = new_thread(store)
    answer = StoredAnswer("key", "print", 201, {})
    store.add(ME, thread["id"], user(thread["id"]), answer=answer)
    with pytest.raises(AnsweredBefore):
        store.add(ME, thread["id"], user(thread["id"]), answer=answer)
    with pytest.raises(AnsweredBefore):
        store.create_thread(ME, {**thread, "id": "thread_2"}, answer)
    with pytest.raises(AnsweredBefore):
        store.remember(ME, answer._replace(fingerprint="other"))
    assert len(entries(store, thread["id"])) == 1
    assert store.threads(ME, 10, None) == ([thread], False)


def test_of_one_key_used_at_once_one_wins_and_one_message_is_stored(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    found = at_once(
        8, lambda at: store.add(ME, thread_id, user(thread_id), answer=StoredAnswer("key", "print", 201, {"at": at}))
    )
    assert sorted(type(one).__name__ for one in found) == ["AnsweredBefore"] * 7 + ["int"]
    assert len(entries(store, thread_id)) == 1
    answer = store.answer(ME, "key")
    assert answer is not None
    assert isinstance(found[answer.body["at"]], int)


def test_old_answers_are_forgotten_and_their_keys_can_be_used_again(store: ThreadStore) -> None:
    answer = StoredAnswer("key", "print", 201, {})
    store.remember(ME, answer)
    store.forget_answers(int(time.time()) - 100)
    assert store.answer(ME, "key") == answer
    store.forget_answers(int(time.time()) + 100)
    assert store.answer(ME, "key") is None
    store.remember(ME, answer)


# Workers


def test_held_gives_the_runs_that_are_not_over_with_all_their_worker_needs(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    store.add(ME, thread_id, user(thread_id))
    store.beat("w1", "host/7", is_shared=True)
    run, message = start(store, thread_id, group_id="g7", mode="sequential")
    done = start(store, thread_id)
    store.save("w1", *over(*done), [], None)
    step = events.reasoning_step(run, 0)
    upstream = {"id": "resp_1", "sequence_number": 7}
    store.save("w1", run, message, [step], "0a-3", upstream)
    store.release("w1")
    [held] = store.held()
    whole = (run, message, [step], 2, ME, "g7", "sequential", "0a-3", upstream, 0, "w1", 0, None, "host/7")
    assert tuple(held)[:-1] == whole
    assert held.overdue > 1e9
    assert store.held(tables.runs.c.worker != "w1") == []


def left(store: ThreadStore) -> dict[str, float]:
    """For how long each run's lease is good, in thousands of seconds."""
    return {held.run["id"]: round(-held.overdue / 1000) if held.lease else 0 for held in store.held()}


def test_renew_extends_only_ones_own_leases(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    mine = start(store, thread_id, lease=1000)[0]
    theirs = start(store, thread_id, worker="w2", lease=1000)[0]
    both = [mine["id"], theirs["id"]]
    store.renew("w1", both, 50_000)
    assert left(store) == {mine["id"]: 50, theirs["id"]: 1}
    store.renew("w2", both, 60_000)
    store.renew("w1", [], 70_000)
    assert left(store) == {mine["id"]: 50, theirs["id"]: 60}


def test_a_worker_is_told_which_of_its_own_runs_to_cancel(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    mine, other = start(store, thread_id)[0]["id"], start(store, thread_id)[0]["id"]
    theirs = start(store, thread_id, worker="w2")[0]["id"]
    for run_id in (mine, theirs):
        store.request_cancel(run_id)
    assert store.to_cancel("w1", [mine, other, theirs]) == [mine]
    assert store.to_cancel("w1", [other]) == store.to_cancel("w1", []) == []


def test_leases_are_by_the_databases_clock(store: ThreadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    thread_id = new_thread(store)["id"]
    for ahead in (0, 3600, -3600):
        now = time.time() + ahead
        monkeypatch.setattr(time, "time", lambda now=now: now)
        start(store, thread_id, lease=100)
        start(store, thread_id, worker="w2", lease=0)
        monkeypatch.undo()
    assert len(store.held(LAPSED)) == len(store.held(RELEASED)) == 3
    assert all(-100 <= held.overdue < 0 for held in store.held(~LAPSED))


def seen(store: ThreadStore, run: Run) -> LeasedRun:
    """Give the run as a worker reads it that might take it over."""
    [held] = store.held(tables.runs.c.id == run["id"])
    return held


def test_a_run_can_be_claimed_when_its_lease_ran_out_and_not_before(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    assert store.claim(seen(store, run), "w2", 3600) is None
    store.renew("w1", [run["id"]], 0)
    read = seen(store, run)
    claimed = store.claim(read, "w2", 3600)
    assert claimed is not None
    assert (claimed.worker, claimed.claim, claimed.run) == ("w2", 1, run)
    assert store.claim(read, "w3", 3600) is None
    assert store.claim(claimed, "w3", 3600) is None
    assert not store.save("w1", run, message, [], None)
    assert not store.save("w2", run, message, [], None)
    assert store.save("w2", *over(run, message), [], None, claim=1)
    assert store.claim(claimed, "w3", 3600) is None


@pytest.mark.parametrize("back", ["renews", "begins", "ends", "is another", "is gone"])
def test_a_run_whose_holder_came_back_since_it_was_read_is_not_claimed(store: ThreadStore, back: str) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    store.renew("w1", [run["id"]], -1)
    with store.write() as connection:
        connection.execute(tables.runs.update().values(lease=5.0))
    read = seen(store, run)
    match back:
        case "renews":
            store.renew("w1", [run["id"]], 3600)
        case "begins":
            store.save("w1", {**run, "status": "in_progress"}, message, [], None)
        case "ends":
            store.save("w1", *over(run, message), [], None)
        case "is another":
            assert store.claim(read, "w2", 3600) is not None
            store.release("w2", run["id"])
        case "is gone":
            store.delete_thread(thread_id)
    assert store.claim(read, "w3", 3600) is None


def test_a_run_is_claimed_from_a_holder_that_is_not_heard_of_and_by_a_worker_that_is(store: ThreadStore) -> None:
    def heard_of(worker: str, seconds: float) -> None:
        store.beat(worker, "host/7", is_shared=True)
        with store.write() as connection:
            ago = tables.workers.update().where(tables.workers.c.id == worker)
            connection.execute(ago.values(seen=tables.workers.c.seen - seconds))

    def claims(held: LeasedRun, worker: str) -> bool:
        return store.claim(held, worker, 3600) is not None

    thread_id = new_thread(store)["id"]
    lapsed, released = (start(store, thread_id, lease=0)[0] for _ in range(2))
    with store.write() as connection:
        connection.execute(tables.runs.update().where(tables.runs.c.id == lapsed["id"]).values(lease=5.0))
    read = seen(store, lapsed)
    heard_of("w1", 3500)
    assert not claims(read, "w2")
    # What was let go of is anybody's; and who forgot its own run may end it.
    assert claims(seen(store, released), "w2")
    heard_of("w1", 3700)
    heard_of("w2", 1900)
    assert not claims(read, "w2")
    heard_of("w2", 1700)
    assert claims(read, "w2")
    with store.write() as connection:
        connection.execute(tables.runs.update().where(tables.runs.c.id == lapsed["id"]).values(lease=5.0))
    assert claims(seen(store, lapsed), "w2")


def test_who_claims_a_run_gets_what_its_last_holder_stored_until_then(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    run, message = start(store, thread_id)
    run["status"] = "in_progress"
    store.save("w1", run, message, [], "0a-1")
    with store.write() as connection:
        connection.execute(tables.runs.update().values(lease=5.0))
    read = seen(store, run)
    message["content"] = [events.text_part("w0 w1")]
    assert store.save_grown("w1", [(run, message, [], "0a-9", None, 0)]) == {run["id"]}
    claimed = store.claim(read, "w2", 3600)
    assert claimed is not None
    assert (claimed.message, claimed.event_id) == (message, "0a-9")
    # Its holder is another from now on.
    assert store.save_grown("w1", [(run, message, [], "0a-9", None, 0)]) == set()
    assert store.save_grown("w2", [(run, message, [], "0a-9", None, 0)]) == set()
    assert store.save_grown("w2", [(run, message, [], "0a-9", None, 1)]) == {run["id"]}


def test_the_other_workers_are_those_that_were_heard_of_a_moment_ago(store: ThreadStore) -> None:
    for worker in ("w1", "w2", "w3"):
        store.beat(worker, f"host/{worker}", is_shared=False)
    assert store.others("w1", 5) == ["host/w2", "host/w3"]
    with store.write() as connection:
        connection.execute(tables.workers.update().where(tables.workers.c.id == "w3").values(seen=database.Now() - 6))
    assert store.others("w1", 5) == ["host/w2"]
    store.retire("w2")
    assert store.others("w1", 5) == []


def test_newest_tells_the_last_message_of_each_thread_that_is_there(store: ThreadStore) -> None:
    empty, long, gone = (new_thread(store)["id"] for _ in range(3))
    for _ in range(3):
        message = user(long)
        store.add(ME, long, message)
    store.delete_thread(gone)
    assert store.newest([empty, long, gone]) == {empty: (0, 0), long: (3, message["created_at"])}
    assert store.newest([]) == {}


def test_of_workers_that_claim_at_once_one_gets_the_run(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    run, _ = start(store, thread_id, lease=0)
    read = seen(store, run)
    found = at_once(8, lambda at: store.claim(read, f"w{at + 2}", 3600))
    assert len([one for one in found if one is not None]) == 1


def test_a_worker_that_died_is_buried_by_one_when_its_runs_are_over_and_its_late_threads_are_named(
    store: ThreadStore,
) -> None:
    late, early, busy = (new_thread(store)["id"] for _ in range(3))
    for worker in ("dead", "busy", "lives"):
        store.beat(worker, worker, is_shared=True)
    for thread_id, at in ((late, 2000), (late, 1999), (early, 5)):
        run, message = start(store, thread_id, worker="dead")
        store.save("dead", {**over(run, message)[0], "completed_at": at}, message, [], None)
    run, message = start(store, busy, worker="busy")
    with store.write() as connection:
        connection.execute(tables.workers.update().where(tables.workers.c.id != "lives").values(seen=5.0))
    found = at_once(4, lambda _: store.bury(60, 1000))
    assert sorted(found, key=len) == [[], [], [], [late]]
    assert store.bury(60, 1000) == []
    store.save("busy", {**over(run, message)[0], "completed_at": 2000}, message, [], None)
    assert store.bury(60, 1000) == [busy]


def test_release_lets_go_of_queued_runs_and_keeps_those_under_way(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    queued, (run, message) = start(store, thread_id)[0], start(store, thread_id)
    theirs = start(store, thread_id, worker="w2")[0]
    store.save("w1", {**run, "status": "in_progress"}, message, [], None)
    store.release("w1")
    assert [held.run["id"] for held in store.held(RELEASED)] == [queued["id"]]
    assert store.claim(seen(store, run), "w3", 3600) is None
    assert store.claim(seen(store, theirs), "w3", 3600) is None
    assert store.claim(seen(store, queued), "w3", 3600) is not None


def test_release_of_one_run_lets_go_of_it_alone_and_only_for_its_worker(store: ThreadStore) -> None:
    thread_id = new_thread(store)["id"]
    (run, message), (other, _) = start(store, thread_id), start(store, thread_id)
    store.save("w1", {**run, "status": "in_progress"}, message, [], None)
    store.release("w2", run["id"])
    assert store.claim(seen(store, run), "w3", 3600) is None
    store.release("w1", run["id"])
    assert store.claim(seen(store, run), "w3", 3600) is not None
    assert store.claim(seen(store, other), "w3", 3600) is None


def test_a_run_waits_for_those_before_it_in_its_thread_but_not_for_its_own_group(store: ThreadStore) -> None:
    thread_id, elsewhere = new_thread(store)["id"], new_thread(store)["id"]
    start(store, elsewhere)
    first = start(store, thread_id, group_id="g1")
    start(store, thread_id, group_id="g1")
    assert not store.busy_before(thread_id, 1, "g1")
    assert not store.busy_before(thread_id, 2, "g1")
    assert store.busy_before(thread_id, 2, None)
    assert store.busy_before(thread_id, 3, "g2")
    assert store.save("w1", *over(*first), [], None)
    assert not store.busy_before(thread_id, 2, None)
    assert store.busy_before(thread_id, 3, "g2")


# More than one process

WRITER = """
import sys
from assistream_flask import events
from assistream_flask.store.sql import Owner, ThreadStore
url, thread_id = sys.argv[1:]
store = ThreadStore(url)
print("ready", flush=True)
sys.stdin.readline()
for n in range(100):
    message = events.message(thread_id, "user", [events.text_part(f"theirs {n}")])
    assert store.add(Owner("blue", "me"), thread_id, message)
store.close()
"""


def test_two_processes_that_write_at_once_lose_nothing(lasting: str) -> None:
    store = ThreadStore(lasting)
    thread_id = new_thread(store)["id"]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, lasting, thread_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        for n in range(100):
            assert store.add(ME, thread_id, user(thread_id, f"ours {n}"))
        other.stdin.close()
        assert other.wait(30) == 0
    texts = [one["message"]["content"][0]["text"]["value"] for one in entries(store, thread_id)]
    store.close()
    assert [text for text in texts if text.startswith("ours")] == [f"ours {n}" for n in range(100)]
    assert [text for text in texts if text.startswith("theirs")] == [f"theirs {n}" for n in range(100)]


def test_what_works_on_many_rows_at_once_ends_without_a_deadlock(lasting: str) -> None:
    store = ThreadStore(lasting, pool=12)
    for _ in range(10):
        thread_id = new_thread(store)["id"]
        started = [start(store, thread_id, answer=StoredAnswer(f"{thread_id}{n}", "", 202, {})) for n in range(20)]
        jobs: list[Callable[[], object]] = [
            partial(store.renew, "w1", [run["id"] for run, _ in started], 3600),
            lambda: store.release("w1"),
            lambda: store.forget_answers(int(FUTURE)),
            partial(store.delete_thread, thread_id),
            lambda started=started: [store.save("w1", *over(*one), [], None) for one in started],  # type: ignore[misc]
        ]
        found = at_once(10, lambda at, jobs=jobs: jobs[at % 5]())  # type: ignore[misc]
        assert [error for error in found if isinstance(error, Exception)] == []
    store.close()


# PostgreSQL


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.mark.parametrize("name", ["postgresql", "postgres", "postgresql+psycopg"])
def test_the_urls_that_hosts_hand_out_mean_psycopg_3(postgres_url: str, name: str) -> None:
    store = ThreadStore(postgres_url.replace("postgresql+psycopg", name))
    assert store._engine.driver == "psycopg"
    store.close()


@pytest.mark.parametrize("use", [ThreadStore, database.check])
def test_a_missing_driver_is_told_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], object]
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'assistream-flask[postgres]'")):
        use("postgres://host/database")


def test_a_store_has_no_more_connections_than_its_pool_and_waiting_for_one_ends(postgres_url: str) -> None:
    store = ThreadStore(postgres_url, pool=2)
    assert isinstance(store._engine.pool, sa.QueuePool)
    store._engine.pool._timeout = 0.1
    with store.read(), store.read(), pytest.raises(sa.exc.SQLAlchemyError, match="QueuePool limit"):
        store.held()
    assert store.held() == []
    store.close()


def test_a_connection_that_is_at_work_as_the_store_closes_is_closed_as_it_comes_back(postgres_url: str) -> None:
    store = ThreadStore(postgres_url)
    with store.read() as connection:
        ours: Any = connection.connection.driver_connection
        store.close()
        assert connection.scalar(sa.text("SELECT 1")) == 1
    assert ours.closed


def test_nothing_waits_for_ever(postgres_url: str) -> None:
    store = ThreadStore(postgres_url)
    with store.read() as connection:
        limits = "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"
        assert [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in limits] == ["15s", "5s", "30s"]
    store.close()


def test_a_limit_that_the_operator_set_stays_and_ends_a_wait(postgres_url: str) -> None:
    store = ThreadStore(f"{postgres_url}&options=-clock_timeout%3D100&connect_timeout=7")
    thread_id = new_thread(store)["id"]
    with store.write() as connection:
        connection.execute(sa.select(tables.threads).with_for_update())
        with pytest.raises(sa.exc.SQLAlchemyError, match="lock timeout"):
            store.add(ME, thread_id, user(thread_id))
    assert store.add(ME, thread_id, user(thread_id)) == 1
    store.close()


def test_what_another_transaction_holds_is_left_for_the_next_time_where_many_rows_are_changed(
    postgres_url: str,
) -> None:
    store = ThreadStore(postgres_url)
    thread_id = new_thread(store)["id"]
    one, two = (start(store, thread_id, answer=StoredAnswer(key, "", 202, {}))[0]["id"] for key in "ab")
    with store.write() as connection:
        connection.execute(sa.select(tables.runs).where(tables.runs.c.id == two).with_for_update())
        connection.execute(sa.select(tables.answers).where(tables.answers.c.key == "b").with_for_update())
        store.renew("w1", [one, two], 50_000)
        assert left(store) == {one: 50, two: 4}
        store.release("w1")
        assert left(store) == {one: 0, two: 4}
        store.forget_answers(int(FUTURE))
        assert [store.answer(ME, key) is None for key in "ab"] == [True, False]
    store.renew("w1", [one, two], 60_000)
    assert left(store) == {one: 0, two: 60}
    store.close()


def test_connections_that_the_server_closed_are_replaced(postgres_url: str) -> None:
    store, other = ThreadStore(postgres_url), ThreadStore(postgres_url)
    assert store.held() == []
    with other.read() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
        )
    assert store.held() == []
    for one in (store, other):
        one.close()


SLOW = """
from gevent import monkey
monkey.patch_all()
import sys, time
import gevent
import sqlalchemy as sa
from assistream_flask import events
from assistream_flask.store.sql import Owner, ThreadStore, thread_object

store, owner = ThreadStore(sys.argv[1], pool=10), Owner("blue", "me")

def query(seconds):
    with store.read() as connection:
        connection.execute(sa.select(sa.func.pg_sleep(seconds)))

slow = gevent.spawn(query, 2)
ticks = 0
while not slow.ready():
    gevent.sleep(0.05)
    ticks += 1
slow.get()
assert ticks >= 20, ticks

most = 0
def work(_):
    global most
    query(0.05)
    most = max(most, store._engine.pool.checkedout())
    thread = thread_object({"id": events.new_id("thread"), "created_at": events.now(), "metadata": {}})
    store.create_thread(owner, thread)
    return store.add(owner, thread["id"], events.message(thread["id"], "user", [events.text_part("hi")]))

found = [job.get() for job in gevent.joinall([gevent.spawn(work, n) for n in range(50)], timeout=60)]
assert found == [1] * 50, found
with store.read() as connection:
    count = connection.exec_driver_sql("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    assert 2 <= count.scalar() <= 10
assert len(store.threads(owner, 100, None)[0]) == 50
store.close()
print("ticks", ticks)
"""


def test_a_slow_query_holds_up_no_other_greenlet_and_many_share_the_pool(postgres_url: str) -> None:
    done = subprocess.run([sys.executable, "-c", SLOW, postgres_url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


EARLY = """
import sys
import sqlalchemy
from assistream_flask.errors import ConfigurationError
from assistream_flask.store import database
from assistream_flask.store.sql import ThreadStore
database.check("postgres://host/database")
assert "psycopg" not in sys.modules
if sys.argv[2] == "early":
    import psycopg
from gevent import monkey
monkey.patch_all()
try:
    ThreadStore(sys.argv[1]).close()
except ConfigurationError as error:
    print(error)
else:
    print("works")
"""


@pytest.mark.parametrize(("when", "told"), [("early", "without --preload"), ("late", "works")])
def test_psycopg_imported_before_gevents_patching_is_refused_as_it_would_stop_all_greenlets(
    postgres_url: str, when: str, told: str
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", EARLY, postgres_url, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told in done.stdout, done.stdout + done.stderr
