"""The thread that keeps a worker's runs its own, on real databases: also where those do not write, and under gevent."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from assistream_flask.store import leases
from assistream_flask.store.leases import Leases
from assistream_flask.store.sql import ThreadStore
from assistream_flask.store.tables import runs, workers
from tests.conftest import wait_until
from tests.contract.test_store import new_thread, start
from tests.outages import CUT, locked_out
from tests.postgres_server import PostgresServer

LEASE = 1.0
"""A lease of these tests, and what is as long as it is for its sake."""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(leases, "_RENEW_SECONDS", LEASE / 10)
    monkeypatch.setattr(leases, "_GAP_SECONDS", LEASE / 2)
    monkeypatch.setattr(leases, "_PATIENCE_SECONDS", LEASE * 0.3)


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    return postgres.new_database()


class Kept:
    """A worker's leases, and another's look at them."""

    def __init__(self, url: str, *, is_shared: bool = True) -> None:
        self.held: list[str] = []
        self.store = ThreadStore(url)
        self.leases = Leases(url, "w1", lambda: self.held, is_shared=is_shared)

    def left(self, run_id: str) -> float:
        """For how many seconds the run's lease is good."""
        [held] = self.store.held(runs.c.id == run_id)
        return -held.overdue

    def known(self) -> list[tuple[str, str, bool]]:
        """Give the workers that are known."""
        with self.store.read() as connection:
            return [(row.id, row.name, row.is_shared) for row in connection.execute(sa.select(workers))]


@contextlib.contextmanager
def kept(url: str) -> Iterator[Kept]:
    """With its thread, ended whatever happens."""
    found = Kept(url)
    found.leases.start()
    try:
        yield found
    finally:
        found.leases.stop()
        found.store.close()


def steady(kept: Kept) -> None:
    wait_until(kept.leases.is_steady, 30)


def shaken(kept: Kept, since: float) -> None:
    """Wait until it is steady again after something that happened after ``since``: not before a lease is over."""
    wait_until(lambda: kept.leases._since >= since and kept.leases.is_steady(), 30)
    assert time.monotonic() - since >= LEASE


def test_the_leases_of_those_runs_that_are_held_are_renewed_and_the_worker_is_known_until_it_stops(url: str) -> None:
    with kept(url) as one:
        thread_id = new_thread(one.store)["id"]
        held, other = (start(one.store, thread_id, lease=0.5)[0]["id"] for _ in range(2))
        one.held.append(held)
        time.sleep(2 * LEASE)
        assert 0 < one.left(held) <= LEASE
        assert one.left(other) < 0
        [(worker, name, is_shared)] = one.known()
        assert worker == "w1"
        assert name.endswith(f"/{os.getpid()}")
        assert is_shared
        assert one.leases.skew is not None
        assert abs(one.leases.skew) < 1
        one.leases.stop()
        assert one.known() == []
        # One that left something behind stays known, as if it had died.
        one.leases = Leases(url, "w2", list, is_shared=False)
        one.leases.start()
        wait_until(one.known)
        one.leases.stop(is_clean=False)
        assert [worker for worker, *_ in one.known()] == ["w2"]


def test_a_worker_is_steady_after_it_wrote_for_as_long_as_a_lease_is(url: str) -> None:
    began = time.monotonic()
    with kept(url) as one:
        assert not one.leases.is_steady()
        steady(one)
        assert time.monotonic() - began >= LEASE


def test_with_a_database_in_memory_no_thread_is_started_and_the_worker_is_steady() -> None:
    before = len(os.listdir("/proc/self/task"))
    with kept("sqlite://") as one:
        assert len(os.listdir("/proc/self/task")) == before
        assert one.leases.is_steady()


# Where it can't write


@pytest.mark.parametrize(
    ("database_url", "how"),
    [
        ("sqlite", "locked"),
        pytest.param("postgresql", "locked", marks=pytest.mark.server),
        pytest.param("postgresql", "read-only", marks=pytest.mark.server),
    ],
    indirect=["database_url"],
)
def test_a_database_that_is_read_and_not_written_to_makes_a_worker_unsteady_until_it_writes_again(
    url: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with kept(url) as one:
        run = start(one.store, new_thread(one.store)["id"], lease=0.5)[0]["id"]
        one.held.append(run)
        steady(one)
        with locked_out(url, how):
            wait_until(lambda: not one.leases.is_steady())
            time.sleep(2 * LEASE)
            # It was renewed in vain.
            assert one.left(run) < 0
            assert not one.leases.is_steady()
            since = time.monotonic()
        shaken(one, since)
        assert one.left(run) > 0
    said = [record.message for record in caplog.records if "cannot be renewed" in record.message]
    # A server that is made read-only may break off a statement first: another cause, which is said too.
    assert said
    assert len(said) == len(set(said))


def test_a_dropped_connection_is_replaced(postgres_url: str) -> None:
    with kept(postgres_url) as one:
        run = start(one.store, new_thread(one.store)["id"], lease=0.5)[0]["id"]
        one.held.append(run)
        steady(one)
        with sa.create_engine(postgres_url, poolclass=sa.NullPool).connect() as admin:
            admin.exec_driver_sql(CUT)
        end = time.monotonic() + 2 * LEASE
        while time.monotonic() < end:
            assert one.left(run) > 0
            time.sleep(0.05)
        steady(one)


def test_a_worker_that_was_held_up_is_not_steady(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(url) as one:
        steady(one)
        late = time.monotonic
        since = late() + LEASE
        monkeypatch.setattr(time, "monotonic", lambda: late() + LEASE)
        assert not one.leases.is_steady()
        shaken(one, since)


def test_a_database_whose_clock_was_set_makes_a_worker_unsteady(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept(url) as one:
        steady(one)
        beat, since = ThreadStore.beat, time.monotonic()
        monkeypatch.setattr(ThreadStore, "beat", lambda *given, **named: beat(*given, **named) + 60)
        shaken(one, since)


def test_a_database_that_does_not_answer_holds_a_stop_up_for_seconds_only(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(postgres_url) as one, locked_out(postgres_url, "locked"):
        wait_until(lambda: not one.leases.is_steady())
        began = time.monotonic()
        one.leases.stop()
        assert time.monotonic() - began < 5
        assert not one.leases._is_running


def test_a_clock_that_differs_from_the_databases_is_warned_of_once(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for ahead, words in ((60, "60.0 s ahead of"), (-60, "60.0 s behind"), (1, None)):
        caplog.clear()
        ours = SimpleNamespace(time=lambda ahead=ahead: time.time() + ahead, monotonic=time.monotonic, sleep=time.sleep)
        monkeypatch.setattr(leases, "time", ours)
        with kept(url) as one:
            steady(one)
            assert one.leases.skew is not None
            assert abs(one.leases.skew - ahead) < 1
        told = [record.message for record in caplog.records if "clock" in record.message]
        assert len(told) == (words is not None), told
        assert all(words and words in one and "NTP" in one for one in told)


def test_a_run_whose_row_its_holder_locks_for_longer_than_a_lease_stays_its_own(postgres_url: str) -> None:
    with kept(postgres_url) as one, contextlib.closing(ThreadStore(postgres_url)) as other:
        run = start(one.store, new_thread(one.store)["id"], lease=0.5)[0]["id"]
        one.held.append(run)
        other.beat("w2", "host/7", is_shared=True)
        found: list[object] = []
        with one.store.write() as connection:
            # As one that stores its text while the app computes.
            connection.execute(runs.update().where(runs.c.id == run).values(place="0a-1"))
            wait_until(lambda: one.left(run) < -LEASE)
            other.beat("w2", "host/7", is_shared=True)
            [read] = other.held(runs.c.id == run)
            claim = threading.Thread(target=lambda: found.append(other.claim(read, "w2", LEASE)))
            claim.start()
            time.sleep(0.2)
        claim.join(10)
        assert found == [None]
        wait_until(lambda: one.left(run) > 0)


# Under gevent


PATCHED = """
    import gevent.monkey
    gevent.monkey.patch_all()
    import os, sys, threading, time
    import gevent
    from assistream_flask.store import leases
    from assistream_flask.store.tables import runs
    from tests.contract.test_leases import Kept
    from tests.contract.test_store import new_thread, start

    leases.LEASE_SECONDS, leases._RENEW_SECONDS = 1.0, 0.1
    leases._GAP_SECONDS, leases._PATIENCE_SECONDS = 0.5, 0.3
    kept = Kept(sys.argv[1])
    run = start(kept.store, new_thread(kept.store)["id"], lease=1.0)[0]["id"]
    kept.held.append(run)
    kept.leases.start()
    end = time.monotonic() + 30
    while not kept.leases.is_steady():
        assert time.monotonic() < end
        time.sleep(0.05)

    def files():
        return len(os.listdir("/proc/self/fd"))
"""


def patched(url: str, work: str, seconds: float = 40) -> str:
    """Run it in a process of its own, which gevent has patched; give what that printed."""
    code = textwrap.dedent(PATCHED) + textwrap.dedent(work)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, timeout=seconds, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_leases_are_renewed_while_a_greenlet_computes(url: str) -> None:
    work = """
        def compute():
            end = time.monotonic() + 3 * leases.LEASE_SECONDS
            while time.monotonic() < end:
                sum(range(1000))

        gevent.spawn(compute).join()
        # Before anything else can go on.
        print(kept.left(run) > 0, kept.leases.is_steady())
        kept.leases.stop()
        print(kept.leases._is_running, kept.known())
    """
    assert patched(url, work).splitlines() == ["True True", "False []"]


@pytest.mark.slow
def test_a_thread_that_ends_leaves_nothing_open(url: str) -> None:
    work = """
        kept.leases.stop()
        kept.store.renew("w1", [], 1)
        before, threads = files(), len(os.listdir("/proc/self/task"))
        for _ in range(5):
            kept.leases = leases.Leases(sys.argv[1], "w1", lambda: [], is_shared=True)
            kept.leases.start()
            time.sleep(0.3)
            kept.leases.stop()
        time.sleep(0.1)
        print(files() - before, len(os.listdir("/proc/self/task")) - threads)
    """
    assert patched(url, work).split() == ["0", "0"]


@pytest.mark.parametrize("how", ["stopped", "left to the exit"])
def test_a_process_ends_in_time_while_the_database_is_silent(postgres_url: str, how: str) -> None:
    work = f"""
        import signal
        with kept.store.read() as connection:
            others = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            pids = [row[0] for row in connection.exec_driver_sql(others)]
        print(*pids, flush=True)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        began = time.monotonic()
        if {how == "stopped"}:
            kept.leases.stop()
        print(time.monotonic() - began < 10, kept.leases._is_running)
    """
    silent, ended = patched(postgres_url, work).splitlines()
    for pid in silent.split():
        os.kill(int(pid), signal.SIGCONT)
    assert ended == "True True"
