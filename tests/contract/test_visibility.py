"""Who may still see a thread: after a logout, in a browser of several users, from a link, under a name like another."""

from __future__ import annotations

import hashlib
from typing import Any
from uuid import UUID

import flask_login  # type: ignore[import-untyped]
import pytest
from flask import Flask, session
from flask.testing import FlaskClient

from assistream_flask import RequestError, current_assistream
from assistream_flask.runs import values
from assistream_flask.store.sql import Owner
from assistream_flask.web import blueprint
from tests.conftest import Caller, MakeApp
from tests.http_helpers import P, refused

SSE = {"Accept": "text/event-stream"}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
LONG = "n" * 300


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
