"""Limits that hold for all visitors of one address together, and quotas, through the routes and the Python API."""

from __future__ import annotations

import logging

import pytest
from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import TestResponse

from assistream_flask import RequestError, current_assistream
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, wait_until
from tests.http_helpers import P, read, refused

HERE, THERE = "93.184.216.34", "151.101.1.69"
BODY = {"assistant_ids": ["tutor"], "content": "Hi"}


CODE = "too_many_address_runs"


def visitor(app: Flask, address: str = HERE) -> Caller:
    """Give one with a cookie of their own."""
    return Caller(app, address=address)


def ask(caller: Caller, **headers: str) -> TestResponse:
    return caller.client.post(f"{caller.url}/runs", json=BODY, headers=headers)


def test_over_the_limit_of_runs_an_address_is_429_under_any_name_until_one_ends(
    make_app: MakeApp, server: OfflineServer
) -> None:
    app = make_app(address_runs=2)
    server.replies = Reply(fault="stall")
    one, two, elsewhere = visitor(app), visitor(app), visitor(app, THERE)
    [first] = one.run("tutor")
    refused(two.client.post(f"{two.url}/runs", json={**BODY, "assistant_ids": ["tutor", "critic"]}), 429, CODE)
    two.run("tutor")
    for accept in ("*/*", "text/event-stream"):
        answer = ask(visitor(app), Accept=accept)
        assert "2 answers" in refused(answer, 429, CODE)
        assert int(answer.headers["Retry-After"]) > 0
    assert app.extensions["assistream"].runtime().streams.callers == {}
    elsewhere.run("tutor", "critic")
    assert one.client.post(f"{one.url}/messages", json={"content": "Hi"}).status_code == 201
    one.cancel(first)
    wait_until(lambda: ask(two).status_code == 202)


def test_a_run_that_is_asked_for_again_by_its_key_takes_no_other_place(
    make_app: MakeApp, server: OfflineServer
) -> None:
    app = make_app(address_runs=1)
    server.replies = Reply(fault="stall")
    one = visitor(app)
    given = [ask(one, **{"Idempotency-Key": "k"}) for _ in range(2)]
    assert [answer.status_code for answer in given] == [202, 202]
    assert given[0].get_json() == given[1].get_json()
    # One that is refused for another reason keeps no place.
    server.replies = Reply("Hi")
    other = visitor(app, THERE)
    for _ in range(3):
        refused(other.client.post(f"{P}/threads/thread_{'0' * 32}/runs", json=BODY), 404, "thread_not_found")
    other.run("tutor")
    other.wait()


def test_over_the_limit_of_streams_an_address_is_429_under_any_name_until_one_closes(make_app: MakeApp) -> None:
    app = make_app(address_streams=2)
    visitors = [visitor(app) for _ in range(3)]
    streams = [one.client.get(f"{one.url}/events") for one in visitors[:2]]
    answer = visitors[2].client.get(f"{visitors[2].url}/events")
    assert "Close one" in refused(answer, 429, "too_many_address_streams")
    assert int(answer.headers["Retry-After"]) > 0
    refused(ask(visitors[2], Accept="text/event-stream"), 429, "too_many_address_streams")
    elsewhere = visitor(app, THERE)
    elsewhere.client.get(f"{elsewhere.url}/events").close()
    streams[0].close()
    assert read(visitors[2].client.get(f"{visitors[2].url}/events"), lambda _: True)[0].event == "thread.snapshot"
    streams[1].close()


def test_an_address_begins_so_many_sessions_a_minute_and_those_that_have_one_go_on(make_app: MakeApp) -> None:
    app = make_app(address_sessions=3)
    visitors = [visitor(app) for _ in range(3)]
    for method in ("GET", "POST"):
        answer = app.test_client().open(f"{P}/threads", method=method, environ_base={"REMOTE_ADDR": HERE})
        assert "keep the cookie" in refused(answer, 429, "too_many_sessions")
        assert int(answer.headers["Retry-After"]) > 0
        assert "Set-Cookie" not in answer.headers
    for one in visitors:
        assert one.client.post(f"{P}/threads").status_code == 201
    visitor(app, THERE)


@pytest.mark.parametrize("named", [True, False])
def test_users_that_the_app_names_have_limits_by_their_names_only(make_app: MakeApp, named: bool) -> None:
    app = make_app(owner=(lambda: "me") if named else None, address_streams=1, address_runs=1)
    one = visitor(app)
    streams = [one.client.get(f"{one.url}/events") for _ in range(2)]
    assert [answer.status_code for answer in streams] == [200, 200 if named else 429]
    for answer in streams:
        answer.close()


def test_visitors_behind_a_proxy_that_hides_them_have_no_limits_by_address_and_the_log_says_so_once(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(address_sessions=1)
    client = app.test_client(use_cookies=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert client.post(f"{P}/threads", headers={"X-Forwarded-For": HERE}).status_code == 201
    (warning,) = [one.getMessage() for one in caplog.records if "ProxyFix" in one.getMessage()]
    assert "127.0.0.1" in warning


def test_behind_a_proxy_and_proxy_fix_each_visitor_has_an_address(make_app: MakeApp) -> None:
    app = make_app(address_sessions=1)
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    client = app.test_client(use_cookies=False)
    for address, status in ((HERE, 201), (HERE, 429), (THERE, 201), (f"{HERE}, {THERE}", 429)):
        assert client.post(f"{P}/threads", headers={"X-Forwarded-For": address}).status_code == status


# Quotas


def test_a_caller_keeps_so_many_threads_and_is_told_to_delete_one(make_app: MakeApp) -> None:
    app = make_app(max_threads=2)
    caller = Caller(app)
    assert caller.client.post(f"{P}/threads").status_code == 201
    answer = caller.client.post(f"{P}/threads", headers={"Idempotency-Key": "k"})
    assert "Delete one" in refused(answer, 403, "too_many_threads")
    assert "Retry-After" not in answer.headers
    Caller(app)
    caller.client.delete(caller.url)
    assert caller.client.post(f"{P}/threads", headers={"Idempotency-Key": "k"}).status_code == 201


def test_a_thread_has_so_many_messages_with_its_answers_and_another_is_to_be_begun(make_app: MakeApp) -> None:
    caller = Caller(make_app(max_messages=3))
    caller.run("tutor")
    for accept in ("*/*", "text/event-stream"):
        answer = caller.client.post(f"{caller.url}/runs", json=BODY, headers={"Accept": accept})
        assert "Begin a new thread" in refused(answer, 403, "too_many_messages")
    assert caller.client.post(f"{caller.url}/messages", json={"content": "Hi"}).status_code == 201
    refused(caller.client.post(f"{caller.url}/messages", json={"content": "Hi"}), 403, "too_many_messages")
    assert len(caller.wait()) == 3


def test_an_apps_own_code_has_quotas_and_no_address(make_app: MakeApp) -> None:
    app = make_app(owner=lambda: "me", max_threads=1, max_messages=1, address_runs=1)
    with app.app_context():
        thread = current_assistream.create_thread(owner="me")
        current_assistream.add_message(thread["id"], "Hi", owner="me")
        with pytest.raises(RequestError) as told:
            current_assistream.create_thread(owner="me")
        assert told.value.code == "too_many_threads"
        with pytest.raises(RequestError) as told:
            current_assistream.run(thread["id"], ["tutor", "critic"], owner="me")
        assert told.value.code == "too_many_messages"
