"""Tool loops over two workers that are killed anywhere, and many answers to one question: each call is made once.

``ASSISTREAM_KILLS=200`` kills so often.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from assistream_flask.testing import OfflineServer, Reply, Request, ToolCall
from tests.cluster import Cluster, clustered
from tests.conftest import at_once
from tests.gunicorn_server import Gunicorn
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

KILLS = int(os.environ.get("ASSISTREAM_KILLS", "3"))
DIALECTS: Final = ("responses", "chat", "assistants")
LEASE_SECONDS: Final = 3.0
APP: Final = """
import json, os, random, sys, time
from flask import Flask, jsonify
from openai import OpenAI
from assistream_flask import Assistant, ToolContext, create_blueprint, tool

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", **json.loads(os.environ["APP_CONFIG"]))
# What a dead worker had is the other's sooner, and that of one that is merely slow too.
for module in list(sys.modules.values()):
    if module.__name__.startswith("assistream_flask") and hasattr(module, "LEASE_SECONDS"):
        module.LEASE_SECONDS = float(os.environ["LEASE_SECONDS"])

def note(context, name):
    file = os.open(os.environ["EXECUTED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{name} {context.run_id} {context.tool_call_id}\\n".encode())
    os.close(file)
    time.sleep(random.random() * 0.4)

@tool
def order(query: str, context: ToolContext) -> str:
    "Order something."
    note(context, "order")
    return query

@tool(idempotent=True)
def look(query: str, context: ToolContext) -> str:
    "Look something up."
    note(context, "look")
    return query

@tool(approval=True, sequential=True)
def pay(query: str, context: ToolContext) -> str:
    "Pay."
    note(context, "pay")
    return query

clerks = [Assistant(one, model="m", upstream=one, tools=[order, look, pay], max_rounds=20)
          for one in ("responses", "chat", "assistants")]
app.register_blueprint(
    create_blueprint(clerks, client=lambda: OpenAI(base_url=os.environ["MODEL_URL"], api_key="k"), owner=lambda: "me"),
    url_prefix="/assistream",
)

@app.get("/page")
def page():
    return "<!doctype html><title>test</title>"

@app.get("/pid")
def pid():
    return jsonify(os.getpid())
"""


def model(request: Request) -> Reply:
    """Call so many tools as the user's last message says, some at a time."""
    last = max(at for at, (role, _) in enumerate(request.messages) if role == "user")
    words = request.messages[last][1].split()
    wanted = int(words[-1]) if words[-1].isdigit() else 0
    left = wanted - sum(role == "tool" for role, _ in request.messages[last:])
    if left <= 0 or not request.may_call:
        return Reply("All of it is done.")
    names = random.choices(["order", "look", "pay"], [5, 3, 1], k=min(left, random.choice([1, 1, 2, 3])))
    return Reply(
        random.choice(["", "One moment."]),
        calls=[ToolCall(name, {"query": f"{random.random()}"}) for name in names],
    )


def made(cluster_folder: Path) -> Counter[tuple[str, ...]]:
    """Count how often each call was executed, by its tool, its run and its id."""
    file = cluster_folder / "executed"
    return Counter(tuple(line.split()) for line in file.read_text().splitlines()) if file.exists() else Counter()


def cluster_of(
    folder: Path, redis: RedisServer, postgres: PostgresServer, model_url: str, monkeypatch: Any, workers: int = 2
) -> Any:
    monkeypatch.setenv("EXECUTED", str(folder / "executed"))
    monkeypatch.setenv("LEASE_SECONDS", str(LEASE_SECONDS))
    return clustered(folder, redis, postgres.new_database(), workers=workers, model_url=model_url, app=APP)


class Customer:
    """Asks in a thread of one dialect again and again, and answers what it is asked. Workers may die meanwhile."""

    def __init__(self, gunicorn: Gunicorn, dialect: str, number: int) -> None:
        self._gunicorn, self.dialect, self._choose = gunicorn, dialect, random.Random(number)
        self.thread = gunicorn.thread()
        self.ended: Counter[str] = Counter()
        self.error: BaseException | None = None

    def work(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self.ask(self._choose.randrange(1, 7))
        except BaseException as error:
            self.error = error

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Ask until there is an answer, as the helper does."""
        end = time.monotonic() + 90
        while True:
            try:
                return self._gunicorn.request(method, path, body, headers)
            except OSError as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code not in (502, 503)
                if refused or time.monotonic() > end:
                    raise
            except Exception:  # a worker died in the midst of its answer
                assert time.monotonic() < end
            time.sleep(0.2)

    def ask(self, calls: int) -> Any:
        body = {"assistant_ids": [self.dialect], "content": f"Do {calls}"}
        key = {"Idempotency-Key": os.urandom(8).hex()}
        run_id = self.request("POST", f"{self.thread}/runs", body, key)["runs"][0]["id"]
        end = time.monotonic() + 120
        while True:
            entries = self.request("GET", f"{self.thread}/messages?limit=200")["data"]
            run = next(one["run"] for one in entries if one["run"] and one["run"]["id"] == run_id)
            if run["status"] == "requires_action":
                self.answer(run)
            elif run["status"] not in ("queued", "in_progress"):
                break
            assert time.monotonic() < end, f"stuck: {run}"
            time.sleep(0.2)
        self.ended[run["status"] if run["last_error"] is None else run["last_error"]["code"]] += 1
        return run

    def answer(self, run: Any) -> None:
        asked = run["required_action"]["submit_tool_outputs"]["tool_calls"]
        body = {"approvals": [{"tool_call_id": one["id"], "approve": True} for one in asked]}
        try:
            self.request("POST", f"{self.thread}/runs/{run['id']}/approvals", body)
        except urllib.error.HTTPError as error:
            # It was taken, and who took it died before it could say so.
            if error.code != 409:
                raise


def kill_some(cluster: Cluster, customers: list[Customer], choose: random.Random) -> None:
    """Kill one of two workers that serve, again and again; a third one starts meanwhile."""
    seen = set[int]()
    for number in range(KILLS):
        end = time.monotonic() + 90
        while len(serving := seen & set(cluster.workers())) < 2:
            assert time.monotonic() < end, cluster.log()[-3000:]
            with contextlib.suppress(OSError, http.client.HTTPException):
                seen.add(cluster.gunicorns[0].get("/pid"))
            time.sleep(0.02)
        # Some die before what the last one had is taken over, some after.
        time.sleep(choose.choice([0.5, 2.5, 5]) * choose.random())
        victim = choose.choice(sorted(serving))
        seen.discard(victim)
        os.kill(victim, signal.SIGKILL)
        assert [one.error for one in customers if one.error] == []
        if KILLS > 20 and number % 10 == 9:
            print(f"{number + 1} kills: {dict(sum((one.ended for one in customers), Counter[str]()))}", flush=True)


def test_of_tool_loops_over_workers_that_are_killed_each_call_is_made_once_and_no_thread_is_stuck(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    with (
        OfflineServer(model, delay=0.02, keep=100_000) as server,
        cluster_of(tmp_path, own_redis, postgres, server.base_url, monkeypatch, workers=3) as cluster,
    ):
        gunicorn = cluster.gunicorns[0]
        customers = [Customer(gunicorn, DIALECTS[at % 3], at) for at in range(9)]
        jobs = [threading.Thread(target=one.work, args=(stop,)) for one in customers]
        for job in jobs:
            job.start()
        try:
            kill_some(cluster, customers, random.Random(4))
        finally:
            stop.set()
            for job in jobs:
                job.join(150)
        assert [one.error for one in customers if one.error] == []
        last = [one.ask(2) for one in customers]
        entries = [entry for one in customers for entry in gunicorn.entries(one.thread) if entry["run"]]
        log = cluster.log()
    assert {run["status"] for run in last} == {"completed"}
    executed = made(tmp_path)
    twice = {one: count for one, count in executed.items() if count > 1 and one[0] != "look"}
    again = sum(count > 1 for count in executed.values())
    calls = [
        (entry["run"]["id"], call)
        for entry in entries
        for step in entry["steps"]
        for call in step["step_details"].get("tool_calls", ())
    ]
    ended = sum((one.ended for one in customers), Counter[str]())
    print(
        f"{KILLS} kills, {log.count('is taken over')} runs taken over: {dict(ended)};"
        f" {len(executed)} calls executed, {again} idempotent ones again,"
        f" {dict(Counter(call['status'] for _, call in calls))}"
    )
    assert twice == {}
    assert set(ended) <= {"completed", "worker_lost"}
    assert {call["status"] for _, call in calls} <= {"completed", "interrupted"}
    done = [(call["function"]["name"], id, call["id"]) for id, call in calls if call["status"] == "completed"]
    assert [one for one in done if one not in executed] == []


@pytest.mark.parametrize("dialect", DIALECTS)
def test_of_a_hundred_answers_at_once_over_two_workers_one_is_taken(
    tmp_path: Path,
    own_redis: RedisServer,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    dialect: str,
) -> None:
    replies = [Reply(calls=[ToolCall("pay", {"query": "x"})]), Reply("Paid.")]
    with (
        OfflineServer(replies, delay=0) as server,
        cluster_of(tmp_path, own_redis, postgres, server.base_url, monkeypatch) as cluster,
    ):
        gunicorn = cluster.gunicorns[0]
        thread = gunicorn.thread()
        [run_id] = gunicorn.run(thread, dialect)
        end = time.monotonic() + 30
        while (run := gunicorn.entries(thread)[1]["run"])["status"] != "requires_action":
            assert time.monotonic() < end, run
            time.sleep(0.1)
        [asked] = run["required_action"]["submit_tool_outputs"]["tool_calls"]

        def answer(number: int) -> tuple[int, Any]:
            # Each says something else, so that it can be told whose is taken.
            decided = {"tool_call_id": asked["id"], "approve": True, "arguments": {"query": f"{number}"}}
            while True:
                try:
                    gunicorn.request("POST", f"{thread}/runs/{run_id}/approvals", {"approvals": [decided]})
                except urllib.error.HTTPError as error:
                    if error.code != 503:
                        return error.code, json.load(error)["error"]
                    # So many wait for the thread that not all get their turn in time.
                    time.sleep(float(error.headers["Retry-After"]))
                else:
                    return 200, number

        found = at_once(100, answer)
        _, entry = gunicorn.settled(thread)
        assert Counter(status for status, _ in found) == {200: 1, 409: 99}
        [winner] = [number for status, number in found if status == 200]
        told = [error for status, error in found if status == 409]
        assert {error["code"] for error in told} == {"already_answered"}
        assert {error["decision"]["arguments"]["query"] for error in told} == {f"{winner}"}
        [call] = entry["steps"][0]["step_details"]["tool_calls"]
        assert (call["status"], call["function"]["output"]) == ("completed", f"{winner}")
        assert entry["run"]["status"] == "completed"
    assert made(tmp_path) == {("pay", run_id, asked["id"]): 1}
