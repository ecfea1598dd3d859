"""Spans under gunicorn and gevent, where runs, coroutines and requests share one thread: none is below another's."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.conftest import at_once
from tests.gunicorn_server import Gunicorn, running

APP: Final = """
import asyncio, json, os, time
from flask import Flask, request
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from assistream_flask import Assistant, create_blueprint, tool
from assistream_flask.testing import OfflineServer, Reply, ToolCall

provider = TracerProvider()
written = open("spans.jsonl", "a", buffering=1)
exporter = ConsoleSpanExporter(out=written, formatter=lambda span: span.to_json(indent=None) + "\\n")
provider.add_span_processor(BatchSpanProcessor(exporter))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("app")

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", **json.loads(os.environ["APP_CONFIG"]))

def note(name, number):
    with tracer.start_as_current_span(f"in {name}", attributes={"number": number}):
        time.sleep(0.02)
    return f"{number}"

@tool
def plain(number: int) -> str:
    "Plainly."
    return note("plain", number)

@tool(thread=True)
def apart(number: int) -> str:
    "In a thread of the system's."
    return note("apart", number)

@tool
async def waiting(number: int) -> str:
    "In a coroutine."
    with tracer.start_as_current_span("in waiting", attributes={"number": number}):
        await asyncio.sleep(0.02)
    return f"{number}"

@tool(approval=True)
def pay(number: int) -> str:
    "Pay."
    return note("pay", number)

def model(request):
    role, said = request.messages[-1]
    word, _, number = said.partition(" ")
    if role != "user":
        return Reply("Done.")
    if word == "stall":
        return Reply("one two three", fault="stall")
    names = ["pay"] if word == "pay" else ["plain", "apart", "waiting"] * 2
    return Reply("One moment.", calls=[ToolCall(name, {"number": int(number)}) for name in names])

servers = []

def client():
    servers.append(OfflineServer(delay=0.005, replies=model).start())
    return servers[0].client()

clerks = [Assistant(one, model="m", upstream=one, tools=[plain, apart, waiting, pay])
          for one in ("responses", "chat", "assistants")]
app.register_blueprint(create_blueprint(clerks, client=client, owner=lambda: "me"), url_prefix="/assistream")

@app.get("/page")
def page():
    return "<!doctype html><title>test</title>"

inner = app.wsgi_app

def traced(environ, start_response):
    # As the instrumentations of servers do it.
    with tracer.start_as_current_span("request", attributes={"path": environ["PATH_INFO"]}):
        return inner(environ, start_response)

app.wsgi_app = traced
"""


class Span:
    """A span as the exporter wrote it."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.name: str = told["name"]
        self.id: tuple[str, str] = (told["context"]["trace_id"], told["context"]["span_id"])
        self.parent = (told["context"]["trace_id"], told["parent_id"]) if told["parent_id"] else None
        self.says: dict[str, Any] = told["attributes"]
        self.links = [(link["context"]["trace_id"], link["context"]["span_id"]) for link in told["links"]]


def written(folder: Path) -> list[Span]:
    return [Span(json.loads(line)) for line in (folder / "spans.jsonl").read_text().splitlines()]


def ask(gunicorn: Gunicorn, number: int) -> str:
    """Have a thread of its own ask; give its path."""
    thread = gunicorn.thread()
    gunicorn.run(thread, ("responses", "chat", "assistants")[number % 3], content=f"look {number}")
    return thread


def until(gunicorn: Gunicorn, thread: str, status: str) -> dict[str, Any]:
    end = time.monotonic() + 40
    while True:
        found: dict[str, Any] = gunicorn.entries(thread)[-1]["run"]
        if found["status"] == status:
            return found
        assert time.monotonic() < end, gunicorn.log()
        time.sleep(0.05)


def test_of_many_runs_at_once_each_has_its_own_tree(tmp_path: Path) -> None:
    with running(tmp_path, app=APP) as gunicorn:
        threads = at_once(20, lambda number: ask(gunicorn, number))
        assert [one for one in threads if not isinstance(one, str)] == []
        for thread in threads:
            assert gunicorn.settled(thread)[-1]["run"]["status"] == "completed", gunicorn.log()
    # What is written at the end of the worker was not lost.
    spans = written(tmp_path)
    known = {span.id: span for span in spans}
    assert len(known) == len(spans)
    kinds = Counter(span.name.split()[0] for span in spans if span.name != "request")
    assert kinds == {"invoke_agent": 20, "chat": 40, "execute_tool": 120, "in": 120}
    numbers: set[int] = set()
    for span in spans:
        if not span.name.startswith("in "):
            continue
        assert span.parent is not None
        executed = known[span.parent]
        assert executed.name == span.name.replace("in ", "execute_tool ")
        assert executed.parent is not None
        agent = known[executed.parent]
        thread = threads[span.says["number"]].rpartition("/")[2]
        assert agent.says["gen_ai.conversation.id"] == thread
        assert agent.parent is not None
        asked = known[agent.parent]
        assert (asked.name, asked.says["path"]) == ("request", f"/assistream/threads/{thread}/runs")
        # Nothing is left of it for who has the greenlet next.
        assert asked.parent is None
        numbers.add(span.says["number"])
    assert numbers == set(range(20))
    for chat in spans:
        if chat.name.startswith("chat"):
            assert chat.parent is not None
            assert known[chat.parent].says["gen_ai.conversation.id"] == chat.says["gen_ai.conversation.id"]
            assert chat.says["gen_ai.response.id"]
    assert "opentelemetry" not in gunicorn.log()
    assert "a span is lost" not in gunicorn.log()


def test_a_run_that_waits_one_that_is_cancelled_and_one_that_is_cut_at_the_end_lose_no_span(tmp_path: Path) -> None:
    with running(tmp_path, app=APP, drain_seconds=0.5) as gunicorn:
        waits, cancelled, cut = (gunicorn.thread() for _ in range(3))
        [paying] = gunicorn.run(waits, "responses", content="pay 1")
        [stalled] = gunicorn.run(cancelled, "responses", content="stall 2")
        gunicorn.run(cut, "chat", content="stall 3")
        run = until(gunicorn, waits, "requires_action")
        [call] = run["required_action"]["submit_tool_outputs"]["tool_calls"]
        body = {"approvals": [{"tool_call_id": call["id"], "approve": True}]}
        gunicorn.request("POST", f"{waits}/runs/{paying}/approvals", body)
        until(gunicorn, waits, "completed")
        until(gunicorn, cancelled, "in_progress")
        gunicorn.request("POST", f"{cancelled}/runs/{stalled}/cancel", {})
        until(gunicorn, cancelled, "cancelled")
        until(gunicorn, cut, "in_progress")
        time.sleep(0.2)
    spans = written(tmp_path)
    known = {span.id: span for span in spans}
    agents = [span for span in spans if span.name.startswith("invoke_agent")]
    states = {
        path.rpartition("/")[2]: [
            span.says["assistream.run.status"]
            for span in agents
            if span.says["gen_ai.conversation.id"] == path.rpartition("/")[2]
        ]
        for path in (waits, cancelled, cut)
    }
    assert list(states.values()) == [["requires_action", "completed"], ["cancelled"], ["incomplete"]]
    before, after = (span for span in agents if span.says["assistream.run.id"] == paying)
    assert after.links == [before.id]
    assert after.parent is not None
    assert known[after.parent].says["path"].endswith("/approvals")
    assert Counter(span.name.split()[0] for span in spans if span.parent in {one.id for one in agents}) == {
        "chat": 4,
        "execute_tool": 1,
    }
