"""Workers that die, deploys, a Redis that goes away: nothing is lost, every viewer ends with the store's state."""

from __future__ import annotations

import os
import random
import signal
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from assistream_flask.events import Said
from assistream_flask.testing import OfflineServer, Reply, Request, scripted
from assistream_flask.upstream.items import closed, turns_of
from tests.cluster import APP, Cluster, clustered
from tests.conftest import wait_until
from tests.gunicorn_server import Gunicorn
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.watcher import Watcher, says, settle

KILLS = int(os.environ.get("ASSISTREAM_KILLS", "2"))
RESTARTS = int(os.environ.get("ASSISTREAM_RESTARTS", "2"))
OUTAGES = int(os.environ.get("ASSISTREAM_OUTAGES", "1"))


@pytest.mark.parametrize("assistant", ["tutor", "lasting"])
def test_what_a_worker_stored_and_could_not_tell_is_told_though_it_died(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer, assistant: str
) -> None:
    apart = clustered(tmp_path, own_redis, postgres.new_database(), gunicorns=2, workers=1, delay=0.05)
    with apart as cluster:
        one, two = cluster.gunicorns
        thread = two.thread()
        one.get(f"{thread}/messages")
        watcher = Watcher([two], thread)
        wait_until(lambda: watcher.snapshots, 20)
        one.run(thread, assistant)
        wait_until(lambda: len(watcher.entries) == 2 and says(watcher.entries[1]), 20)
        own_redis.ask("CONFIG", "SET", "maxmemory", "1")
        # The one is over by then, and the other's text was stored since.
        time.sleep(12 if assistant == "tutor" else 2.3)
        one.stop(signal.SIGKILL)
        own_redis.ask("CONFIG", "SET", "maxmemory", "0")
        entries = two.settled(thread, 60)
        assert entries[1]["run"]["status"] == "completed"
        wait_until(lambda: watcher.entries == entries, 40)
        assert watcher.faults == []


@pytest.fixture
def cluster(tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer) -> Iterator[Cluster]:
    with clustered(tmp_path, own_redis, postgres.new_database(), delay=0.05, heartbeat_seconds=2) as cluster:
        yield cluster


def watched(cluster: Cluster, threads: int, viewers: int = 2) -> dict[str, list[Watcher]]:
    """Threads with viewers, who are there."""
    gunicorn = cluster.gunicorns[0]
    found = {gunicorn.thread(): list[Watcher]() for _ in range(threads)}
    for at, (thread, watchers) in enumerate(found.items()):
        watchers += [Watcher(cluster.gunicorns, thread, 100 * at + viewer) for viewer in range(viewers)]
    wait_until(lambda: all(one.snapshots for watchers in found.values() for one in watchers), 30)
    return found


def commanded(gunicorn: Gunicorn, thread: str, *assistants: str, content: str = "Hello there") -> list[str]:
    """Start runs, through a break if need be: as the helper, under one key."""
    body = {"assistant_ids": assistants, "content": content}
    key = {"Idempotency-Key": os.urandom(8).hex()}
    end = time.monotonic() + 60
    while True:
        try:
            return [run["id"] for run in gunicorn.request("POST", f"{thread}/runs", body, key)["runs"]]
        except OSError as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code not in (502, 503)
            if refused or time.monotonic() > end:
                raise
            time.sleep(0.2)


def growing(cluster: Cluster, threads: dict[str, list[Watcher]]) -> None:
    """Wait until each thread's newest answer has begun."""
    wait_until(lambda: all(ones[0].entries and says(ones[0].entries[-1]) for ones in threads.values()), 30)


def whole_answer(entries: list[Any], entry: Any) -> str:
    """Give what the scripted model says to the thread as it was before this entry's message by the user."""
    at = entries.index(entry)
    asked = max(number for number in range(at) if entries[number]["run"] is None)
    said = [Said(one["assistant_id"], says(one)) for one in entries[: asked + 1]]
    turns = [(turn.role, turn.text) for turn in closed(turns_of(said, entry["assistant_id"], {}))]
    return scripted(Request("POST", "/v1/responses", {}, None, 0.0, model="m", messages=turns)).text or ""


def test_a_killed_workers_runs_end_within_15_seconds_and_lasting_ones_go_on(cluster: Cluster) -> None:
    gunicorn, choose = cluster.gunicorns[0], random.Random(1)
    threads = watched(cluster, 6)
    lost, lasting = set[str](), set[str]()
    for _ in range(KILLS):
        for at, thread in enumerate(threads):
            commanded(gunicorn, thread, *([["tutor"], ["lasting"], ["lasting", "tutor"]][at % 3]))
        growing(cluster, threads)
        time.sleep(choose.random() * 4)
        stored = {entry["message"]["id"]: says(entry) for thread in threads for entry in gunicorn.entries(thread)}
        os.kill(choose.choice(cluster.workers()), signal.SIGKILL)
        killed = time.monotonic()
        found = settle(gunicorn, threads)
        for entries in found.values():
            for entry in entries:
                text, before = says(entry), stored.get(entry["message"]["id"], "")
                assert text.startswith(before), (text, before)
                run = entry["run"]
                if run is not None and run["status"] == "failed":
                    assert run["last_error"]["code"] == "worker_lost"
                    assert run["assistant_id"] != "lasting"
                    assert run["failed_at"] <= time.time() - (time.monotonic() - killed) + 15
                    lost.add(run["id"])
                elif run is not None and run["assistant_id"] == "lasting":
                    assert run["status"] == "completed"
                    assert text == whole_answer(entries, entry)
                    lasting.add(run["id"])
    print(f"{KILLS} kills: {len(lost)} runs lost their worker, {len(lasting)} lasting ones completed")
    for ones in threads.values():
        for one in ones:
            one.stop()


def test_a_worker_killed_before_it_knew_its_responses_id_costs_no_second_one(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer
) -> None:
    with (
        OfflineServer([Reply("one two three", fault="stall_headers"), "another"]) as model,
        clustered(tmp_path, own_redis, postgres.new_database(), workers=2, model_url=model.base_url) as cluster,
    ):
        gunicorn = cluster.gunicorns[0]
        thread = gunicorn.thread()
        (run_id,) = gunicorn.run(thread, "lasting")
        wait_until(lambda: model._responses)
        for pid in cluster.workers():
            os.kill(pid, signal.SIGKILL)
        _, entry = gunicorn.settled(thread, 60)
        assert (entry["run"]["status"], says(entry)) == ("completed", "one two three")
        assert len(model._responses) == 1
        asked = [one.headers.get("idempotency-key") for one in model.requests if one.method == "POST"]
        assert asked == [f"{run_id}-0"] * 2


@pytest.mark.parametrize("adopts", [True, False], ids=["adopt", "no adopt"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP], ids=["killed", "deploy"])
def test_a_callables_assistants_go_on_in_another_worker_where_the_app_gives_them(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer, how: signal.Signals, adopts: bool
) -> None:
    adopt = ", adopt=lambda id, owner: next(one for one in assistants if one.id == id)" if adopts else ""
    app = APP.replace("create_blueprint(assistants", f"create_blueprint(lambda: assistants{adopt}")
    with clustered(tmp_path, own_redis, postgres.new_database(), app=app, workers=2, delay=0.3) as cluster:
        gunicorn, (before, *_) = cluster.gunicorns[0], cluster.workers()
        thread = gunicorn.thread()
        gunicorn.run(thread, "lasting")
        gunicorn.run(thread, "tutor", content="And you?")
        wait_until(lambda: says(gunicorn.entries(thread)[1]), 30)
        if how == signal.SIGHUP:
            gunicorn.process.send_signal(how)
        for pid in cluster.workers() if how == signal.SIGKILL else ():
            os.kill(pid, how)
        wait_until(lambda: before not in cluster.workers(), 30)
        runs = [entry["run"] for entry in gunicorn.settled(thread, 90) if entry["run"]]
    assert [run["assistant_id"] for run in runs] == ["lasting", "tutor"]
    codes = [run["last_error"] and run["last_error"]["code"] for run in runs]
    assert codes == ([None, None] if adopts else ["worker_lost", "worker_lost"])


def test_a_deploy_ends_streams_at_once_and_fails_no_run(cluster: Cluster) -> None:
    gunicorn, choose = cluster.gunicorns[0], random.Random(2)
    threads = watched(cluster, 6)
    slowest = 0.0
    for number in range(RESTARTS):
        for at, thread in enumerate(threads):
            commanded(gunicorn, thread, *([["tutor"], ["lasting"], ["critic", "tutor"]][at % 3]))
        growing(cluster, threads)
        time.sleep(choose.random() * 2)
        before = set(cluster.workers())
        began = time.monotonic()
        if number % 2:
            os.kill(choose.choice(sorted(before)), signal.SIGTERM)
        else:
            breaks = {one: one.breaks for ones in threads.values() for one in ones}
            gunicorn.process.send_signal(signal.SIGHUP)
            for one, count in breaks.items():
                wait_until(lambda one=one, count=count: one.breaks > count, 20)  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - began)
        for entries in settle(gunicorn, threads).values():
            assert {entry["run"]["status"] for entry in entries if entry["run"]} <= {"completed"}
    print(f"{RESTARTS} restarts: all streams had ended {slowest:.2f} s after the slowest SIGHUP")
    for ones in threads.values():
        for one in ones:
            one.stop()


def test_viewers_of_workers_that_have_served_their_max_requests_miss_nothing(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer
) -> None:
    options = ["--max-requests", "30", "--max-requests-jitter", "10"]
    with clustered(tmp_path, own_redis, postgres.new_database(), workers=2, delay=0.05, options=options) as cluster:
        gunicorn = cluster.gunicorns[0]
        threads = watched(cluster, 2)
        for thread in threads:
            commanded(gunicorn, thread, "tutor", "critic")
        growing(cluster, threads)
        # However they are shared out, one of the two has more than forty.
        for _ in range(100):
            gunicorn.get("/page", parse=False)
        wait_until(lambda: "Autorestarting worker" in cluster.log(), 90)
        for thread in threads:
            commanded(gunicorn, thread, "tutor")
        for entries in settle(gunicorn, threads).values():
            assert {entry["run"]["status"] for entry in entries if entry["run"]} == {"completed"}
        for ones in threads.values():
            for one in ones:
                one.stop()


@pytest.mark.parametrize("how", ["FLUSHALL", "restart", "away"])
def test_whatever_happens_to_redis_every_viewer_ends_with_the_stores_state(
    cluster: Cluster, own_redis: RedisServer, how: str
) -> None:
    gunicorn, choose = cluster.gunicorns[0], random.Random(how)
    threads = watched(cluster, 4)
    for _ in range(OUTAGES if how != "away" else 1):
        for at, thread in enumerate(threads):
            commanded(gunicorn, thread, *([["tutor"], ["lasting", "critic"]][at % 2]))
        growing(cluster, threads)
        time.sleep(choose.random() * 2)
        if how == "FLUSHALL":
            own_redis.ask("FLUSHALL")
        elif how == "restart":
            own_redis.stop()
            own_redis.start()
        else:
            own_redis.signal(choose.choice([signal.SIGSTOP, signal.SIGKILL]))
            time.sleep(float(os.environ.get("ASSISTREAM_AWAY_SECONDS", "4")))
            with pytest.raises(urllib.error.HTTPError) as refused:
                gunicorn.request("POST", f"{next(iter(threads))}/messages", {"content": "now?"})
            assert refused.value.code == 503
            assert refused.value.headers["Retry-After"]
            own_redis.signal(signal.SIGCONT)
            own_redis.start()
        for entries in settle(gunicorn, threads).values():
            assert {entry["run"]["status"] for entry in entries if entry["run"]} == {"completed"}
    for ones in threads.values():
        for one in ones:
            one.stop()
