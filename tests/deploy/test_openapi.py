"""The OpenAPI file of the routes: held to the app's url_map and to its answers, and run against it by schemathesis."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from flask import Flask
from sqlalchemy.exc import OperationalError
from werkzeug.test import TestResponse
from werkzeug.wrappers import Response

from assistream_flask import Assistant, page_tool, tool
from assistream_flask.events import RUN_ENDS
from assistream_flask.testing import HostedCall, OfflineServer, Reply, ToolCall
from tests.conftest import Caller, MakeApp
from tests.http_helpers import Frame, P, named, read

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"get", "post", "put", "patch", "delete"}
API: dict[str, Any] = yaml.safe_load((ROOT / "docs/reference/openapi.yaml").read_text())


def test_the_file_has_every_route_of_the_app_with_its_methods_and_no_other(app: Flask) -> None:
    routes = {
        (re.sub(r"<(\w+)>", r"{\1}", rule.rule.removeprefix(P)), method.lower())
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("assistream.")
        # These two are every route's.
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {(path, method) for path, item in API["paths"].items() for method in item if method in METHODS} == routes


def strict(value: Any) -> Any:
    """Give a schema that takes no key which it does not name, so that no answer has one that is not written down."""
    if isinstance(value, list):
        return [strict(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: strict(one) for key, one in value.items()}
    if found.get("type") == "object" and "properties" in found and "oneOf" not in found:
        found.setdefault("additionalProperties", False)
    return found


STRICT = strict(copy.deepcopy(API))


def fits(value: Any, schema: dict[str, Any]) -> None:
    """Fail where ``value`` is not what the ``schema`` of the file says."""
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": STRICT["components"]})
    assert [f"{error.instance_path}: {error.message}" for error in validator.iter_errors(value)] == [], value


def checked(answer: Response, path: str, status: int) -> Any:
    """Give the answer's JSON, which is as the file says for this route, method and status."""
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert isinstance(answer, TestResponse)
    described = STRICT["paths"][path][answer.request.method.lower()]["responses"][str(status)]
    if "$ref" in described:
        described = STRICT["components"]["responses"][described["$ref"].rpartition("/")[2]]
    assert set(described.get("headers", {})) <= set(answer.headers.keys())
    if "content" not in described:
        assert answer.data == b""
        return None
    ((mimetype, content),) = described["content"].items()
    assert answer.mimetype == mimetype
    if mimetype != "application/json":
        return None
    fits(answer.get_json(), content["schema"])
    return answer.get_json()


KINDS = [kind["properties"] for kind in STRICT["components"]["schemas"]["Event"]["oneOf"]]
EVENTS = {
    name: kind["data"].get("contentSchema")
    for kind in KINDS
    for name in kind["event"].get("enum", [kind["event"].get("const")])
}


def seen(frames: Sequence[Frame]) -> set[str]:
    """Give the names of the events, each of which is as the file says."""
    for frame in frames:
        # The first may have nothing but retry.
        if frame.event not in ("", "done"):
            fits(frame.data, EVENTS[frame.event])
            assert (frame.id is None) == (frame.event == "ping")
    return {frame.event for frame in frames} - {""}


THREAD = "/threads/{thread_id}"
# Replies, the assistant that is asked, and what becomes of the run.
ANSWERS = [
    (Reply("Yes, it is.", reasoning="Is it? It is."), "tutor", "completed"),
    (Reply("Half", refusal="I can't say more."), "tutor", "completed"),
    (
        Reply("As in the book.", annotations=({"type": "url_citation", "url": "https://example.org"},)),
        "poet",
        "completed",
    ),
    (Reply("This breaks off", fault="cut"), "tutor", "failed"),
    (Reply("This is cut", fault="incomplete"), "poet", "incomplete"),
    (Reply("This is filtered", fault="content_filter"), "critic", "incomplete"),
]


def test_all_answers_and_events_of_the_app_are_as_the_file_says(make_app: MakeApp, server: OfflineServer) -> None:
    client = make_app(heartbeat_seconds=0.05).test_client()
    events: set[str] = set()
    checked(client.get(f"{P}/assistants"), "/assistants", 200)
    with client.get(f"{P}/assistream.js") as helper:
        checked(helper, "/assistream.js", 200)
    thread = checked(client.post(f"{P}/threads", json={"metadata": {"about": "tests"}}), "/threads", 201)
    url = f"{P}/threads/{thread['id']}"
    checked(client.post(f"{url}/messages", json={"content": "Hi"}), f"{THREAD}/messages", 201)
    for reply, assistant, status in ANSWERS:
        server.replies = reply
        body = {"assistant_ids": [assistant], "content": "And?"}
        frames = read(client.post(f"{url}/runs", json=body, headers={"Accept": "text/event-stream"}))
        events |= seen(frames)
        assert frames[-2].event == f"thread.run.{status}"
    server.replies = Reply("This stands still", fault="stall")
    started = checked(client.post(f"{url}/runs", json={"assistant_ids": ["tutor"]}), f"{THREAD}/runs", 202)
    checked(client.get(f"{url}/messages"), f"{THREAD}/messages", 200)
    checked(client.get(f"{P}/threads"), "/threads", 200)
    events |= seen(read(client.get(f"{url}/events"), named("ping")))
    cancel = f"{url}/runs/{started['runs'][0]['id']}/cancel"
    place = checked_place(client.get(f"{url}/messages"))
    checked(client.post(cancel, json={}), f"{THREAD}/runs/{{run_id}}/cancel", 202)
    events |= seen(read(client.get(f"{url}/events", headers={"Last-Event-ID": place}), named("thread.run.cancelled")))
    entries = checked(client.get(f"{url}/messages?limit=200"), f"{THREAD}/messages", 200)["data"]
    assert [entry["run"]["status"] for entry in entries if entry["run"]] == [*(one[2] for one in ANSWERS), "cancelled"]
    stream = client.get(f"{url}/events")
    checked(client.delete(url), THREAD, 204)
    events |= seen(read(stream))
    # Those of tool calls are below.
    assert set(EVENTS) - events == {
        "thread.run.requires_action",
        "thread.run.expired",
        "thread.run.step.failed",
        "thread.run.step.cancelled",
    }


@tool
def find(order_id: str) -> str:
    """Find an order."""
    return "Found."


@tool(approval=True)
def refund(order_id: str) -> str:
    """Pay an order back."""
    return "Paid back."


CLERK = Assistant(
    "clerk", model="m", tools=[find, refund, page_tool("pick", "Pick a day."), {"type": "web_search"}], max_rounds=1
)


class Asked:
    """A thread of an app whose clerk has tools."""

    def __init__(self, app: Flask, server: OfflineServer) -> None:
        self.client, self.server = app.test_client(), server
        self.url = f"{P}/threads/{self.client.post(f'{P}/threads', json={}).get_json()['id']}"

    def run(self, *replies: Reply | str) -> str:
        """Have the clerk answer so; give the address of the run."""
        self.server.replies = list(replies)
        self.place = checked_place(self.client.get(f"{self.url}/messages"))
        body = {"assistant_ids": ["clerk"], "content": "And?"}
        return f"{self.url}/runs/{self.client.post(f'{self.url}/runs', json=body).get_json()['runs'][0]['id']}"

    def seen(self, last: str) -> set[str]:
        """Give the names of the events since it was asked, each of which is as the file says, to that of a run."""
        answer = self.client.get(f"{self.url}/events", headers={"Last-Event-ID": self.place})
        ends = {last, *RUN_ENDS}
        found = seen(read(answer, lambda frame: frame.event in ends))
        assert last in found
        return found

    def post(self, run: str, path: str, body: object, status: int) -> Any:
        """POST to a run; give the answer, which is as the file says."""
        rule = re.sub("/tool_calls/[^/]+/", "/tool_calls/{call_id}/", f"{THREAD}/runs/{{run_id}}/{path}")
        return checked(self.client.post(f"{run}/{path}", json=body), rule, status)


ORDER = {"order_id": "A-7"}
CALLS = [ToolCall("find", ORDER, "call_1"), ToolCall("refund", ORDER, "call_2"), ToolCall("pick", {}, "call_3")]


def test_what_tool_calls_are_answered_with_is_as_the_file_says(make_app: MakeApp, server: OfflineServer) -> None:
    asked = Asked(make_app([CLERK]), server)
    run = asked.run(Reply("I look.", calls=[HostedCall("web_search"), *CALLS]), "Done.")
    asked.seen("thread.run.requires_action")
    checked(asked.client.get(f"{asked.url}/messages"), f"{THREAD}/messages", 200)
    for path, holder, status in (
        ("tool_calls/call_3/claim", "a", 200),
        ("tool_calls/call_3/claim", "b", 409),
        ("tool_calls/call_9/claim", "b", 404),
        ("tool_calls/call_3/claim", "", 400),
    ):
        asked.post(run, path, {"holder": holder}, status)
    asked.post(run, "tool_calls/call_3/claim", {"holder": "a", "release": True}, 200)
    approval = {"approvals": [{"tool_call_id": "call_2", "approve": True, "arguments": ORDER, "remember": True}]}
    asked.post(run, "approvals", approval, 200)
    refused = asked.post(run, "approvals", approval, 409)["error"]
    assert (refused["code"], refused["decision"]["arguments"]) == ("already_answered", ORDER)
    output = {"tool_outputs": [{"tool_call_id": "call_3", "output": "Today."}]}
    asked.post(run, "submit_tool_outputs", output, 200)
    asked.seen("thread.run.completed")
    asked.post(run, "submit_tool_outputs", output, 409)
    asked.post(run, "submit_tool_outputs", {}, 400)


@pytest.mark.parametrize(("fault", "end"), [(None, "cancelled"), ("cut", "failed")])
def test_what_is_told_of_calls_that_go_with_their_run_is_as_the_file_says(
    make_app: MakeApp, server: OfflineServer, fault: str | None, end: str
) -> None:
    asked = Asked(make_app([CLERK]), server)
    run = asked.run(Reply(calls=CALLS, fault=fault))
    if end == "cancelled":
        asked.seen("thread.run.requires_action")
        asked.post(run, "cancel", {}, 202)
    assert f"thread.run.step.{end}" in asked.seen(f"thread.run.{end}")


def test_what_is_told_of_a_run_that_nobody_answers_is_as_the_file_says(
    make_app: MakeApp, server: OfflineServer
) -> None:
    asked = Asked(make_app([CLERK], action_seconds=1), server)
    asked.run(Reply(calls=CALLS))
    assert "thread.run.step.cancelled" in asked.seen("thread.run.expired")
    [_, entry] = checked(asked.client.get(f"{asked.url}/messages"), f"{THREAD}/messages", 200)["data"]
    assert entry["message"]["incomplete_details"] == {"reason": "run_expired"}


def test_what_is_refused_is_as_the_file_says(make_app: MakeApp) -> None:
    caller: str | None = "me"
    client = make_app(owner=lambda: caller, max_runs=1).test_client()
    url = f"{P}/threads/{checked(client.post(f'{P}/threads', json={}), '/threads', 201)['id']}"
    messages, runs = f"{THREAD}/messages", f"{THREAD}/runs"
    checked(client.post(f"{url}/messages", json={}), messages, 400)
    checked(client.post(f"{url}/messages", json={"content": "Hi"}, headers={"Origin": "https://a.org"}), messages, 403)
    checked(client.get(f"{url}x/messages"), messages, 404)
    checked(client.post(f"{url}/messages", json={"content": "Hi" * 60_000}), messages, 413)
    checked(client.post(f"{url}/messages", data="Hi"), messages, 415)
    for content, status in (("Hi", 201), ("Ho", 422)):
        answer = client.post(f"{url}/messages", json={"content": content}, headers={"Idempotency-Key": "k"})
        checked(answer, messages, status)
    checked(client.post(f"{url}/runs", json={"assistant_ids": ["nobody"]}), runs, 404)
    checked(client.get(f"{P}/doctor"), "/doctor", 404)
    caller = None
    checked(client.get(f"{P}/threads"), "/threads", 401)


def test_a_caller_with_too_many_runs_and_a_database_that_is_away_are_answered_as_the_file_says(
    make_app: MakeApp, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies = Reply(fault="stall_headers")
    app = make_app(max_runs=1)
    caller = Caller(app)
    caller.run("tutor")
    checked(caller.client.post(f"{caller.url}/runs", json={"assistant_ids": ["tutor"]}), f"{THREAD}/runs", 429)

    def away(*_: object, **__: object) -> None:
        raise OperationalError("no statement", {}, OSError("away"))

    with monkeypatch.context() as patched:
        patched.setattr(app.extensions["assistream"].runtime().store, "threads", away)
        checked(caller.client.get(f"{P}/threads"), "/threads", 503)


def checked_place(answer: TestResponse) -> str:
    """Give the event id as of which a page is exact."""
    place = answer.headers["Last-Event-ID"]
    fits(place, API["components"]["schemas"]["EventId"])
    return place


# Run against the app


def test_the_app_keeps_what_the_file_says() -> None:
    # What is tried of a route is made when the file is collected, which takes seconds, and each of pytest-xdist's
    # workers collects all files.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/deploy/described.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(method in METHODS for item in API["paths"].values() for method in item)
    assert f" {count} passed" in done.stdout
