"""Idempotency-Key on every POST: the same key and request get the first answer again, another request 422."""

from __future__ import annotations

import time
from typing import Any

import pytest
from flask import Flask
from werkzeug.test import TestResponse

from assistream_flask.runs import runtime
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, at_once, text, wait_until
from tests.http_helpers import Frame, P, read, refused

RUNS: dict[str, Any] = {"assistant_ids": ["tutor", "critic"], "content": "Hi"}
SSE = {"Accept": "text/event-stream"}


def post(caller: Caller, url: str, body: Any, key: str = "key", **headers: str) -> TestResponse:
    return caller.client.post(url, json=body, headers={"Idempotency-Key": key, **headers})


def commands(caller: Caller) -> list[tuple[str, Any, Any]]:
    """Give (URL, body, another body) of every POST."""
    [run_id] = caller.run("tutor", content="First")
    caller.wait()
    return [
        (f"{P}/threads", {"metadata": {"a": "b"}}, {"metadata": {"a": "c"}}),
        (f"{caller.url}/messages", {"content": "Hi"}, {"content": "Ho"}),
        (f"{caller.url}/runs", RUNS, {**RUNS, "mode": "sequential"}),
        (f"{caller.url}/runs/{run_id}/cancel", {}, None),
    ]


def test_these_are_all_posts(app: Flask, caller: Caller) -> None:
    # Those of tools are in test_tools.py.
    tools = ("submit_tool_outputs", "approvals", "claim")
    rules = app.url_map.iter_rules()
    posts = [rule for rule in rules if "POST" in (rule.methods or ()) and not rule.rule.endswith(tools)]
    assert len(posts) == len(commands(caller))


@pytest.mark.parametrize("at", range(4))
def test_the_same_key_and_request_get_the_first_answer_again_byte_for_byte(caller: Caller, at: int) -> None:
    url, body, _ = commands(caller)[at]
    first = post(caller, url, body)
    assert first.status_code in (201, 202)
    before = [entry["message"]["id"] for entry in caller.entries()]
    caller.wait()
    for _ in range(3):
        again = post(caller, url, body)
        assert (again.status_code, again.data) == (first.status_code, first.data)
        assert again.headers["Content-Type"] == first.headers["Content-Type"]
    assert [entry["message"]["id"] for entry in caller.entries()] == before
    other = post(caller, url, body, key="another-key")
    assert other.status_code == first.status_code
    if at < 3:
        assert other.data != first.data


@pytest.mark.parametrize("at", range(4))
def test_the_key_with_another_body_route_or_thread_is_422(caller: Caller, at: int) -> None:
    all_of_them = commands(caller)
    url, body, other_body = all_of_them[at]
    assert post(caller, url, body).status_code in (201, 202)
    thread_id = caller.client.post(f"{P}/threads").get_json()["id"]
    tries = [(other_url, its) for other_url, its, _ in all_of_them if other_url != url]
    tries += [(url, other_body)] if other_body else []
    tries += [(f"{P}/threads/{thread_id}/messages", body)] if url.endswith("/messages") else []
    tries += [(f"{P}/threads/{thread_id}/runs", body)] if url.endswith("/runs") else []
    before = caller.wait()
    threads = caller.client.get(f"{P}/threads").get_json()
    for other_url, its in tries:
        message = refused(post(caller, other_url, its), 422, "idempotency_key_reused")
        assert "Use a new one" in message
    assert caller.entries() == before
    assert caller.client.get(f"{P}/threads").get_json() == threads
    assert caller.client.get(f"{P}/threads/{thread_id}/messages").get_json()["data"] == []


def test_a_refused_request_does_not_use_its_key_up(caller: Caller) -> None:
    url = f"{caller.url}/runs"
    refused(post(caller, url, {**RUNS, "content": ""}), 400, "invalid_value")
    refused(post(caller, url, {**RUNS, "assistant_ids": ["nobody"]}), 404, "assistant_not_found")
    refused(post(caller, f"{caller.url}/runs/run_0/cancel", {}), 404, "run_not_found")
    assert post(caller, url, RUNS).status_code == 202


@pytest.mark.parametrize("route", ["messages", "runs"])
def test_fifty_at_once_with_one_key_store_one_message_and_get_one_answer(
    app: Flask, caller: Caller, server: OfflineServer, route: str
) -> None:
    session = caller.client.get_cookie("session")
    assert session is not None
    body = {"content": "Once"} if route == "messages" else {**RUNS, "content": "Once"}
    headers = {"Idempotency-Key": "one", "Cookie": f"session={session.value}"}

    def work(n: int) -> tuple[int, bytes]:
        client = app.test_client(use_cookies=False)
        answer = client.post(f"{caller.url}/{route}", json=body, headers=headers)
        return answer.status_code, answer.data

    answers = at_once(50, work)
    assert len(set(answers)) == 1
    assert answers[0][0] in (201, 202)
    entries = caller.wait()
    assert [text(entry) for entry in entries if entry["assistant_id"] is None] == ["Once"]
    assert len(entries) == (1 if route == "messages" else 3)
    assert len(server.requests) == (0 if route == "messages" else 2)


def test_fifty_at_once_with_one_key_make_one_thread(app: Flask, caller: Caller) -> None:
    session = caller.client.get_cookie("session")
    assert session is not None
    headers = {"Idempotency-Key": "one", "Cookie": f"session={session.value}"}
    ids = at_once(
        50,
        lambda n: app.test_client(use_cookies=False).post(f"{P}/threads", headers=headers).get_json()["id"],
    )
    assert len(set(ids)) == 1
    assert len(caller.client.get(f"{P}/threads").get_json()["data"]) == 2


def told(frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame.event != "ping"]


def test_a_repeated_stream_of_runs_tells_the_same_again_while_they_run_and_after(
    caller: Caller, server: OfflineServer
) -> None:
    server.replies = lambda request: Reply("Words that come one by one, slowly.", delay=0.05)
    first = caller.client.post(f"{caller.url}/runs", json=RUNS, headers={"Idempotency-Key": "key", **SSE})
    chunks = first.iter_encoded()
    next(chunks)
    running = told(read(post(caller, f"{caller.url}/runs", RUNS, **SSE)))
    whole = told(read(first))
    after = told(read(post(caller, f"{caller.url}/runs", RUNS, **SSE)))
    assert running == after
    assert running[-len(whole) :] == whole
    assert running[-1].event == "done"
    assert len(caller.entries()) == 3
    assert len(server.requests) == 2


def test_a_stream_repeated_without_its_log_is_a_snapshot_and_done(make_app: MakeApp) -> None:
    app = make_app()
    caller = Caller(app)
    first = told(read(post(caller, f"{caller.url}/runs", RUNS, **SSE)))
    app.extensions["assistream"].close()
    again = told(read(post(caller, f"{caller.url}/runs", RUNS, **SSE)))
    assert [frame.event for frame in again] == ["thread.snapshot", "done"]
    entries = again[0].data["data"]
    assert [entry["run"]["id"] for entry in entries if entry["run"]] == [
        frame.data["id"] for frame in first if frame.event == "thread.run.created"
    ]


def test_the_answer_is_the_same_whether_it_was_streamed_first_or_not(caller: Caller) -> None:
    read(post(caller, f"{caller.url}/runs", RUNS, **SSE))
    one = post(caller, f"{caller.url}/runs", RUNS)
    assert one.status_code == 202
    assert [run["id"] for run in one.get_json()["runs"]] == [entry["run"]["id"] for entry in caller.wait()[1:]]
    assert post(caller, f"{caller.url}/runs", RUNS).data == one.data


def test_the_keys_of_a_deleted_thread_are_404_and_the_thread_does_not_come_back(caller: Caller) -> None:
    for url, body, _ in commands(caller)[1:]:
        assert post(caller, url, body, key=url).status_code in (201, 202)
    created = post(caller, f"{P}/threads", {}, key="t")
    assert caller.client.delete(caller.url).status_code == 204
    for route, body in (("messages", {"content": "Hi"}), ("runs", RUNS)):
        url = f"{caller.url}/{route}"
        refused(post(caller, url, body, key=url), 404, "thread_not_found")
    caller.client.delete(f"{P}/threads/{created.get_json()['id']}")
    assert post(caller, f"{P}/threads", {}, key="t").data == created.data
    assert caller.client.get(f"{P}/threads").get_json()["data"] == []


def test_keys_are_kept_over_a_restart(app: Flask, caller: Caller) -> None:
    first = post(caller, f"{caller.url}/messages", {"content": "Hi"})
    app.extensions["assistream"].close()
    assert post(caller, f"{caller.url}/messages", {"content": "Hi"}).data == first.data
    assert len(caller.entries()) == 1


def test_keys_are_forgotten_after_24_hours_and_not_before(app: Flask, caller: Caller) -> None:
    assert runtime.ANSWER_SECONDS == 24 * 3600
    store = app.extensions["assistream"].runtime().store
    first = post(caller, f"{caller.url}/messages", {"content": "Hi"})
    store.forget_answers(int(time.time()) - runtime.ANSWER_SECONDS)
    assert post(caller, f"{caller.url}/messages", {"content": "Hi"}).data == first.data
    store.forget_answers(int(time.time()) + 1)
    assert post(caller, f"{caller.url}/messages", {"content": "Hi"}).data != first.data
    assert len(caller.entries()) == 2


def test_old_keys_go_by_themselves(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(flush_seconds=0.05)
    caller = Caller(app)
    first = post(caller, f"{caller.url}/messages", {"content": "Hi"})
    app.extensions["assistream"].close()
    # At its start the housekeeper drops what is too old.
    monkeypatch.setattr(runtime, "ANSWER_SECONDS", -2)
    runtime_of = app.extensions["assistream"].runtime
    store = runtime_of().store
    wait_until(lambda: post(caller, f"{caller.url}/messages", {"content": "Hi"}).data != first.data)
    assert store is runtime_of().store
