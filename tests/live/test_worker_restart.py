"""The end of a worker that has served gunicorn's --max-requests: no answer is cut, all else is served throughout."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from assistream_flask import Assistant
from assistream_flask.platform import gunicorn as server
from assistream_flask.runs import worker_restart
from assistream_flask.store.sql import ThreadStore
from assistream_flask.testing import OfflineServer
from tests.cluster import Cluster, clustered
from tests.conftest import OVER, Caller, MakeApp, wait_until
from tests.gunicorn_server import Gunicorn, running
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

# Answers take about five seconds, and the drain is shorter.
SLOW: dict[str, Any] = {"delay": 0.12, "drain_seconds": 1}


class Client:
    """Asks for pages all the time and for an answer every second or so, from the moment that it is made."""

    def __init__(self, gunicorn: Gunicorn) -> None:
        self._gunicorn = gunicorn
        self.threads: list[str] = []
        self.refused: list[object] = []
        self.longest = 0.0
        self._stopped = threading.Event()
        self._page = gunicorn.thread()
        self._threads = [threading.Thread(target=target) for target in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        while not self._stopped.wait(0.05):
            self._timed(lambda: self._gunicorn.entries(self._page))

    def _write(self) -> None:
        while not self._stopped.is_set():
            if thread := self._timed(self._gunicorn.thread):
                self._timed(lambda thread=thread: self._gunicorn.run(thread, "tutor"))  # type: ignore[misc]
                self.threads.append(thread)
            self._stopped.wait(1)

    def _timed(self, call: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        try:
            return call()
        except (OSError, http.client.HTTPException) as error:
            self.refused.append(error)
        finally:
            self.longest = max(self.longest, time.monotonic() - begun)


def recycled(cluster: Cluster, workers: int) -> None:
    """Have so many of the workers recycled while a client is there; nothing is lost or refused."""
    gunicorn = cluster.gunicorns[0]
    before = set(cluster.workers())
    client = Client(gunicorn)
    try:
        wait_until(lambda: len(before - set(cluster.workers())) >= workers, 150)
        # Those that wait, and those that come then.
        wait_until(lambda: len(cluster.workers()) == len(before), 30)
        count = len(client.threads)
        wait_until(lambda: len(client.threads) > count, 30)
    finally:
        client.stop()
    entries = [entry for thread in client.threads for entry in gunicorn.settled(thread)]
    assert {entry["run"]["status"] for entry in entries if entry["run"]} == {"completed"}
    assert client.refused == []
    assert "Autorestarting worker between answers" in cluster.log()
    # A start takes seconds on a busy machine.
    assert client.longest < 20
    print(f"{len(client.threads)} answers, the longest wait took {client.longest:.2f} s")


def test_of_several_workers_each_is_recycled_when_its_answers_are_over_and_others_take_what_comes(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer
) -> None:
    options = ["--max-requests", "60"]
    with clustered(tmp_path, own_redis, postgres.new_database(), workers=3, options=options, **SLOW) as cluster:
        recycled(cluster, 2)


def test_a_worker_that_is_alone_and_never_idle_lets_what_comes_wait_for_its_successor_in_the_end(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    # Its log is in memory. What a run may take is what is waited for a moment without one.
    settings = {"redis_url": "", "run_seconds": 15, **SLOW}
    options = ["--max-requests", "60"]
    with clustered(
        tmp_path, own_redis, f"sqlite:///{tmp_path}/one.sqlite3", workers=1, options=options, **settings
    ) as one:
        recycled(one, 1)


@pytest.mark.parametrize("worker_class", ["gevent", "gthread"])
def test_a_worker_is_recycled_when_it_has_nothing_to_do(tmp_path: Path, worker_class: str) -> None:
    options = ["--max-requests", "20", "--max-requests-jitter", "5", "--threads", "8"]
    with running(tmp_path, worker_class=worker_class, options=options, delay=0.1, drain_seconds=0.5) as gunicorn:
        before, thread = gunicorn.workers(), gunicorn.thread()
        gunicorn.run(thread, "responses")
        for _ in range(30):
            gunicorn.get("/page", parse=False)
        assert gunicorn.workers() == before
        assert gunicorn.settled(thread)[-1]["run"]["status"] == "completed"
        wait_until(lambda: gunicorn.workers() not in ([], before), 20)


def test_what_a_worker_serves_while_it_ends_it_serves_as_ever(tmp_path: Path, own_redis: RedisServer) -> None:
    with running(tmp_path, redis_url=own_redis.url) as gunicorn:
        pages = [gunicorn.thread() for _ in range(8)]
        before = gunicorn.workers()
        failed: list[object] = []
        ended = threading.Event()

        def read(page: str) -> None:
            while not ended.is_set():
                try:
                    gunicorn.entries(page)
                except (OSError, http.client.HTTPException) as error:
                    failed.append(error)

        threads = [threading.Thread(target=read, args=(page,)) for page in pages]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(before[0], signal.SIGTERM)
        wait_until(lambda: gunicorn.workers() not in ([], before), 20)
        ended.set()
        for thread in threads:
            thread.join()
        assert failed == []


def test_eighty_background_runs_are_handed_over_at_once_also_where_nothing_can_stop_them(make_app: MakeApp) -> None:
    lasting = [Assistant("lasting", model="m", background=True)]
    with OfflineServer(delay=0.5) as model:
        app = make_app(lasting, client=model.client(api_key="k"), max_runs=100)
        callers = [Caller(app) for _ in range(80)]
        for caller in callers:
            caller.run("lasting")
        runner = app.extensions["assistream"].runtime().runner
        wait_until(lambda: sum(live.resume_state is not None for live in runner.active.all()) == 80, 60)
    # Their threads sleep until they may ask again.
    time.sleep(2)
    begun = time.monotonic()
    app.extensions["assistream"].close()
    assert time.monotonic() - begun < 15
    with contextlib.closing(ThreadStore(app.config["ASSISTREAM_DATABASE_URL"])) as store:
        left = store.held()
    assert [one.lease for one in left if one.run["status"] not in OVER] == [0] * 80


# When a worker ends


class Workload:
    def __init__(self) -> None:
        self.busy = self.resting = self.ignored = False

    def is_busy(self) -> bool:
        return self.busy

    def rest(self) -> None:
        self.resting = True

    def resume(self) -> None:
        self.resting = False

    def is_ignored(self, seconds: float) -> bool:
        return self.ignored


class Worker:
    """As gunicorn's, as far as it is known."""

    def __init__(self) -> None:
        self.nr, self.max_requests, self.alive, self.log = 0, 10, True, self

    def info(self, *_: object) -> None:
        """Gunicorn's own log."""

    def handle(self, *_: object) -> None:
        """As its handlers of signals: who has it knows the worker."""


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker()
    before = signal.signal(signal.SIGTERM, found.handle)
    yield found
    signal.signal(signal.SIGTERM, before)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def of(worker: Worker, *crews: Workload, has_others: bool, clock: Clock | None = None) -> worker_restart.WorkerRestart:
    """As of a worker that has served as many requests as it may."""
    worker.nr = 10
    found = None
    for crew in crews:
        found = server.kept(partial(worker_restart.WorkerRestart, clock=clock or Clock()))
        assert found is not None
        found.join(crew, 600, has_others)
    assert found is not None
    return found


def test_gunicorns_own_limit_is_out_of_the_way_and_counts_still(worker: Worker) -> None:
    found = of(worker, Workload(), has_others=False)
    assert worker.max_requests > 1 << 60
    worker.nr = 9
    found.look()
    assert worker.alive
    worker.nr = 10
    found.look()
    assert not worker.alive


def test_where_gunicorn_does_not_count_as_it_is_known_to_its_limit_stays(worker: Worker) -> None:
    del worker.nr
    assert server.kept(worker_restart.WorkerRestart) is None
    assert worker.max_requests == 10
    worker.nr, worker.alive = 10, False
    assert server.kept(worker_restart.WorkerRestart) is None


def test_the_apps_of_a_worker_all_have_to_be_done(worker: Worker) -> None:
    one, two = Workload(), Workload()
    found = of(worker, one, two, has_others=False)
    two.busy = True
    found.look()
    assert worker.alive
    assert not one.resting
    two.busy = False
    found.look()
    assert not worker.alive


def test_a_worker_with_others_begins_nothing_more_after_ten_seconds(worker: Worker) -> None:
    clock = Clock()
    crew = Workload()
    crew.busy = True
    found = of(worker, crew, has_others=True, clock=clock)
    found.look()
    assert not crew.resting
    clock.now += 11
    found.look()
    assert crew.resting
    clock.now += 300
    found.look()
    assert worker.alive
    crew.busy = False
    found.look()
    assert not worker.alive


def test_where_the_others_take_nothing_the_worker_goes_on_as_one_that_is_alone(worker: Worker) -> None:
    clock = Clock()
    crew = Workload()
    crew.busy = True
    found = of(worker, crew, has_others=True, clock=clock)
    found.look()
    clock.now += 11
    found.look()
    crew.ignored = True
    found.look()
    assert not crew.resting
    clock.now += 100
    found.look()
    assert not crew.resting
    clock.now += 500
    found.look()
    assert crew.resting
    found.look()
    assert crew.resting


def test_what_begins_at_the_last_moment_is_gone_on_with(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Workload()
    monkeypatch.setattr(crew, "rest", lambda: setattr(crew, "busy", True))
    of(worker, crew, has_others=False).look()
    assert worker.alive
    assert not crew.resting


def test_a_worker_ends_at_last_whatever_goes_on(worker: Worker) -> None:
    clock = Clock()
    crew = Workload()
    crew.busy = True
    found = of(worker, crew, has_others=True, clock=clock)
    found.look()
    for _ in range(2):
        clock.now += 601
        found.look()
    assert not worker.alive


TURN = """
import sys
from types import SimpleNamespace
from assistream_flask.platform import gunicorn as server
server.setting = {"workers": 3}.get
server._START_SECONDS = 0.0
tenure = server.RequestLimit(SimpleNamespace(max_requests=1))
while sys.stdin.readline():
    print(tenure.has_turn(), flush=True)
"""


def test_of_the_workers_of_one_gunicorn_one_ends_at_a_time() -> None:
    start = partial(
        subprocess.Popen, [sys.executable, "-c", TURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def asked(worker: subprocess.Popen[str]) -> str:
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(file=worker.stdin, flush=True)
        return worker.stdout.readline().strip()

    with start() as one, start() as two:
        assert [asked(one), asked(two), asked(one)] == ["True", "False", "True"]
        one.kill()
        one.wait(20)
        assert asked(two) == "True"
