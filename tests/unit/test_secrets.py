"""The API key is in every error text of the model server; no client may ever read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from flask import Flask

from assistream_flask import Assistant, event_response
from assistream_flask.testing import FAULTS, OfflineServer, Reply
from tests.conftest import KEY, Caller, MakeApp, quick_client, wait_until
from tests.contract.test_upstream import DIALECTS, own


class Ears:
    """Keeps all that a client can read."""

    def __init__(self, app: Flask) -> None:
        self.heard: list[bytes] = []
        app.after_request(self._hear)

    def _hear(self, response: Any) -> Any:
        self.heard.append(f"{response.status}\n{response.headers}".encode())
        if not response.is_streamed:
            self.heard.append(response.get_data())
        return response

    def check(self, at_least: int = 1) -> None:
        assert len(self.heard) >= at_least
        assert not [said for said in self.heard if KEY.encode() in said]


@pytest.fixture
def caller(make_app: MakeApp) -> Iterator[tuple[Caller, Ears]]:
    app = make_app(
        [
            Assistant("responses", model="m", instructions="Be kind."),
            Assistant("chat", model="m", instructions="Be kind.", upstream="chat"),
            Assistant("assistants", instructions="Be kind.", upstream="assistants"),
        ],
        stall_seconds=0.3,
    )
    ears = Ears(app)
    yield Caller(app), ears
    ears.check()


def test_the_model_server_does_say_the_key(server: OfflineServer) -> None:
    server.replies = Reply(fault="401")
    with quick_client(server) as client, pytest.raises(openai.AuthenticationError, match=KEY):
        own(client, "responses")


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_brings_the_key_into_an_answer_or_an_event(
    caller: tuple[Caller, Ears], server: OfflineServer, tmp_path: Path, fault: str
) -> None:
    one, ears = caller
    server.replies = Reply("one two three", fault=fault)
    body = {"assistant_ids": list(DIALECTS), "content": "Hi"}
    answer = one.client.post(f"{one.url}/runs", json=body, headers={"Accept": "text/event-stream"})
    ears.heard.append(answer.get_data())
    assert ears.heard[-1].endswith(b"event: done\ndata: [DONE]\n\n")
    runs = one.run(*DIALECTS)
    one.cancel(runs[0])
    one.wait()
    with one.client.get(f"{one.url}/events", buffered=False) as events:
        ears.heard.append(next(iter(events.iter_encoded())))
    assert b"thread.snapshot" in ears.heard[-1]
    one.client.get("/assistream/assistants")
    assert KEY in {request.key for request in server.requests}
    ears.check(5)
    for file in tmp_path.glob("test.sqlite3*"):
        assert KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.isdecimal() and fault != "stall_headers"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_event_response_says_nothing_of_the_key(server: OfflineServer, dialect: str, fault: str) -> None:
    server.replies = Reply("one two three", fault=fault)
    with quick_client(server, timeout=0.3) as client:
        body = event_response(own(client, dialect)).get_data()
    assert body.endswith(b"event: done\ndata: [DONE]\n\n")
    assert KEY.encode() not in body


def test_a_client_or_an_assistant_that_cannot_be_made_says_nothing_of_the_key(make_app: MakeApp) -> None:
    def broken_client() -> openai.OpenAI:
        raise RuntimeError(f"no client with {KEY}")

    def broken_assistants() -> list[Assistant]:
        raise RuntimeError(f"no assistants with {KEY}")

    app = make_app(client=broken_client)
    ears = Ears(app)
    one = Caller(app)
    one.run("tutor")
    assert one.wait()[-1]["run"]["last_error"]["code"] == "server_error"
    ears.check(4)

    app = make_app(broken_assistants)
    ears = Ears(app)
    assert app.test_client().get("/assistream/assistants").status_code == 500
    ears.check(2)


def test_the_example_page_says_nothing_of_the_key(
    server: OfflineServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from example_app import create_app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    server.replies = Reply("one two three", fault="401")
    made: list[openai.OpenAI] = []
    plain = openai.OpenAI.__init__

    def remembered(client: openai.OpenAI, *arguments: Any, **named: Any) -> None:
        plain(client, *arguments, **named)
        made.append(client)

    monkeypatch.setattr(openai.OpenAI, "__init__", remembered)
    app = create_app(
        {
            "SECRET_KEY": "only for tests",
            "ASSISTREAM_DRAIN_SECONDS": 0,
            "ASSISTREAM_DATABASE_URL": f"sqlite:///{tmp_path / 'example.sqlite3'}",
        }
    )
    ears = Ears(app)
    try:
        one = Caller(app)
        for path in ("/", "/assistream/assistream.js", "/assistream/assistants"):
            with one.client.get(path) as answer:
                assert answer.status_code == 200
                assert KEY not in answer.get_data(as_text=True)
        one.run("tutor", "critic", "poet")
        one.wait()
        wait_until(lambda: len(server.requests) == 3)
        assert {request.key for request in server.requests} == {KEY}
        ears.check(5)
    finally:
        app.extensions["assistream"].close()
        for client in made:
            client.close()
