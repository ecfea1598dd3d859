"""Who may still see a thread: after a logout, in a browser of several users, from a link, under a name like another."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import flask_login  # type: ignore[import-untyped]
import pytest
import sqlalchemy as sa
from flask import Flask, abort, g, redirect, request, session
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from assistream_flask import ConfigurationError, RequestError, current_assistream
from assistream_flask.runs import values
from assistream_flask.settings import Settings
from assistream_flask.store.sql import Owner
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.web import blueprint
from tests.conftest import Caller, MakeApp, text
from tests.http_helpers import Frame, P, named, read, refused

SSE = {"Accept": "text/event-stream"}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
LONG = "n" * 300


# Streams that outlive a session


class Watched:
    """An event stream that is read in a thread of its own, to its end."""

    def __init__(self, answer: TestResponse) -> None:
        self.frames: list[Frame] = []
        self._beats = threading.Semaphore(0)
        self._thread = threading.Thread(target=read, args=(answer, self._take), daemon=True)
        self._thread.start()

    def _take(self, frame: Frame) -> bool:
        self.frames.append(frame)
        if frame.event == "ping":
            self._beats.release()
        return False

    def beats(self, count: int) -> None:
        """Wait for so many heartbeats."""
        for _ in range(count):
            assert self._beats.acquire(timeout=20), "no heartbeat comes"

    def end(self) -> list[Frame]:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the stream does not end"
        return self.frames


class Door:
    """What an app knows of its one caller, by a token that they send: it changes while streams are open."""

    def __init__(self) -> None:
        self.opens: Callable[[], Any] = lambda: "me"
        self.asked = 0

    def owner(self) -> Any:
        self.asked += 1
        return self.opens()


def fails(error: BaseException) -> Callable[[], Any]:
    def opens() -> Any:
        raise error

    return opens


def stream_of(kind: str, caller: Caller) -> TestResponse:
    """Open a thread's stream, or a POST's whose run does not end."""
    if kind == "thread":
        return caller.client.get(f"{caller.url}/events")
    return caller.client.post(f"{caller.url}/runs", json={"assistant_ids": ["tutor"], "content": "Hi"}, headers=SSE)


@pytest.mark.parametrize("kind", ["thread", "post"])
@pytest.mark.parametrize(
    ("opens", "status"),
    [
        (lambda: None, 401),
        (lambda: "another", 404),
        (lambda: abort(403), 403),
        (lambda: abort(redirect("/login")), 302),
        (fails(AttributeError("'NoneType' object has no attribute 'id'")), 500),
    ],
    ids=["nobody", "another", "forbidden", "login page", "broken"],
)
def test_a_stream_ends_cleanly_once_its_caller_is_no_longer_who_they_were(
    make_app: MakeApp, server: OfflineServer, kind: str, opens: Callable[[], Any], status: int
) -> None:
    server.replies = Reply("one two three", fault="stall")
    door = Door()
    caller = Caller(make_app(owner=door.owner))
    watched = Watched(stream_of(kind, caller))
    watched.beats(2)
    assert door.asked >= 3
    door.opens = opens
    assert "done" not in [frame.event for frame in watched.end()]
    assert caller.client.get(f"{caller.url}/events").status_code == status


@pytest.mark.parametrize(
    "opens",
    [lambda: abort(503), lambda: abort(429), fails(sa.exc.OperationalError("SELECT 1", {}, Exception("away")))],
    ids=["unavailable", "busy", "database away"],
)
def test_a_stream_stays_open_while_it_is_not_known_who_its_caller_is(
    make_app: MakeApp, opens: Callable[[], Any]
) -> None:
    door = Door()
    caller = Caller(make_app(owner=door.owner))
    watched = Watched(caller.client.get(f"{caller.url}/events"))
    door.opens = opens
    watched.beats(3)
    door.opens = lambda: None
    watched.end()


def test_a_stream_that_always_has_something_to_tell_is_asked_about_too(
    make_app: MakeApp, server: OfflineServer
) -> None:
    # Without a pause, in which a heartbeat would go out.
    server.replies = Reply("word " * 3_000, delay=0.01)
    door = Door()
    caller = Caller(make_app(owner=door.owner))
    watched = Watched(caller.client.get(f"{caller.url}/events"))
    [run_id] = caller.run("tutor")
    door.opens = lambda: None
    told = [frame.event for frame in watched.end()]
    assert "thread.run.completed" not in told
    door.opens = lambda: "me"
    caller.cancel(run_id)


def test_what_the_app_does_before_each_request_names_the_caller_of_a_stream_too(make_app: MakeApp) -> None:
    users, closed = {"token": "me"}, []
    app = make_app(owner=lambda: g.user)

    @app.before_request
    def load_user() -> Any:
        g.user = users.get(request.headers.get("X-Token", ""))
        return None if g.user or request.path == "/login" else redirect("/login")

    @app.teardown_request
    def close_database(error: BaseException | None) -> None:
        closed.append(request.path)

    client = app.test_client()
    made = client.post(f"{P}/threads", json={}, headers={"X-Token": "token"})
    url = f"{P}/threads/{made.get_json()['id']}/events"
    watched = Watched(client.get(url, headers={"X-Token": "token"}))
    watched.beats(2)
    users.clear()
    watched.end()
    # What is opened for a question is closed behind it.
    assert closed.count(url) >= 3


def test_a_stream_that_is_old_ends_and_goes_on_without_a_hole(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("word " * 100, delay=0.03)
    caller = Caller(make_app(stream_seconds=1))
    streams, frames = 0, list[Frame]()
    stream = caller.client.get(f"{caller.url}/events")
    [run_id] = caller.run("tutor")
    while "thread.run.completed" not in [frame.event for frame in frames]:
        frames += [frame for frame in read(stream, named("thread.run.completed")) if frame.id]
        streams += 1
        stream = caller.client.get(f"{caller.url}/events?last_event_id={frames[-1].id}")
    stream.close()
    assert streams > 1
    assert [frame.event for frame in frames].count("thread.snapshot") == 1
    assert [int(str(frame.id).split("-")[1]) for frame in frames] == list(range(len(frames)))
    deltas = [one.data for one in frames if one.event == "thread.message.delta"]
    assert "".join(one["delta"]["content"][0]["text"]["value"] for one in deltas) == text(caller.entry(run_id))


def test_a_posts_stream_ends_with_its_runs_however_old_it_is(make_app: MakeApp, server: OfflineServer) -> None:
    server.replies = Reply("word " * 100, delay=0.03)
    caller = Caller(make_app(stream_seconds=1))
    assert read(stream_of("post", caller))[-1].event == "done"


def test_a_stream_of_no_time_is_refused_with_what_to_give() -> None:
    with pytest.raises(ConfigurationError, match="ASSISTREAM_STREAM_SECONDS is 0: give at least 1"):
        Settings.read({"ASSISTREAM_STREAM_SECONDS": 0})


# A browser that others use


class User(flask_login.UserMixin):  # type: ignore[misc]
    def __init__(self, id: str) -> None:
        self.id = id


@pytest.fixture
def browser(make_app: MakeApp) -> FlaskClient:
    """Give a browser, and with it an app that has Flask-Login and no ``owner=``."""
    app = make_app()
    manager = flask_login.LoginManager(app)
    manager.user_loader(User)

    @app.post("/login/<user_id>")
    def login(user_id: str) -> str:
        flask_login.login_user(User(user_id))
        return user_id

    @app.post("/logout")
    def logout() -> str:
        flask_login.logout_user()
        return "bye"

    @app.get("/session")
    def what_is_in_it() -> dict[str, Any]:
        return dict(session)

    return app.test_client()


def begun(browser: FlaskClient) -> str:
    answer = browser.post(f"{P}/threads", json={})
    assert answer.status_code == 201
    return str(answer.get_json()["id"])


def seen(browser: FlaskClient) -> list[str]:
    return [one["id"] for one in browser.get(f"{P}/threads").get_json()["data"]]


def test_the_next_user_of_a_browser_does_not_see_the_last_ones_threads(browser: FlaskClient) -> None:
    browser.post("/login/anna")
    annas = begun(browser)
    browser.post("/logout")
    assert seen(browser) == []
    nobodys = begun(browser)
    browser.post("/login/bert")
    assert seen(browser) == []
    refused(browser.get(f"{P}/threads/{annas}/messages"), 404, "thread_not_found")
    refused(browser.get(f"{P}/threads/{nobodys}/messages"), 404, "thread_not_found")
    berts = begun(browser)
    browser.post("/logout")
    assert seen(browser) == [nobodys]
    browser.post("/login/anna")
    assert seen(browser) == [annas]
    browser.post("/login/bert")
    assert seen(browser) == [berts]


def test_what_a_visitor_began_is_theirs_once_they_have_signed_in(browser: FlaskClient) -> None:
    thread_id = begun(browser)
    browser.post("/login/anna")
    assert seen(browser) == [thread_id]
    browser.post("/logout")
    assert seen(browser) == []


def test_the_cookie_names_no_user_who_has_signed_out(browser: FlaskClient) -> None:
    browser.post("/login/anna")
    begun(browser)
    browser.post("/logout")
    assert "anna" not in browser.get("/session").text


def test_a_stream_of_a_user_who_is_there_no_more_ends(browser: FlaskClient) -> None:
    browser.post("/login/anna")
    watched = Watched(browser.get(f"{P}/threads/{begun(browser)}/events"))
    watched.beats(1)
    browser.application.login_manager.user_loader(lambda user_id: None)  # type: ignore[attr-defined]
    watched.end()


def test_the_doctor_sees_logins_and_that_nobody_is_named_by_them(browser: FlaskClient, make_app: MakeApp) -> None:
    for app, has_logins in ((browser.application, True), (make_app(), False)):
        with app.app_context():
            assert blueprint._patient(current_assistream).has_logins is has_logins


# A link elsewhere


def test_a_link_from_elsewhere_begins_no_session(app: Flask) -> None:
    for headers in (
        LINK,
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Mode": "navigate"},
    ):
        # As a browser has it where the session's cookie is SameSite=Strict.
        answer = app.test_client(use_cookies=False).get(f"{P}/threads", headers=headers)
        refused(answer, 401, "unauthenticated")
        assert "Set-Cookie" not in answer.headers
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert "Set-Cookie" in app.test_client().get(f"{P}/threads", headers=own).headers


def test_a_link_shows_a_caller_what_is_theirs_and_leaves_their_session(caller: Caller) -> None:
    answer = caller.client.get(f"{P}/threads", headers=LINK)
    assert [one["id"] for one in answer.get_json()["data"]] == [caller.thread_id]
    assert "Set-Cookie" not in answer.headers


# Names


@pytest.mark.parametrize("named_so", [0, 0.0, 1.5, b"me", object(), ["me"], {"id": 7}, ("me",)])
def test_what_is_no_id_is_refused_with_what_to_give(
    make_app: MakeApp, named_so: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(owner=lambda: named_so)
    refused(app.test_client().get(f"{P}/threads"), 500, "server_error")
    assert "owner= gave" in caplog.text
    assert "None for nobody" in caplog.text
    with app.app_context(), pytest.raises(RequestError, match="None for nobody"):
        current_assistream.threads(owner=named_so)


@pytest.mark.parametrize("named_so", [7, -1, "7", "0", UUID(int=0)])
def test_an_id_is_a_text_or_a_whole_number(make_app: MakeApp, named_so: Any) -> None:
    caller = Caller(make_app(owner=lambda: named_so))
    with caller.client.application.app_context():
        assert [one["id"] for one in current_assistream.threads(owner=str(named_so))] == [caller.thread_id]


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_no_name_that_an_app_gives_is_what_a_long_one_is_stored_under(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    begun = Caller(make_app(owner=lambda: LONG))
    stored = values.owner_name(LONG)
    assert stored == values.HASHED + digest(LONG)
    other = make_app(owner=lambda: digest(LONG)).test_client()
    refused(other.get(f"{begun.url}/messages"), 404, "thread_not_found")
    thief = make_app(owner=lambda: stored).test_client()
    refused(thief.get(f"{begun.url}/messages"), 500, "server_error")
    assert "owner= gave a name that begins with" in caplog.text
    assert begun.client.get(f"{begun.url}/messages").status_code == 200


@pytest.mark.parametrize("first", ["threads", "messages", "delete_owner"])
def test_what_an_earlier_release_stored_under_a_hash_alone_is_still_the_owners(make_app: MakeApp, first: str) -> None:
    app = make_app(owner=lambda: LONG)
    store = app.extensions["assistream"].runtime().store
    with app.app_context():
        # As the earlier release named them.
        thread_id = current_assistream.create_thread(owner=digest(LONG))["id"]
        client = app.test_client()
        if first == "delete_owner":
            current_assistream.delete_owner(LONG)
            assert store.thread(thread_id) is None
            return
        assert client.get(f"{P}/threads" + (f"/{thread_id}/messages" if first == "messages" else "")).status_code == 200
        assert seen(client) == [thread_id]
        assert current_assistream.threads(owner=digest(LONG)) == []
    assert store.owns(Owner("assistream", values.HASHED + digest(LONG)), thread_id)
