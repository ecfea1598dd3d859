"""Every route of the contract: statuses, bodies, keys, order, paging, prefixes and streams."""

from __future__ import annotations

import json
import platform
import re
import threading
import time
from typing import Any

import openai
import pytest
from flask import Blueprint, Flask
from flask.testing import FlaskClient
from werkzeug.local import LocalProxy
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client
from werkzeug.wrappers import Response

from assistream_flask import Assistant, ConfigurationError, create_blueprint
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, text, wait_until
from tests.http_helpers import P, blocks, named, parse, read, refused

ASSISTANTS = (Assistant("tutor", model="m"),)
HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
MESSAGE = [
    "id",
    "object",
    "created_at",
    "thread_id",
    "role",
    "status",
    "content",
    "assistant_id",
    "run_id",
    "completed_at",
    "incomplete_at",
    "incomplete_details",
    "metadata",
]
RUN = {
    "id",
    "object",
    "thread_id",
    "assistant_id",
    "message_id",
    "status",
    "last_error",
    "incomplete_details",
    "usage",
    "required_action",
    "expires_at",
    "model",
    "created_at",
    "started_at",
    "completed_at",
    "failed_at",
    "cancelled_at",
    "metadata",
}


def say(caller: Caller, content: str) -> str:
    answer = caller.client.post(f"{caller.url}/messages", json={"content": content})
    assert answer.status_code == 201
    message_id: str = answer.get_json()["message"]["id"]
    return message_id


# The routes


def test_the_assistants_are_listed_by_id_name_and_description_only(make_app: MakeApp) -> None:
    app = make_app(
        [
            Assistant("a", model="secret-model", instructions="secret-words", name="Ann", description="Knows all"),
            Assistant("b", model="secret-model", temperature=0.5),
        ]
    )
    answer = app.test_client().get(f"{P}/assistants")
    assert answer.status_code == 200
    assert answer.get_json() == {
        "data": [
            {"id": "a", "name": "Ann", "description": "Knows all"},
            {"id": "b", "name": "b", "description": ""},
        ]
    }
    assert "secret" not in answer.text


def test_the_assistants_may_depend_on_the_request(make_app: MakeApp) -> None:
    from flask import request

    app = make_app(lambda: [Assistant(request.args.get("who", "x"), model="m")])
    assert app.test_client().get(f"{P}/assistants?who=me").get_json()["data"][0]["id"] == "me"


@pytest.mark.parametrize("metadata", [None, {}, {"title": "Grüße 🌍", "": "empty key"}])
def test_a_thread_is_created_with_its_metadata(app: Flask, metadata: dict[str, str] | None) -> None:
    before = int(time.time())
    answer = app.test_client().post(f"{P}/threads", json={} if metadata is None else {"metadata": metadata})
    assert answer.status_code == 201
    assert answer.mimetype == "application/json"
    thread = answer.get_json()
    assert list(thread) == ["id", "object", "created_at", "metadata"]
    assert re.fullmatch(r"thread_[0-9a-f]{32}", thread["id"])
    assert thread["object"] == "thread"
    assert before <= thread["created_at"] <= time.time()
    assert thread["metadata"] == (metadata or {})


def test_a_thread_is_created_without_a_body_too(app: Flask) -> None:
    assert app.test_client().post(f"{P}/threads").status_code == 201


def test_threads_are_the_callers_own_newest_first_and_paged(app: Flask) -> None:
    client = app.test_client()
    assert client.get(f"{P}/threads").get_json() == {"data": [], "has_more": False}
    made = [client.post(f"{P}/threads", json={"metadata": {"n": str(n)}}).get_json() for n in range(55)]
    Caller(app)
    newest = made[::-1]
    assert client.get(f"{P}/threads").get_json() == {"data": newest[:50], "has_more": True}
    assert client.get(f"{P}/threads?limit=200").get_json() == {"data": newest, "has_more": False}
    assert client.get(f"{P}/threads?limit=1").get_json() == {"data": newest[:1], "has_more": True}
    url = f"{P}/threads?limit=10&before={newest[44]['id']}"
    assert client.get(url).get_json() == {"data": newest[45:], "has_more": False}
    url = f"{P}/threads?limit=9&before={newest[44]['id']}"
    assert client.get(url).get_json() == {"data": newest[45:54], "has_more": True}
    assert client.get(f"{P}/threads?before={newest[-1]['id']}").get_json() == {"data": [], "has_more": False}


def test_a_deleted_thread_is_gone(caller: Caller) -> None:
    say(caller, "Hi")
    answer = caller.client.delete(caller.url)
    assert (answer.status_code, answer.data) == (204, b"")
    assert caller.client.get(f"{P}/threads").get_json()["data"] == []
    refused(caller.client.get(f"{caller.url}/messages"), 404, "thread_not_found")
    refused(caller.client.delete(caller.url), 404, "thread_not_found")


def test_a_message_is_answered_by_its_entry(caller: Caller) -> None:
    words = "  Grüße\r\n\u2028 🌍 <b>&amp;  "
    answer = caller.client.post(f"{caller.url}/messages", json={"content": words})
    assert answer.status_code == 201
    entry = answer.get_json()
    assert entry == {"assistant_id": None, "message": entry["message"], "run": None, "steps": []}
    message = entry["message"]
    assert sorted(message) == sorted(MESSAGE)
    assert re.fullmatch(r"msg_[0-9a-f]{32}", message["id"])
    assert message["content"] == [{"type": "text", "text": {"value": words, "annotations": []}}]
    assert (message["role"], message["status"], message["object"]) == ("user", "completed", "thread.message")
    assert message["thread_id"] == caller.thread_id
    assert caller.entries() == [entry]


def test_messages_are_chronological_and_paged_from_the_newest(caller: Caller) -> None:
    ids = [say(caller, str(n)) for n in range(55)]

    def page(query: str) -> tuple[list[str], bool]:
        answer = caller.client.get(f"{caller.url}/messages{query}")
        assert answer.status_code == 200
        value = answer.get_json()
        assert list(value) == ["data", "has_more"]
        return [entry["message"]["id"] for entry in value["data"]], value["has_more"]

    assert page("") == (ids[5:], True)
    assert page("?limit=200") == (ids, False)
    assert page("?limit=1") == (ids[-1:], True)
    assert page("?limit=55") == (ids, False)
    assert page("?limit=54") == (ids[1:], True)
    assert page(f"?before={ids[5]}") == (ids[:5], False)
    assert page(f"?limit=4&before={ids[5]}") == (ids[1:5], True)
    assert page(f"?before={ids[0]}") == ([], False)


def test_the_page_names_the_place_in_the_log_that_it_is_exact_as_of(caller: Caller) -> None:
    say(caller, "before")
    event_id = caller.client.get(f"{caller.url}/messages").headers["Last-Event-ID"]
    assert re.fullmatch(r"[0-9a-f]+-1", event_id)
    after = say(caller, "after")
    stream = caller.client.get(f"{caller.url}/events", headers={"Last-Event-ID": event_id})
    frames = read(stream, named("thread.message.created"))
    assert [frame.data["id"] for frame in frames if frame.id] == [after]


@pytest.mark.parametrize("mode", [None, "parallel", "sequential"])
def test_runs_are_answered_202_with_the_message_and_the_runs_in_order(caller: Caller, mode: str | None) -> None:
    ids = ["critic", "tutor", "poet"]
    body: dict[str, Any] = {"assistant_ids": ids, "content": "Hi"}
    if mode:
        body["mode"] = mode
    answer = caller.client.post(f"{caller.url}/runs", json=body)
    assert answer.status_code == 202
    value = answer.get_json()
    assert list(value) == ["message", "runs"]
    assert value["message"]["message"]["content"][0]["text"]["value"] == "Hi"
    assert [run["assistant_id"] for run in value["runs"]] == ids
    for run in value["runs"]:
        assert set(run) == RUN
        assert run["status"] == "queued"
        assert run["object"] == "thread.run"
    entries = caller.wait()
    assert [entry["assistant_id"] for entry in entries] == [None, *ids]
    assert [entry["run"]["id"] for entry in entries[1:]] == [run["id"] for run in value["runs"]]
    assert [entry["message"]["id"] for entry in entries[1:]] == [run["message_id"] for run in value["runs"]]
    assert all(entry["run"]["status"] == "completed" and text(entry) for entry in entries[1:])
    assert all(sorted(entry["message"]) == sorted(MESSAGE) for entry in entries)


def test_runs_without_a_content_have_no_message(caller: Caller) -> None:
    say(caller, "Hi")
    for body in ({"assistant_ids": ["tutor"]}, {"assistant_ids": ["tutor"], "content": None}):
        answer = caller.client.post(f"{caller.url}/runs", json=body)
        assert answer.status_code == 202
        assert answer.get_json()["message"] is None
    assert [entry["assistant_id"] for entry in caller.wait()] == [None, "tutor", "tutor"]


def test_a_cancel_is_answered_202_with_the_run_and_is_idempotent(caller: Caller, server: OfflineServer) -> None:
    server.replies = Reply("Never said", fault="stall")
    [run_id] = caller.run("tutor")
    wait_until(lambda: server.requests)
    first = caller.cancel(run_id)
    assert first["id"] == run_id
    caller.wait()
    assert caller.cancel(run_id)["status"] == "cancelled"
    assert caller.cancel(run_id) == caller.entry(run_id)["run"]
    url = f"{caller.url}/runs/{run_id}/cancel"
    assert caller.client.post(url).status_code == 202


def test_an_unknown_run_is_404_and_so_is_a_run_of_another_thread(app: Flask) -> None:
    one = Caller(app)
    [run_id] = one.run("tutor")
    one.wait()
    other = one.client.post(f"{P}/threads").get_json()["id"]
    for url in (f"{one.url}/runs/run_{'0' * 32}/cancel", f"{P}/threads/{other}/runs/{run_id}/cancel"):
        refused(one.client.post(url, json={}), 404, "run_not_found")


# The helper file and where the blueprint is


def helper(client: Client, prefix: str) -> None:
    for file in ("assistream.js", "assistream.min.js"):
        answer = client.get(f"{prefix}/{file}")
        assert answer.status_code == 200
        assert answer.mimetype == "text/javascript"
        assert "export" in answer.text
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        again = client.get(f"{prefix}/{file}", headers={"If-None-Match": answer.headers["ETag"]})
        assert again.status_code == 304
        answer.close()
        again.close()


def whole_round(client: Client, prefix: str) -> str:
    """Use every route below ``prefix``; give the thread's id."""
    helper(client, prefix)
    assert client.get(f"{prefix}/assistants").status_code == 200
    thread_id: str = client.post(f"{prefix}/threads").get_json()["id"]
    url = f"{prefix}/threads/{thread_id}"
    assert client.post(f"{url}/messages", json={"content": "Hi"}).status_code == 201
    run = client.post(f"{url}/runs", json={"assistant_ids": ["tutor"]}).get_json()["runs"][0]
    assert client.post(f"{url}/runs/{run['id']}/cancel").status_code == 202
    assert client.get(f"{url}/messages").status_code == 200
    frames = read(client.get(f"{url}/events"), named("thread.snapshot"))
    assert frames[0].data["thread_id"] == thread_id
    refused(client.get(f"{prefix}/nowhere"), 404, "not_found")
    return thread_id


@pytest.fixture
def host(make_app: MakeApp) -> Flask:
    """Give an app that has pages and errors of its own, next to ours at /assistream."""
    app = make_app()
    app.add_url_rule("/", "home", lambda: "home")
    app.add_url_rule("/assistream/own/<int:n>", "own", lambda n: f"own {n}")
    return app


@pytest.mark.parametrize("prefix", ["/a", "/deep/er/still", "/with.dots-and_more"])
def test_the_blueprint_works_under_any_prefix(host: Flask, server: OfflineServer, prefix: str) -> None:
    with server.client() as client:
        host.register_blueprint(create_blueprint(ASSISTANTS, client=client, name="other"), url_prefix=prefix)
        whole_round(host.test_client(), prefix)
        host.extensions["assistream"].close()


def test_the_blueprint_works_without_a_prefix(host: Flask, server: OfflineServer) -> None:
    with server.client() as client:
        host.register_blueprint(create_blueprint(ASSISTANTS, client=client, name="other"))
        caller = host.test_client()
        helper(caller, "")
        assert caller.get("/assistants").status_code == 200
        assert caller.get("/").text == "home"
        assert caller.get("/nowhere").mimetype == "text/html"
        host.extensions["assistream"].close()


def test_a_prefix_may_have_a_variable(host: Flask, server: OfflineServer) -> None:
    with server.client() as client:
        blueprint = create_blueprint(ASSISTANTS, client=client, name="other")

        @blueprint.url_value_preprocessor
        def drop(endpoint: str | None, values: dict[str, Any] | None) -> None:
            (values or {}).pop("tenant")

        host.register_blueprint(blueprint, url_prefix="/t/<tenant>/chat")
        whole_round(host.test_client(), "/t/me/chat")
        host.extensions["assistream"].close()


def test_two_blueprints_in_one_app_share_nothing(host: Flask, server: OfflineServer) -> None:
    with server.client() as client:
        host.register_blueprint(create_blueprint(ASSISTANTS, client=client, name="second"), url_prefix="/b")
        both_ways(host.test_client(), P, "/b")
        host.extensions["assistream"].close()


def test_one_blueprint_registered_twice_under_two_names_shares_nothing(host: Flask, server: OfflineServer) -> None:
    with server.client() as client:
        blueprint = create_blueprint(ASSISTANTS, client=client, name="other")
        host.register_blueprint(blueprint, url_prefix="/a")
        host.register_blueprint(blueprint, url_prefix="/b", name="again")
        both_ways(host.test_client(), "/a", "/b")
        host.extensions["assistream"].close()


def both_ways(client: FlaskClient, one: str, other: str) -> None:
    first, second = whole_round(client, one), whole_round(client, other)
    for prefix, mine, its in ((one, first, second), (other, second, first)):
        assert [thread["id"] for thread in client.get(f"{prefix}/threads").get_json()["data"]] == [mine]
        refused(client.get(f"{prefix}/threads/{its}/messages"), 404, "thread_not_found")
        refused(client.get(f"{prefix}/threads?before={its}"), 404, "thread_not_found")


def test_the_blueprint_may_be_nested_in_another(host: Flask, server: OfflineServer) -> None:
    with server.client() as client:
        parent = Blueprint("parent", __name__)
        parent.register_blueprint(create_blueprint(ASSISTANTS, client=client), url_prefix="/chat")
        host.register_blueprint(parent, url_prefix="/parent")
        whole_round(host.test_client(), "/parent/chat")
        host.extensions["assistream"].close()


def test_the_app_may_be_mounted_below_another(app: Flask) -> None:
    mounted = DispatcherMiddleware(Response("root", 404), {"/mounted": app})
    client = Client(mounted)
    whole_round(client, f"/mounted{P}")
    assert client.get(f"/mounted{P}/threads").get_json()["data"], "the session's cookie comes back"


def test_the_app_may_stand_behind_a_proxy_that_strips_a_prefix(app: Flask) -> None:
    app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1, x_host=1, x_prefix=1)  # type: ignore[method-assign]
    headers = {
        "X-Forwarded-Prefix": "/shop",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "example.org",
        "Origin": "https://example.org",
    }
    client = app.test_client()
    answer = client.post(f"{P}/threads", headers=headers)
    assert answer.status_code == 201
    cookie = answer.headers["Set-Cookie"].split(";")[0]
    url = f"{P}/threads/{answer.get_json()['id']}/messages"
    bare = app.test_client(use_cookies=False)
    assert bare.post(url, json={"content": "Hi"}, headers={**headers, "Cookie": cookie}).status_code == 201
    helper(bare, P)


def test_the_hosts_own_pages_and_errors_are_untouched(host: Flask) -> None:
    client = host.test_client()
    assert client.get("/").text == "home"
    assert client.get(f"{P}/own/7").text == "own 7"
    for url in ("/nowhere", "/assistreamx", P):
        assert client.get(url).mimetype == "text/html"
        assert client.get(url).status_code == 404
    assert client.post("/").mimetype == "text/html"
    assert client.post("/").status_code == 405


# Harmless methods, errors, headers


def routes(app: Flask) -> list[tuple[str, set[str]]]:
    found: dict[str, set[str]] = {}
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith(P):
            found.setdefault(rule.rule, set()).update(rule.methods or ())
    return sorted(found.items())


def test_the_routes_are_those_of_the_contract(app: Flask) -> None:
    thread = f"{P}/threads/<thread_id>"
    assert {url: methods - {"HEAD", "OPTIONS"} for url, methods in routes(app)} == {
        f"{P}/assistream.js": {"GET"},
        f"{P}/assistream.min.js": {"GET"},
        f"{P}/assistants": {"GET"},
        f"{P}/threads": {"GET", "POST"},
        thread: {"DELETE"},
        f"{thread}/messages": {"GET", "POST"},
        f"{thread}/runs": {"POST"},
        f"{thread}/runs/<run_id>/cancel": {"POST"},
        f"{thread}/runs/<run_id>/submit_tool_outputs": {"POST"},
        f"{thread}/runs/<run_id>/approvals": {"POST"},
        f"{thread}/runs/<run_id>/tool_calls/<call_id>/claim": {"POST"},
        f"{thread}/events": {"GET"},
        f"{P}/doctor": {"GET"},
    }


def filled(url: str, caller: Caller, run_id: str = "run_0") -> str:
    return url.replace("<thread_id>", caller.thread_id).replace("<run_id>", run_id).replace("<call_id>", "call_0")


def test_head_and_options_change_nothing(app: Flask, caller: Caller) -> None:
    [run_id] = caller.run("tutor")
    before = caller.wait()
    for url, methods in routes(app):
        head = caller.client.head(filled(url, caller, run_id))
        # That of the doctor is there for who has its key.
        got = 404 if url.endswith("/doctor") else 200
        assert (head.status_code, head.data) == (got if "GET" in methods else 405, b"")
        head.close()
        options = caller.client.options(filled(url, caller, run_id))
        assert (options.status_code, options.data) == (200, b"")
        assert set(options.allow) == methods
        assert "Access-Control-Allow-Origin" not in options.headers
    assert caller.entries() == before
    assert len(caller.client.get(f"{P}/threads").get_json()["data"]) == 1
    assert app.extensions["assistream"].runtime().streams.callers == {}


def test_another_method_is_our_405_with_allow(app: Flask, caller: Caller) -> None:
    for url, methods in routes(app):
        for method in sorted({"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"} - methods):
            answer = caller.client.open(filled(url, caller), method=method)
            message = refused(answer, 405, "method_not_allowed")
            assert set(answer.allow) == methods
            assert all(method in message for method in methods - {"HEAD", "OPTIONS"})


@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/threads/", "/threads/x/y", "/assistream.js/x", "/a%0Ab", "/%00", "/%ff%fe", "/../x"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_an_unknown_address_below_the_prefix_is_our_404(app: Flask, path: str, method: str) -> None:
    message = refused(app.test_client().open(P + path, method=method), 404, "not_found")
    assert "README" in message


def test_answers_are_not_cached_and_have_no_hop_by_hop_headers(caller: Caller) -> None:
    thread_url = caller.url
    for url in (f"{P}/assistants", f"{P}/threads", f"{thread_url}/messages", f"{P}/nowhere"):
        answer = caller.client.get(url)
        assert answer.headers["Cache-Control"] == "no-store"
        assert not {name.lower() for name in answer.headers.keys()} & HOP_BY_HOP  # noqa: SIM118
    for stream in (
        caller.client.get(f"{thread_url}/events"),
        caller.client.post(
            f"{thread_url}/runs", json={"assistant_ids": ["tutor"]}, headers={"Accept": "text/event-stream"}
        ),
    ):
        assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["X-Accel-Buffering"] == "no"
        assert "no-cache" in stream.headers["Cache-Control"]
        assert "Content-Length" not in stream.headers
        assert not {name.lower() for name in stream.headers.keys()} & HOP_BY_HOP  # noqa: SIM118
        stream.close()


# Streams


def test_a_fresh_stream_begins_with_retry_and_a_snapshot(caller: Caller) -> None:
    for n in range(53):
        say(caller, str(n))
    stream = caller.client.get(f"{caller.url}/events")
    first = next(blocks(stream.iter_encoded()))
    stream.close()
    assert first.startswith("retry: ")
    snapshot = parse(first)
    assert snapshot.event == "thread.snapshot"
    assert re.fullmatch(r"[0-9a-f]+-53", snapshot.id or "")
    page = caller.client.get(f"{caller.url}/messages").get_json()
    assert snapshot.data == {"thread_id": caller.thread_id, **page}
    assert len(page["data"]) == 50


def test_the_stream_tells_of_a_run_in_the_words_and_the_order_of_the_contract(
    caller: Caller, server: OfflineServer
) -> None:
    server.replies = Reply("One two three.")
    stream = caller.client.get(f"{caller.url}/events")
    frames: list[Any] = []
    reader = threading.Thread(target=lambda: frames.extend(read(stream, named("thread.run.completed"))))
    reader.start()
    [run_id] = caller.run("tutor")
    reader.join(10)
    told = [frame for frame in frames if frame.event != "ping"]
    assert [frame.event for frame in told if frame.event != "thread.message.delta"] == [
        "thread.snapshot",
        "thread.message.created",
        "thread.run.created",
        "thread.run.queued",
        "thread.message.created",
        "thread.run.in_progress",
        "thread.message.completed",
        "thread.run.completed",
    ]
    epochs, offsets = zip(*[frame.id.split("-") for frame in told], strict=True)
    assert len(set(epochs)) == 1
    assert [int(offset) for offset in offsets] == list(range(len(told)))
    deltas = [frame.data for frame in told if frame.event == "thread.message.delta"]
    assert "".join(delta["delta"]["content"][0]["text"]["value"] for delta in deltas) == "One two three."
    assert told[-1].data == caller.entry(run_id)["run"]
    assert told[-2].data == caller.entry(run_id)["message"]


@pytest.mark.parametrize("by", ["header", "query"])
def test_a_stream_goes_on_where_the_viewer_was(caller: Caller, by: str) -> None:
    caller.run("tutor")
    caller.wait()
    event_id = caller.client.get(f"{caller.url}/messages").headers["Last-Event-ID"]
    epoch, end = event_id.split("-")
    for offset in range(int(end)):
        at = f"{epoch}-{offset}"
        if by == "header":
            stream = caller.client.get(f"{caller.url}/events", headers={"Last-Event-ID": at})
        else:
            stream = caller.client.get(f"{caller.url}/events?last_event_id={at}")
        frames = read(stream, lambda frame: frame.id == event_id)
        ids = [frame.id for frame in frames if frame.id]
        assert ids == [f"{epoch}-{n}" for n in range(offset + 1, int(end) + 1)]
    stream = caller.client.get(f"{caller.url}/events?last_event_id={event_id}")
    assert [frame.event for frame in read(stream, named("ping"))] == ["", "ping"]


def test_the_header_wins_over_the_query(caller: Caller) -> None:
    say(caller, "one")
    say(caller, "two")
    epoch = caller.client.get(f"{caller.url}/messages").headers["Last-Event-ID"].split("-")[0]
    stream = caller.client.get(f"{caller.url}/events?last_event_id={epoch}-0", headers={"Last-Event-ID": f"{epoch}-1"})
    assert [frame.id for frame in read(stream, named("ping")) if frame.id] == [f"{epoch}-2"]


@pytest.mark.parametrize(
    "event_id",
    ["ffffffff-0", "{epoch}-3", "{epoch}-999999999999999999999", "{epoch}--1", "{epoch}", "x", "0-0", "{epoch}-00"],
)
def test_a_place_that_cannot_be_proven_gets_a_snapshot(caller: Caller, event_id: str) -> None:
    say(caller, "one")
    say(caller, "two")
    epoch = caller.client.get(f"{caller.url}/messages").headers["Last-Event-ID"].split("-")[0]
    stream = caller.client.get(f"{caller.url}/events", headers={"Last-Event-ID": event_id.format(epoch=epoch)})
    [snapshot] = read(stream, lambda frame: True)
    assert (snapshot.event, snapshot.id) == ("thread.snapshot", f"{epoch}-2")


def test_a_ping_without_an_id_comes_when_nothing_else_does(caller: Caller) -> None:
    began = time.monotonic()
    frames = read(caller.client.get(f"{caller.url}/events"), named("ping"))
    assert [(frame.event, frame.id) for frame in frames[1:]] == [("ping", None)]
    assert frames[-1].data == {}
    assert time.monotonic() - began >= 0.15


def test_the_stream_of_a_deleted_thread_ends_after_saying_so(caller: Caller) -> None:
    stream = caller.client.get(f"{caller.url}/events")
    assert caller.client.delete(caller.url).status_code == 204
    frames = read(stream)
    assert [frame.event for frame in frames if frame.event != "ping"] == ["thread.snapshot", "thread.deleted"]
    assert frames[-1].data == {"id": caller.thread_id, "object": "thread.deleted", "deleted": True}


def test_runs_are_streamed_to_the_caller_that_accepts_it_and_end_in_done(caller: Caller, server: OfflineServer) -> None:
    server.replies = lambda request: Reply("Here you are.")
    body = {"assistant_ids": ["tutor", "poet"], "content": "Hi"}
    stream = caller.client.post(f"{caller.url}/runs", json=body, headers={"Accept": "text/event-stream"})
    first = b"".join(stream.iter_encoded()).decode()
    stream.close()
    assert first.startswith("retry: ")
    assert first.endswith("event: done\ndata: [DONE]\n\n")
    frames = [parse(block) for block in first.split("\n\n")[:-1]]
    told = [frame.event for frame in frames]
    assert told.count("thread.run.created") == told.count("thread.run.completed") == 2
    assert told.count("thread.message.completed") == 2
    assert told[0] == "thread.message.created"
    entries = caller.wait()
    assert frames[0].data == entries[0]["message"]
    assert {frame.data["id"] for frame in frames if frame.event == "thread.run.completed"} == {
        entry["run"]["id"] for entry in entries[1:]
    }


def test_a_stream_of_runs_has_only_the_events_of_these_runs(caller: Caller, server: OfflineServer) -> None:
    server.replies = lambda request: Reply("Slow words come one by one.", delay=0.05)
    [other] = caller.run("critic", content="Other")
    stream = caller.client.post(
        f"{caller.url}/runs",
        json={"assistant_ids": ["tutor"], "content": "Mine"},
        headers={"Accept": "text/event-stream, */*"},
    )
    frames = read(stream)
    assert other not in json.dumps([frame.data for frame in frames])
    assert "Other" not in json.dumps([frame.data for frame in frames])
    assert frames[-1].data == "[DONE]"


@pytest.mark.parametrize("fault", ["500", "401", "cut"])
def test_a_stream_of_runs_that_fail_ends_in_done_too(caller: Caller, server: OfflineServer, fault: str) -> None:
    server.replies = Reply("Some words before it breaks.", fault=fault)
    stream = caller.client.post(
        f"{caller.url}/runs",
        json={"assistant_ids": ["tutor"], "content": "Hi"},
        headers={"Accept": "text/event-stream"},
    )
    frames = read(stream)
    assert [frame.event for frame in frames[-3:]] == ["thread.message.incomplete", "thread.run.failed", "done"]


def test_a_stream_of_runs_of_a_deleted_thread_ends_in_done(caller: Caller, server: OfflineServer) -> None:
    server.replies = Reply(fault="stall")
    stream = caller.client.post(
        f"{caller.url}/runs",
        json={"assistant_ids": ["tutor"], "content": "Hi"},
        headers={"Accept": "text/event-stream"},
    )
    caller.client.delete(caller.url)
    assert [frame.event for frame in read(stream)[-2:]] == ["thread.deleted", "done"]


def test_at_a_shutdown_streams_end_and_no_done_is_said_of_runs_that_go_on(
    app: Flask, caller: Caller, server: OfflineServer
) -> None:
    server.replies = Reply(fault="stall")
    view = caller.client.get(f"{caller.url}/events")
    runs = caller.client.post(
        f"{caller.url}/runs",
        json={"assistant_ids": ["tutor"], "content": "Hi"},
        headers={"Accept": "text/event-stream"},
    )
    wait_until(lambda: server.requests)
    app.extensions["assistream"].close()
    assert read(view)[0].event == "thread.snapshot"
    assert not [frame for frame in read(runs) if frame.event == "done"]


def test_a_stream_that_is_left_is_counted_out(app: Flask, caller: Caller) -> None:
    for _ in range(3):
        stream = caller.client.get(f"{caller.url}/events")
        assert app.extensions["assistream"].runtime().streams.count == 1
        stream.close()
        assert app.extensions["assistream"].runtime().streams.callers == {}


def test_a_prefix_with_a_variable_works(make_app: MakeApp, server: OfflineServer) -> None:
    app = Flask("tenants")
    app.secret_key = "only for tests"
    app.config["ASSISTREAM_DATABASE_URL"] = "sqlite://"
    with server.client() as ours:
        app.register_blueprint(create_blueprint([Assistant("tutor", model="m")], client=ours), url_prefix="/<tenant>/p")
        client = app.test_client()
        with client.get("/acme/p/assistream.js") as answer:
            assert answer.status_code == 200
        url = f"/acme/p/threads/{client.post('/acme/p/threads', json={}).get_json()['id']}"
        assert client.post(f"{url}/messages", json={"content": "Hi"}).status_code == 201
        app.extensions["assistream"].close()


@pytest.mark.parametrize(
    ("name", "value"), [("REDIS_URL", "127.0.0.1:6379"), ("DATABASE_URL", "nonsense"), ("MAX_RUNS", "x")]
)
def test_a_setting_that_cannot_work_fails_the_registration(name: str, value: str) -> None:
    app = Flask("settings")
    app.config.update({"SECRET_KEY": "only for tests", f"ASSISTREAM_{name}": value})
    with pytest.raises(ConfigurationError, match=name):
        app.register_blueprint(create_blueprint([]))


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("redis+sentinel", "Sentinel"),
        ("rediss+sentinel", "Sentinel"),
        ("sentinel", "Sentinel"),
        ("redis+cluster", "Cluster"),
    ],
)
def test_a_url_of_a_redis_that_cannot_be_used_is_refused_with_what_can(scheme: str, kind: str) -> None:
    app = Flask("settings")
    app.config.update(SECRET_KEY="only for tests", ASSISTREAM_REDIS_URL=f"{scheme}://:pa55@a:26379,b:26379/mymaster/0")
    says = f"names a Redis {kind}, which assistream cannot use: give one Redis that runs by itself, redis://"
    with pytest.raises(ConfigurationError, match=says) as error:
        app.register_blueprint(create_blueprint([]))
    assert "pa55" not in str(error.value)


def test_a_posts_own_stream_sends_no_ping_for_the_events_of_other_runs(
    make_app: MakeApp, server: OfflineServer
) -> None:
    server.replies = Reply("word " * 100, delay=0.002)
    caller = Caller(make_app(heartbeat_seconds=15))
    caller.run("critic")
    answer = caller.client.post(
        f"{caller.url}/runs",
        json={"assistant_ids": ["tutor"], "content": "Hi"},
        headers={"Accept": "text/event-stream"},
    )
    assert b"event: ping" not in answer.get_data()


def test_a_system_that_does_not_say_what_it_is_serves_nevertheless(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise ValueError("there is no name for it")

    monkeypatch.setattr(platform, "platform", fail)
    app = make_app()
    assert [app.test_client().post("/assistream/threads").status_code for _ in range(2)] == [201, 201]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("ASSISTREAM_MAX_RUN", "ASSISTREAM_MAX_RUNS"),
        ("ASSISTREAM_DATABASE_URI", "ASSISTREAM_DATABASE_URL"),
        ("ASSISTREAM_REDIS", "ASSISTREAM_REDIS_URL"),
        ("assistream_redis_url", "ASSISTREAM_REDIS_URL"),
        ("ASISTREAM_REDIS_URL", "ASSISTREAM_REDIS_URL"),
        ("ASSISTREAMREDIS_URL", "ASSISTREAM_REDIS_URL"),
    ],
)
def test_a_misspelt_setting_is_refused_at_registration_with_the_one_that_was_meant(wrong: str, right: str) -> None:
    app = Flask("settings")
    app.config.update({"SECRET_KEY": "only for tests", wrong: "1"})
    with pytest.raises(ConfigurationError, match=f"{wrong} in app.config is no setting of assistream: write {right}$"):
        app.register_blueprint(create_blueprint([]))


def test_of_a_name_that_is_like_no_setting_the_log_tells_and_an_apps_own_are_let_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Flask("settings")
    app.config.update(SECRET_KEY="only for tests", ASSISTREAM_TENANTS=3, ASSISTANT_REDIS_URL="r", DATABASE_URL="d")
    app.register_blueprint(create_blueprint([]))
    told = [record.getMessage() for record in caplog.records if record.name == "assistream_flask.settings"]
    assert told == ["ASSISTREAM_TENANTS in app.config is no setting of assistream, and changes nothing: remove it"]


async def _async_name() -> str:
    return "me"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"owner": "me"}, r"owner=.* got str: give a callable that takes no argument"),
        ({"owner": lambda request: "me"}, r"owner=.* cannot be called .*request.*: give a callable that takes no arg"),
        ({"owner": LocalProxy(lambda: "me")}, r"owner=.* got a proxy, .*: give a callable, .* current_user.get_id\(\)"),
        ({"owner": _async_name}, r"owner=.* got an async function, which nobody awaits: give a callable"),
        ({"adopt": {"tutor": None}}, r"adopt=.* got dict: give a callable that takes 2 arguments"),
        ({"adopt": lambda assistant_id: None}, r"adopt=.* cannot be called .*: give a callable that takes 2 arguments"),
        ({"client": openai.AsyncOpenAI}, "AsyncOpenAI, and answers are read without asyncio: give an openai.OpenAI"),
        ({"client": "sk-1"}, "client=.* got str: give an openai.OpenAI, or a callable that takes no argument"),
        ({"client": lambda key: None}, "client=.* cannot be called"),
        ({"assistants": Assistant("tutor", model="m")}, "assistants=.* got Assistant: give a list, or a callable"),
        ({"assistants": None}, "assistants=.* got NoneType: give a list, or a callable"),
        ({"assistants": lambda request: []}, "assistants=.* cannot be called"),
    ],
)
def test_what_cannot_be_called_or_is_of_another_kind_is_refused_at_registration(
    given: dict[str, Any], says: str
) -> None:
    app = Flask("given")
    app.secret_key = "only for tests"
    with pytest.raises(ConfigurationError, match=says):
        app.register_blueprint(create_blueprint(**{"assistants": ASSISTANTS, **given}))


def test_an_async_client_is_refused_also_where_a_callable_makes_it(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    with_it = create_blueprint(ASSISTANTS, client=openai.AsyncOpenAI(api_key="k"))  # type: ignore[arg-type]
    app = Flask("given")
    app.secret_key = "only for tests"
    with pytest.raises(ConfigurationError, match="AsyncOpenAI, and answers are read without asyncio"):
        app.register_blueprint(with_it)
    caller = Caller(make_app(client=lambda: openai.AsyncOpenAI(api_key="k")))  # type: ignore[arg-type, return-value]
    caller.run("tutor")
    assert caller.wait()[-1]["run"]["last_error"]["code"] == "server_error"
    assert "AsyncOpenAI, and answers are read without asyncio" in caplog.text


def test_what_cannot_be_looked_at_is_taken_as_it_is(make_app: MakeApp) -> None:
    class Hidden:
        @property
        def __signature__(self) -> str:
            raise RuntimeError("a proxy for nothing yet")

        def __call__(self) -> str:
            return "me"

    assert make_app(owner=Hidden()).test_client().get("/assistream/threads").status_code == 200
