"""An SQLite file that another process has locked: who needs it waits, and all others go on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError, SQLAlchemyError, TimeoutError

from assistream_flask.store import database
from assistream_flask.store.sql import ThreadStore
from tests.conftest import at_once, wait_until
from tests.contract.test_store import ME, new_thread
from tests.gunicorn_server import Gunicorn, running, stream
from tests.watcher import Watcher, says, settle

WORDS = " ".join(f"w{at}" for at in range(600))
APP = f"""
import json, os
from flask import Flask
from assistream_flask import Assistant, create_blueprint
from assistream_flask.testing import OfflineServer

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", **json.loads(os.environ["APP_CONFIG"]))
servers = []

def client():
    servers.append(OfflineServer("{WORDS}", delay=0.03).start())
    return servers[0].client()

app.register_blueprint(
    create_blueprint([Assistant("one", model="m")], client=client, owner=lambda: "me"), url_prefix="/assistream"
)

@app.get("/page")
def page():
    return "up"
"""
HOLD = """
import sqlite3, sys
held = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2:]:
    held.execute(statement)
print("held", flush=True)
sys.stdin.read()
"""
# A worker's open connections keep others from more than the first, so the second has to come before them.
WRITING = ("BEGIN IMMEDIATE",)
ALONE = ("PRAGMA locking_mode=EXCLUSIVE", "BEGIN EXCLUSIVE", "CREATE TABLE theirs (number)")


@contextlib.contextmanager
def locked(path: Path, *statements: str) -> Iterator[None]:
    """Have another process hold the file's lock."""
    command = [sys.executable, "-c", HOLD, str(path), *statements]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield


class Arrivals:
    """When each thing came, which ``things`` gives, in a thread of its own."""

    def __init__(self, things: Callable[[], Iterator[object]]) -> None:
        self._things = things
        self.times = [time.monotonic()]
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        # The server goes away in the end.
        with contextlib.suppress(OSError):
            for _ in self._things():
                self.times.append(time.monotonic())

    def longest(self, since: float, until: float) -> float:
        """Give the longest time without any, in seconds."""
        times = [since, *(at for at in self.times if since < at < until), until]
        return max(after - before for before, after in pairwise(times))


def asked(gunicorn: Gunicorn) -> Iterator[object]:
    """Give the app's answers, one after another."""
    while True:
        yield gunicorn.get("/page", parse=False)
        time.sleep(0.1)


def added(gunicorn: Gunicorn, thread: str) -> Any:
    """Give a message that is sent until it is stored, as the helper does; give it and what it got before."""
    refused: list[tuple[int, str]] = []
    while True:
        try:
            return gunicorn.request("POST", f"{thread}/messages", {"content": "Hi"}, {"Idempotency-Key": "k"}), refused
        except urllib.error.HTTPError as error:
            refused.append((error.code, json.load(error)["error"]["code"]))
            time.sleep(0.5)


def test_while_another_process_writes_streams_and_other_requests_go_on_and_nothing_is_lost(tmp_path: Path) -> None:
    with running(tmp_path, app=APP, heartbeat_seconds=1) as gunicorn:
        thread, end_unless_locked = gunicorn.thread(), gunicorn.thread()
        viewers = {thread: [Watcher([gunicorn], thread)], end_unless_locked: [Watcher([gunicorn], end_unless_locked)]}
        gunicorn.run(thread, "one")
        wait_until(lambda: viewers[thread][0].entries and says(viewers[thread][0].entries[-1]), 30)
        words = Arrivals(lambda: (one for one in stream(gunicorn, f"{thread}/events") if one.name.endswith(".delta")))
        pings = Arrivals(lambda: stream(gunicorn, f"{end_unless_locked}/events"))
        answers = Arrivals(lambda: asked(gunicorn))
        wait_until(lambda: min(len(words.times), len(pings.times), len(answers.times)) > 2)
        messages: list[Any] = []
        sending = threading.Thread(target=lambda: messages.append(added(gunicorn, end_unless_locked)))
        with locked(tmp_path / "live.sqlite3", *WRITING):
            since = time.monotonic()
            sending.start()
            # Longer than one may wait for it.
            time.sleep(14)
            until = time.monotonic()
        assert pings.longest(since, until) < 4
        assert answers.longest(since, until) < 3
        assert words.longest(since, since + 4) < 2
        sending.join(30)
        assert set(messages[0][1]) <= {(503, "store_unavailable")}
        found = settle(gunicorn, viewers)
        assert found[thread][-1]["run"]["status"] == "completed"
        assert says(found[thread][-1]) == WORDS
        assert [entry["message"]["id"] for entry in found[end_unless_locked]] == [messages[0][0]["message"]["id"]]
        for watchers in viewers.values():
            watchers[0].stop()


def test_while_another_process_has_the_file_for_itself_a_worker_that_opens_it_goes_on(tmp_path: Path) -> None:
    with contextlib.ExitStack() as closing:
        # The worker opens the file as soon as it has booted.
        with locked(tmp_path / "live.sqlite3", *ALONE):
            gunicorn = closing.enter_context(running(tmp_path, app=APP))
            threads: list[str] = []
            asking = threading.Thread(target=lambda: threads.append(gunicorn.thread()))
            answers = Arrivals(lambda: asked(gunicorn))
            asking.start()
            since = time.monotonic()
            time.sleep(5)
            until = time.monotonic()
        assert answers.longest(since, until) < 3
        asking.join(30)
        assert gunicorn.entries(threads[0]) == []


def test_without_gevent_a_lock_is_waited_for_too(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    with contextlib.closing(ThreadStore(f"sqlite:///{path}")) as store:
        writing = threading.Thread(target=lambda: new_thread(store))
        with locked(path, *WRITING):
            writing.start()
            writing.join(1)
            # Reading waits for nobody who writes.
            assert store.threads(ME, 10, None) == ([], False)
            assert writing.is_alive()
        writing.join(10)
        found = store.threads(ME, 10, None)
        assert found is not None
        assert len(found[0]) == 1


def test_of_many_who_wait_for_a_lock_none_waits_for_all_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_LOCKED_SECONDS", 1.0)
    with contextlib.closing(ThreadStore(f"sqlite:///{tmp_path / 'a.sqlite3'}", patience=1.5)) as store:
        with locked(tmp_path / "a.sqlite3", *WRITING):
            began = time.monotonic()
            errors = at_once(12, lambda _: new_thread(store))
            took = time.monotonic() - began
        assert [type(error) for error in errors if not isinstance(error, SQLAlchemyError)] == []
        assert {type(error) for error in errors} == {OperationalError, TimeoutError}
        assert took < 8
        new_thread(store)
