"""Databases of older releases, opened by this one."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from assistream_flask.store import migrations, tables
from assistream_flask.store.sql import ThreadStore
from assistream_flask.store.thread_change import StoredCall
from assistream_flask.store.tool_calls import ToolCallStore
from tests.conftest import at_once
from tests.contract import schema_1
from tests.contract.test_store import FUTURE, ME, entries, new_thread, over, start, user


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def rows(engine: sa.Engine) -> dict[str, list[Any]]:
    """Give what is in a database that the first release made and worked with."""
    thread: dict[str, Any] = {"id": "t", "scope": "blue", "owner": "me", "created_at": 1, "metadata": {"k": "é"}}
    message: dict[str, Any] = {
        "id": "m", "thread_id": "t", "position": 1, "role": "assistant", "status": "in_progress",
        "content": [{"type": "text", "text": {"value": "a\0😀", "annotations": []}}], "assistant_id": "tutor",
        "run_id": "r", "created_at": 1, "metadata": {},
    }  # fmt: skip
    with engine.begin() as connection:
        schema_1.metadata.create_all(connection)
        connection.execute(schema_1.schema.insert().values(version=1))
        connection.execute(schema_1.threads.insert().values(thread))
        connection.execute(schema_1.messages.insert().values(message))
        connection.execute(schema_1.runs.insert().values(old_run("r", "m")))
        answer = {"scope": "blue", "owner": "me", "key": "k", "fingerprint": "f", "status": 201, "body": {"a": 1}}
        connection.execute(schema_1.answers.insert().values(**answer, created_at=1, thread_id="t"))
    return contents(engine)


def old_run(run_id: str, message_id: str) -> dict[str, Any]:
    """Give a run as the first release writes it."""
    return {
        "id": run_id, "thread_id": "t", "assistant_id": "tutor", "message_id": message_id, "status": "in_progress",
        "created_at": 1, "metadata": {}, "steps": [], "group_id": "g", "mode": "parallel", "place": "0a-1",
        "worker": "old", "lease": FUTURE, "cancel_requested": False,
    }  # fmt: skip


def contents(engine: sa.Engine) -> dict[str, list[Any]]:
    """Give all rows, as the first release reads them."""
    older = (schema_1.threads, schema_1.messages, schema_1.runs, schema_1.answers)
    with engine.connect() as connection:
        return {table.name: [tuple(row) for row in connection.execute(sa.select(table))] for table in older}


def recorded(engine: sa.Engine) -> tuple[list[int], list[str]]:
    """Give the version as we record it, and as Alembic does."""
    with engine.connect() as connection:
        ours = connection.execute(sa.select(tables.schema.c.version)).scalars().all()
        theirs = connection.exec_driver_sql("SELECT version_num FROM assistream_alembic").scalars().all()
    return list(ours), list(theirs)


NEWEST = [tables.VERSION], [f"{tables.VERSION:04}"]


def differences(engine: sa.Engine, metadata: sa.MetaData) -> list[Any]:
    """Give what the database has otherwise than ``metadata`` says."""
    with engine.connect() as connection:
        options = {"version_table": "assistream_alembic", "compare_type": True, "compare_server_default": True}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


def test_the_newest_revision_is_the_schemas_version() -> None:
    revisions = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert revisions.get_heads() == [f"{tables.VERSION:04}"]


def test_a_new_database_is_the_newest_and_recorded_as_such(url: str, engine: sa.Engine) -> None:
    ThreadStore(url).close()
    assert recorded(engine) == NEWEST
    assert differences(engine, tables.metadata) == []


def test_the_first_revision_is_what_the_first_release_made(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        migrations.upgrade(connection, 0, to="0001")
    assert differences(engine, schema_1.metadata) == []


def test_an_old_database_is_upgraded_when_a_store_opens_it_and_loses_no_row(
    url: str, engine: sa.Engine, rows: dict[str, list[Any]]
) -> None:
    assert differences(engine, tables.metadata) != []
    for _ in range(2):
        ThreadStore(url).close()
        assert recorded(engine) == NEWEST
        assert differences(engine, tables.metadata) == []
        assert contents(engine) == rows
    with engine.connect() as connection:
        assert connection.execute(sa.select(tables.runs.c.upstream)).scalars().all() == [None]


def test_an_upgraded_database_does_all_that_a_new_one_does(url: str, rows: dict[str, list[Any]]) -> None:
    store = ThreadStore(url)
    assert [held.run["id"] for held in store.held()] == ["r"]
    assert entries(store, "t")[0]["message"]["content"][0]["text"]["value"] == "a\0😀"
    thread_id = new_thread(store)["id"]
    store.add(ME, thread_id, user(thread_id))
    assert store.save("w1", *over(*start(store, thread_id)), [], None)
    store.delete_thread("t")
    assert [held.run["id"] for held in store.held()] == []
    store.close()


def test_code_of_the_first_release_that_still_runs_can_go_on(
    url: str, engine: sa.Engine, rows: dict[str, list[Any]]
) -> None:
    store = ThreadStore(url)
    with engine.begin() as connection:
        connection.execute(schema_1.runs.insert().values(old_run("r2", "m2")))
        connection.execute(schema_1.runs.update().values(status="completed"))
        assert len(connection.execute(sa.select(schema_1.runs)).all()) == 2
    run = store.run("t", "r2")
    assert run is not None
    assert run["status"] == "completed"
    store.close()


def test_workers_that_open_an_old_database_at_once_upgrade_it_once(
    url: str, engine: sa.Engine, rows: dict[str, list[Any]]
) -> None:
    opened = at_once(8, lambda _: ThreadStore(url))
    assert [one for one in opened if not isinstance(one, ThreadStore)] == []
    for one in opened:
        assert isinstance(one, ThreadStore)
        one.close()
    assert recorded(engine) == NEWEST
    assert contents(engine) == rows


OPEN = """
import sys
from assistream_flask.store.sql import ThreadStore
print("ready", flush=True)
sys.stdin.readline()
ThreadStore(sys.argv[1]).close()
"""


@pytest.mark.slow
def test_processes_that_open_an_old_database_at_once_upgrade_it_once(
    url: str, engine: sa.Engine, rows: dict[str, list[Any]]
) -> None:
    command = [sys.executable, "-c", OPEN, url]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert recorded(engine) == NEWEST
    assert contents(engine) == rows


def test_an_upgrade_that_fails_changes_nothing_and_is_tried_again(
    url: str, engine: sa.Engine, rows: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = migrations.upgrade

    def fail(connection: sa.Connection, found: int) -> None:
        whole(connection, found)
        raise RuntimeError("the power went")

    monkeypatch.setattr(migrations, "upgrade", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        ThreadStore(url)
    assert differences(engine, schema_1.metadata) == []
    assert not sa.inspect(engine).has_table("assistream_alembic")
    monkeypatch.undo()
    ThreadStore(url).close()
    assert recorded(engine) == NEWEST


def test_the_apps_own_use_of_alembic_and_of_logging_is_left_alone(
    url: str, engine: sa.Engine, rows: dict[str, list[Any]]
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('theirs')")
    watched = [logging.getLogger(name) for name in (None, "alembic", "sqlalchemy.engine", "tests.own")]

    def state() -> list[Any]:
        return [(one.level, list(one.handlers), one.disabled, one.propagate) for one in watched]

    before = state()
    ThreadStore(url).close()
    assert state() == before
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all() == ["theirs"]


@pytest.mark.slow
def test_alembic_is_imported_for_an_upgrade_only(tmp_path: Path) -> None:
    look = "import sys; from assistream_flask.store.sql import ThreadStore; ThreadStore(sys.argv[1]).close()"
    url = f"sqlite:///{tmp_path / 'new.sqlite3'}"
    command = [sys.executable, "-c", f"{look}; assert 'alembic' not in sys.modules", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# The release before tools


@pytest.fixture
def before_tools(engine: sa.Engine) -> sa.MetaData:
    """Give the tables of a database as the release before tools made it, with one thread of one run."""
    with engine.begin() as connection:
        migrations.upgrade(connection, 0, to="0003")
        tables_then = sa.MetaData()
        tables_then.reflect(connection)
        connection.execute(tables_then.tables["assistream_schema"].insert().values(version=3))
        thread = {"id": "t", "scope": "blue", "owner": "me", "created_at": 1, "metadata": {}}
        connection.execute(tables_then.tables["assistream_threads"].insert().values(thread))
        answer(connection, tables_then, 1)
    return tables_then


def answer(connection: sa.Connection, then: sa.MetaData, number: int) -> None:
    """Store a run, and that it thought and answered, as a worker of that release does."""
    messages, runs = then.tables["assistream_messages"], then.tables["assistream_runs"]
    run_id, message_id = f"r{number}", f"m{number}"
    step = {
        "id": "s", "object": "thread.run.step", "run_id": run_id, "thread_id": "t", "assistant_id": "tutor",
        "type": "reasoning", "status": "completed", "created_at": 1, "completed_at": 1,
        "step_details": {"type": "reasoning", "reasoning": {"text": "Hm."}},
    }  # fmt: skip
    message = {
        "id": message_id, "thread_id": "t", "position": number, "role": "assistant", "status": "in_progress",
        "content": [], "assistant_id": "tutor", "run_id": run_id, "created_at": 1, "metadata": {},
    }  # fmt: skip
    connection.execute(messages.insert().values(message))
    connection.execute(runs.insert().values(old_run(run_id, message_id)))
    connection.execute(runs.update().where(runs.c.id == run_id).values(steps=[step], claim=runs.c.claim + 1))


def test_what_the_release_before_tools_stored_is_read_with_what_it_lacked(
    url: str, engine: sa.Engine, before_tools: sa.MetaData
) -> None:
    store = ThreadStore(url)
    assert (recorded(engine), differences(engine, tables.metadata)) == (NEWEST, [])
    [held] = store.held()
    assert (held.loop, held.run["required_action"], held.run["expires_at"]) == (None, None, None)
    assert [step["content_index"] for step in entries(store, "t")[0]["steps"]] == [0]
    assert store.history("m1", 100, 100) == ([], False)
    calls = ToolCallStore(store)
    state = (held.run, held.message, held.steps, None, None, held.claim)
    call = StoredCall("r1", "call_1", 1, 0, "step_1", "add", "server", "{}", "pending")
    assert calls.begin_round("old", state, {"round": 1}, [{"type": "message"}], [call])
    assert calls.claim("old", held.claim, "r1", "call_1")
    store.close()


def test_workers_of_the_release_before_tools_answer_while_and_after_the_schema_is_upgraded(
    url: str, engine: sa.Engine, before_tools: sa.MetaData
) -> None:
    is_upgraded, failed, count = threading.Event(), list[sa.exc.SQLAlchemyError](), 1

    def work() -> None:
        nonlocal count
        after = 0
        while after < 20 and not failed:
            after += is_upgraded.is_set()
            try:
                with engine.begin() as connection:
                    answer(connection, before_tools, count + 1)
                count += 1
            except sa.exc.SQLAlchemyError as error:
                failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    store = ThreadStore(url)
    is_upgraded.set()
    worker.join(60)
    assert (worker.is_alive(), failed) == (False, [])
    assert len(store.held()) == count > 20
    # They delete a thread with what they know nothing of.
    [held, *_] = store.held()
    state = (held.run, held.message, held.steps, None, None, held.claim)
    assert ToolCallStore(store).begin_round("old", state, {"round": 1}, [{"type": "message"}], [])
    with engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        for name in ("runs", "messages", "threads"):
            connection.execute(before_tools.tables[f"assistream_{name}"].delete())
        assert connection.execute(sa.select(tables.items)).all() == []
    store.close()
