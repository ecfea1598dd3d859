"""Who may still see a thread: after a logout, in a browser of several users, from a link, under a name like another."""

from __future__ import annotations

import hashlib
from typing import Any
from uuid import UUID

import pytest
from flask.testing import FlaskClient

from assistream_flask import RequestError, current_assistream
from assistream_flask.runs import values
from assistream_flask.store.sql import Owner
from tests.conftest import Caller, MakeApp
from tests.http_helpers import P, refused

SSE = {"Accept": "text/event-stream"}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
LONG = "n" * 300


def seen(browser: FlaskClient) -> list[str]:
    return [one["id"] for one in browser.get(f"{P}/threads").get_json()["data"]]


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
