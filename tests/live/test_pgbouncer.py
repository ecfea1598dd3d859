"""Behind PgBouncer in transaction mode, where each transaction may meet another session of the server."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from assistream_flask.store.sql import ThreadStore
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, at_once, text
from tests.contract.test_store import ME, new_thread, user
from tests.postgres_server import PostgresServer
from tests.programs import free_port, listening, program

# Fewer sessions than there are connections: each transaction gets whichever is free.
CONFIG = """
[databases]
* = host={host} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
{more}
"""
LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


@pytest.fixture
def pooled_url(postgres: PostgresServer) -> Iterator[str]:
    """Give the URL of an empty database, by way of a PgBouncer of its own."""
    pgbouncer, port = program("pgbouncer"), free_port()
    url = sa.make_url(postgres.new_database())
    version = subprocess.run([pgbouncer, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    # Newer ones keep prepared statements for their clients by themselves, where the operator lets them.
    newer = tuple(map(int, version.split(".")[:2])) >= (1, 21)
    with tempfile.TemporaryDirectory(prefix="assistream-") as name, contextlib.ExitStack() as closing:
        folder = Path(name)
        file = folder / "pgbouncer.ini"
        more = "max_prepared_statements = 0" if newer else ""
        file.write_text(CONFIG.format(host=url.query["host"], port=port, more=more))
        command: list[str | Path] = [pgbouncer, "-q", file]
        if os.geteuid() == 0:
            # It refuses to run as root.
            for path in (folder, file):
                os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
            command = [pgbouncer, "-q", "-u", "postgres", file]
        closing.enter_context(listening(folder, port, *command))
        yield url.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)


def test_a_store_does_in_another_session_what_it_did_often_in_one(pooled_url: str) -> None:
    other = sa.create_engine(pooled_url, poolclass=sa.NullPool, connect_args={"prepare_threshold": None})
    with contextlib.closing(ThreadStore(pooled_url)) as store:
        thread_id = new_thread(store)["id"]

        def often() -> None:
            # Nothing is only read meanwhile: at a ROLLBACK psycopg forgets what it has prepared.
            for _ in range(10):
                store.add(ME, thread_id, user(thread_id))

        often()
        with other.connect() as holding:
            # PgBouncer gives it the session that was used last, for as long as its transaction is.
            holding.exec_driver_sql("SELECT 1")
            often()
        found = store.page(thread_id, 200)
        assert found is not None
        assert len(found[0]) == 20
    other.dispose()


def test_each_transaction_has_the_limits_of_its_store_and_leaves_none_in_the_session(pooled_url: str) -> None:
    shown = sa.text("SELECT " + ", ".join(f"current_setting('{name}')" for name in LIMITS))
    other = sa.create_engine(pooled_url, poolclass=sa.NullPool, connect_args={"prepare_threshold": None})
    with (
        contextlib.closing(ThreadStore(pooled_url)) as patient,
        contextlib.closing(ThreadStore(pooled_url, 1, 3)) as hasty,
    ):
        for _ in range(3):
            for store, limits in ((hasty, ("3s", "1s", "30s")), (patient, ("15s", "5s", "30s"))):
                for way in (store.read, store.write):
                    with way() as connection:
                        assert tuple(connection.execute(shown).one()) == limits
            with other.connect() as connection:
                assert tuple(connection.execute(shown).one()) == ("0", "0", "0")
    other.dispose()


def test_all_runs_of_many_callers_are_answered(make_app: MakeApp, server: OfflineServer, pooled_url: str) -> None:
    server.replies = Reply("one two three")
    app = make_app(owner=lambda: "me", database_url=pooled_url, max_runs=100)

    def ask(_: int) -> list[str]:
        caller = Caller(app)
        caller.run("tutor", "critic", "poet")
        caller.run("tutor", mode="sequential")
        return [text(entry) for entry in caller.wait(60) if entry["run"]]

    assert at_once(16, ask) == [["one two three"] * 4] * 16
