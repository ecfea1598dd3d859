"""What most tests need: an offline model server, apps that talk to it, and a caller of their routes."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import openai
import pytest
from flask import Flask
from flask.testing import FlaskClient

from assistream_flask import Assistant, create_blueprint
from assistream_flask.store.sql import ThreadStore
from assistream_flask.testing import OfflineServer
from tests.postgres_server import database_url as database_url
from tests.postgres_server import postgres as postgres
from tests.redis_server import own_redis as own_redis
from tests.redis_server import redis_server as redis_server
from tests.watcher import made as watchers

KEY = "sk-secret-of-the-tests"
ASSISTANTS = (
    Assistant("tutor", model="m", instructions="You are a tutor.", name="Tutor"),
    Assistant("critic", model="m", instructions="You are a critic.", name="Critic"),
    Assistant("poet", model="m", instructions="You are a poet.", upstream="chat", name="Poet"),
)
OVER = ("completed", "incomplete", "failed", "cancelled", "expired")


def examples(count: int) -> int:
    """Give how many examples Hypothesis is to try: ``count``, in the ratio of ``ASSISTREAM_TRIALS`` to its 80."""
    return max(1, count * int(os.environ.get("ASSISTREAM_TRIALS", "80")) // 80)


# Files of long tests that share nothing, or a server that is soon started. Those of any other are run one after another
# by one of pytest-xdist's workers, as servers and browsers are started once a file.
APART = (
    "test_complaints",
    "test_crashes",
    "test_failing_servers",
    "test_fast",
    "test_leaks",
    "test_live",
    "test_locked_database",
    "test_pace",
    "test_runner",
    "test_runtime",
    "test_threaded",
    "test_tool_histories",
    "test_worker_restart",
)


# Fixtures that start a server in a process of its own. What starts one itself is of the other three kinds.
SERVERS = {"own_redis", "postgres", "redis_server"}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.path.stem not in APART:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        # A kind is a folder; pytest knows no mark of another name (--strict-markers).
        kind = item.path.parent.name
        item.add_marker(kind)
        if kind not in ("unit", "contract") or SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("server")


def pytest_collection_finish() -> None:
    # What was imported stays: to look at all of it takes a quarter of a second, each time that garbage is collected.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_watcher_outlives_its_test() -> Iterator[None]:
    yield
    # It would come back for ever to a port that a later test's server may have.
    while watchers:
        watchers.pop().stop()


def quick_client(server: OfflineServer, **options: Any) -> openai.OpenAI:
    """Give the SDK's ordinary client, without the certificates that take longer to load than most tests run."""
    http_client = openai.DefaultHttpxClient(verify=False)
    return server.client(**{"api_key": KEY, "http_client": http_client, **options})


@pytest.fixture
def server() -> Iterator[OfflineServer]:
    with OfflineServer(delay=0) as server:
        yield server


class MakeApp(Protocol):
    """Gives an app with the blueprint at /assistream; ``settings`` are ASSISTREAM_* in lower case."""

    def __call__(
        self,
        assistants: Sequence[Assistant] | Callable[[], Sequence[Assistant]] = ...,
        *,
        owner: Callable[[], str | None] | None = ...,
        client: openai.OpenAI | Callable[[], openai.OpenAI] | None = ...,
        adopt: Callable[[str, str], Assistant | None] | None = ...,
        **settings: Any,
    ) -> Flask: ...


@functools.cache
def new_database() -> bytes:
    """Give what is in a SQLite database that an app has just made: to make it takes longer than to copy it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "new.sqlite3"
        ThreadStore(f"sqlite:///{file}").close()
        return file.read_bytes()


@contextlib.contextmanager
def apps_of(server: OfflineServer, folder: Path) -> Iterator[MakeApp]:
    """Give a maker of apps that share the database in ``folder``, and close all of them at the end."""
    database = folder / "test.sqlite3"
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(quick_client(server))

        def make(
            assistants: Sequence[Assistant] | Callable[[], Sequence[Assistant]] = ASSISTANTS,
            *,
            owner: Callable[[], str | None] | None = None,
            client: openai.OpenAI | Callable[[], openai.OpenAI] | None = None,
            adopt: Callable[[str, str], Assistant | None] | None = None,
            **settings: Any,
        ) -> Flask:
            if not database.exists():
                database.write_bytes(new_database())
            app = Flask("app", instance_path=str(folder))
            app.config["SECRET_KEY"] = "only for tests"
            defaults = {
                "database_url": f"sqlite:///{database}",
                "drain_seconds": 0,
                "heartbeat_seconds": 0.2,
                # All of a test's callers have one address.
                "address_sessions": 0,
            }
            app.config.update((f"ASSISTREAM_{name.upper()}", value) for name, value in {**defaults, **settings}.items())
            app.register_blueprint(
                create_blueprint(assistants, owner=owner, client=client or ours, adopt=adopt), url_prefix="/assistream"
            )
            stack.callback(app.extensions["assistream"].close)
            return app

        yield make


@pytest.fixture
def make_app(server: OfflineServer, tmp_path: Path) -> Iterator[MakeApp]:
    """Apps of one test."""
    with apps_of(server, tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeApp]:
    """Apps for all tests of a file: for tests that change nothing but threads of their own. An app a test takes longer
    than most tests do."""
    with OfflineServer(delay=0) as server, apps_of(server, tmp_path_factory.mktemp("shared")) as make:
        yield make


def wait_until(true: Callable[[], object], seconds: float = 10) -> None:
    """Wait for a condition; generous, since a busy machine is no failure."""
    end, pause = time.monotonic() + seconds, 0.01
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(pause)
        # Most ask a route each time: a hundred requests a second leave little of a core to what is waited for.
        pause = min(pause * 1.5, 0.05)


def at_once(count: int, work: Callable[[int], object]) -> list[Any]:
    """Call ``work(n)`` in ``count`` threads that begin together; give what each gave, or raised."""
    gate, found = threading.Barrier(count), list[Any]([None] * count)

    def one(n: int) -> None:
        gate.wait()
        try:
            found[n] = work(n)
        except Exception as error:
            found[n] = error

    threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


class Caller:
    """One caller with one thread, through the app's routes, who comes from ``address``."""

    def __init__(self, app: Flask, thread_id: str | None = None, address: str = "127.0.0.1") -> None:
        self.client: FlaskClient = app.test_client()
        self.client.environ_base["REMOTE_ADDR"] = address
        if thread_id is None:
            answer = self.client.post("/assistream/threads", json={})
            assert answer.status_code == 201, answer.text
            thread_id = answer.get_json()["id"]
        self.thread_id: str = thread_id
        self.url = f"/assistream/threads/{self.thread_id}"

    def run(self, *assistant_ids: str, content: str | None = "Hi", mode: str = "parallel") -> list[str]:
        """Start runs; give their ids."""
        body = {"assistant_ids": assistant_ids, "content": content, "mode": mode}
        answer = self.client.post(f"{self.url}/runs", json=body)
        assert answer.status_code == 202, answer.text
        return [run["id"] for run in answer.get_json()["runs"]]

    def cancel(self, run_id: str) -> dict[str, Any]:
        answer = self.client.post(f"{self.url}/runs/{run_id}/cancel", json={})
        assert answer.status_code == 202, answer.text
        run: dict[str, Any] = answer.get_json()
        return run

    def entries(self) -> list[dict[str, Any]]:
        answer = self.client.get(f"{self.url}/messages?limit=200")
        assert answer.status_code == 200, answer.text
        data: list[dict[str, Any]] = answer.get_json()["data"]
        return data

    def entry(self, run_id: str) -> dict[str, Any]:
        return next(entry for entry in self.entries() if entry["run"] and entry["run"]["id"] == run_id)

    def wait(self, seconds: float = 10) -> list[dict[str, Any]]:
        """Wait for all runs to be over; give the entries."""
        wait_until(lambda: all(one["run"]["status"] in OVER for one in self.entries() if one["run"]), seconds)
        return self.entries()


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    return make_app()


@pytest.fixture
def caller(app: Flask) -> Caller:
    return Caller(app)


def text(entry: Mapping[str, Any]) -> str:
    """Give all that an entry says."""
    return "".join(part.get("refusal") or part["text"]["value"] for part in entry["message"]["content"])
