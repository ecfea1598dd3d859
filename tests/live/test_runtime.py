"""What a process has one of: made once, whoever asks at the same time, and with gunicorn's worker."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from assistream_flask import extension
from assistream_flask.runs.runtime import Runtime
from assistream_flask.testing import OfflineServer
from tests.cluster import APP, clustered
from tests.conftest import Caller, MakeApp, at_once, quick_client, wait_until
from tests.gunicorn_server import ROOT, Gunicorn
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer


class Slow(Runtime):
    """One that takes a while to make."""

    made = 0

    def __init__(self, *given: Any) -> None:
        Slow.made += 1
        time.sleep(0.2)
        super().__init__(*given)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "made", 0)
    monkeypatch.setattr(extension, "Runtime", Slow)


def test_many_first_requests_at_once_make_one_runtime_and_all_are_served(make_app: MakeApp) -> None:
    app = make_app()
    found = at_once(40, lambda _: app.test_client().get("/assistream/threads").status_code)
    assert (found, Slow.made) == ([200] * 40, 1)


def test_many_first_runs_at_once_make_one_client(make_app: MakeApp, server: OfflineServer) -> None:
    made = list[openai.OpenAI]()

    def client() -> openai.OpenAI:
        time.sleep(0.2)
        made.append(quick_client(server))
        return made[-1]

    caller = Caller(make_app(client=client))
    caller.run("tutor", "critic", "poet")
    caller.wait()
    assert len(made) == 1
    made[0].close()


def test_where_no_runtime_can_be_made_all_who_wait_are_told_and_the_next_request_tries_again(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, tries = make_app(), list[int]()

    def away(*_: object) -> Runtime:
        tries.append(1)
        time.sleep(0.2)
        raise OperationalError("connect", {}, Exception("nobody is there"))

    def ask() -> int:
        return app.test_client().get("/assistream/threads").status_code

    monkeypatch.setattr(extension, "Runtime", away)
    assert at_once(40, lambda _: ask()) == [503] * 40
    assert len(tries) == 1
    monkeypatch.setattr(extension, "Runtime", Slow)
    assert (ask(), Slow.made) == (200, 1)


def test_after_its_runtime_was_closed_an_app_makes_another(make_app: MakeApp) -> None:
    state = make_app().extensions["assistream"]
    first = state.runtime()
    state.close()
    assert first.stopping.is_set()
    assert state.runtime() is not first


def test_who_is_stopped_while_it_makes_the_runtime_holds_up_nobody(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    begun = threading.Event()

    def killed(*given: Any) -> Runtime:
        monkeypatch.setattr(extension, "Runtime", Slow)
        begun.set()
        time.sleep(0.2)
        raise Killed

    state = make_app().extensions["assistream"]
    monkeypatch.setattr(extension, "Runtime", killed)

    def first() -> None:
        with pytest.raises(Killed):
            state.runtime()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(10)
    found = at_once(10, lambda _: state.runtime())
    thread.join()
    assert (len(set(map(id, found))), Slow.made) == (1, 1)


FORK = """
import os, sys, threading, time
from flask import Flask
from assistream_flask import Assistant, create_blueprint
from assistream_flask import extension

app = Flask("forked")
app.config.update(SECRET_KEY="k", ASSISTREAM_DATABASE_URL="sqlite:///" + sys.argv[1])
app.register_blueprint(create_blueprint([Assistant("a", model="m")]), url_prefix="/assistream")
state, begun, made = app.extensions["assistream"], threading.Event(), extension.Runtime

def slow(*given):
    begun.set()
    time.sleep(0.5)
    return made(*given)

extension.Runtime = slow
thread = threading.Thread(target=state.runtime)
thread.start()
begun.wait()
child = os.fork()
ours = state.runtime()
assert ours.pid == os.getpid()
assert app.test_client().get("/assistream/threads").status_code == 200
if child == 0:
    state.close()
    os._exit(0)
thread.join()
assert os.waitpid(child, 0)[1] == 0
state.close()
"""


def test_a_process_forked_while_the_runtime_is_made_makes_its_own(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FORK, tmp_path / "a.sqlite3"], env=env, check=True, timeout=60)


def connections(database_url: str) -> int:
    """Give how many others are connected to the database."""
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        return int(connection.exec_driver_sql(query).scalar() or 0)


def crowd(gunicorn: Gunicorn, thread: str, count: int) -> Counter[int]:
    """Open so many streams at once; give how often it was answered with which status."""
    lines = [http.client.HTTPConnection("127.0.0.1", gunicorn.port, timeout=60) for _ in range(count)]
    for line in lines:
        line.request("GET", f"{thread}/events")
    found = Counter(line.getresponse().status for line in lines)
    for line in lines:
        line.close()
    return found


def test_a_crowd_on_fresh_workers_takes_no_more_connections_than_their_pools_and_all_of_it_is_served(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer
) -> None:
    url, most, over = postgres.new_database(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, connections(url))

    watcher = threading.Thread(target=watch)
    options = {"max_streams": 1000, "database_pool": 5}
    with clustered(tmp_path, own_redis, url, workers=2, **options) as cluster:
        (gunicorn,) = cluster.gunicorns
        thread = gunicorn.thread()
        gunicorn.stop()
        gunicorn.start()
        watcher.start()
        found = crowd(gunicorn, thread, 300)
        over.set()
        watcher.join()
    assert found == {200: 300}
    assert 0 < most <= 10


# It begins with gunicorn's worker


def statuses(database_url: str) -> Counter[str]:
    """Give the runs' statuses, as they are in the database."""
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return Counter(row[0] for row in connection.exec_driver_sql("SELECT status FROM assistream_runs"))


def silently(gunicorn: Gunicorn) -> None:
    """Start gunicorn, and sends no request."""
    gunicorn.get = lambda path, *, parse=True: None  # type: ignore[method-assign]
    gunicorn.start()
    del gunicorn.get


@pytest.mark.parametrize("options", [[], ["--preload", "-c", str(ROOT / "gunicorn.conf.py")]], ids=["", "preload"])
def test_where_all_workers_died_their_runs_end_and_what_waited_is_done_without_a_request(
    tmp_path: Path,
    own_redis: RedisServer,
    postgres: PostgresServer,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # For gunicorn.conf.py.
    monkeypatch.setenv("ASSISTREAM_REDIS_URL", own_redis.url)
    url = postgres.new_database()
    with clustered(tmp_path, own_redis, url, workers=2, delay=0.1, options=options) as cluster:
        (gunicorn,) = cluster.gunicorns
        thread = gunicorn.thread()
        gunicorn.run(thread, "tutor", "critic")
        gunicorn.run(thread, "tutor")
        wait_until(lambda: statuses(url) == {"in_progress": 2, "queued": 1})
        gunicorn.stop(signal.SIGKILL)
        silently(gunicorn)
        wait_until(lambda: statuses(url) == {"failed": 2, "completed": 1}, 60)


def test_a_worker_that_cannot_begin_says_so_once_and_begins_when_it_can(tmp_path: Path, own_redis: RedisServer) -> None:
    folder = tmp_path / "not yet"
    with clustered(tmp_path, own_redis, f"sqlite:///{folder}/a.sqlite3", workers=1) as cluster:
        wait_until(lambda: "could not begin with its worker" in cluster.log())
        time.sleep(6)
        folder.mkdir()
        wait_until(lambda: (folder / "a.sqlite3").exists(), 20)
        assert cluster.log().count("could not begin with its worker") == 1


USES = """
import sys, threading
sys.argv = ["flask", "--app", "live_app", *sys.argv[1:]]
from flask.cli import main
try:
    main()
except SystemExit:
    pass
import live_app
assert not [one.name for one in threading.enumerate() if one.name.startswith("assistream")]
"""


@pytest.mark.parametrize("command", [["routes"], ["assistream", "doctor"], ["shell"]], ids=lambda one: one[-1])
def test_a_process_that_serves_nothing_makes_no_runtime(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "live_app.py").write_text(APP)
    config = f'{{"ASSISTREAM_DATABASE_URL": "sqlite:///{tmp_path}/a.sqlite3"}}'
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "APP_CONFIG": config, "MODEL_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", USES, *command],
        cwd=tmp_path,
        env=env,
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
