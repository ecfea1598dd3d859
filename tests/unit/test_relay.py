"""`event_response`: a developer's own stream as a correct SSE response."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from flask import Flask, Response
from flask.typing import ResponseReturnValue
from werkzeug.serving import make_server

from assistream_flask import event_response
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import quick_client, wait_until
from tests.contract.test_upstream import CODES, DIALECTS, FORMS, IN_MID_STREAM, own

TEXT = "one “two”\n\nthree\u2028four 🌍"
FRAME = re.compile(rb"event: ([a-z_.]+)\ndata: ([^\r\n]*)\n\n")


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with quick_client(server, timeout=20) as client:
        yield client


def delta(value: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "delta": value}


END: dict[str, Any] = {"type": "response.completed", "response": {"status": "completed"}}


def frames(body: bytes) -> list[tuple[str, Any]]:
    """Give the events of a whole body, which must consist of exact frames and nothing else."""
    assert body.startswith(b"retry: 1000\n")
    body = body.removeprefix(b"retry: 1000\n")
    assert FRAME.sub(b"", body) == b""
    found = [(name.decode(), data.decode()) for name, data in FRAME.findall(body)]
    assert found[-1] == ("done", "[DONE]")
    return [(name, json.loads(data)) for name, data in found[:-1]]


def said(events: list[tuple[str, Any]]) -> str:
    return "".join(
        part["text"]["value"]
        for name, data in events
        if name == "thread.message.delta"
        for part in data["delta"]["content"]
    )


def check_life(events: list[tuple[str, Any]], status: str, message: str) -> None:
    """Give the order of a run's events, one terminal event of each kind, and one state in all of them."""
    names = [name for name, _ in events if name not in ("thread.message.delta", "ping")]
    assert names == [
        "thread.run.created",
        "thread.run.in_progress",
        "thread.message.created",
        f"thread.message.{message}",
        f"thread.run.{status}",
    ]
    run, whole = events[-1][1], events[-2][1]
    assert run["message_id"] == whole["id"]
    assert whole["run_id"] == run["id"]
    assert {data["id"] for name, data in events if name.startswith("thread.run")} == {run["id"]}
    assert {data["id"] for name, data in events if name.startswith("thread.message")} == {whole["id"]}
    text = "".join(part["text"]["value"] for part in whole["content"])
    assert said(events) == text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_iterator_becomes_one_whole_run(
    server: OfflineServer, client: openai.OpenAI, dialect: str, form: str
) -> None:
    server.replies = Reply(TEXT, usage=(1, 2))
    response = event_response(FORMS[form](own(client, dialect)))
    events = frames(response.get_data())
    check_life(events, "completed", "completed")
    assert said(events) == TEXT
    assert events[-1][1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    response.close()


@pytest.mark.parametrize("fault", [*IN_MID_STREAM, "error_first", "function_call"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_failure_is_one_failed_run_and_a_clean_end(server: OfflineServer, dialect: str, fault: str) -> None:
    server.replies = Reply("one two three", fault=fault)
    with quick_client(server, timeout=0.3 if fault == "stall" else 20) as client:
        events = frames(event_response(own(client, dialect)).get_data())
    check_life(events, "failed", "incomplete")
    assert events[-1][1]["last_error"]["code"] == CODES[fault]
    assert events[-2][1]["incomplete_details"] == {"reason": "run_failed"}


def test_an_iterator_that_breaks_is_a_failed_run() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield delta("one")
        raise RuntimeError("sk-secret")

    body = event_response(broken()).get_data()
    events = frames(body)
    check_life(events, "failed", "incomplete")
    assert said(events) == "one"
    assert b"sk-secret" not in body


@pytest.mark.parametrize("empty", [[], [{"type": "response.created"}]])
def test_a_stream_without_an_end_is_a_failed_run(empty: list[Any]) -> None:
    events = frames(event_response(iter(empty)).get_data())
    check_life(events, "failed", "incomplete")
    assert events[-1][1]["last_error"]["code"] == "upstream_ended_early"


def test_the_headers_keep_caches_and_proxies_out_of_it() -> None:
    response = event_response(iter([END]))
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache, no-store, no-transform"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert {"Connection", "Content-Length", "Transfer-Encoding", "Keep-Alive"}.isdisjoint(response.headers.keys())
    response.close()


def test_a_ping_goes_out_while_the_upstream_is_silent() -> None:
    go_on = threading.Event()

    def slow() -> Iterator[dict[str, Any]]:
        yield delta("one")
        assert go_on.wait(20)
        yield END

    body = b""
    for chunk in event_response(slow(), heartbeat_seconds=0.05).iter_encoded():
        body += chunk
        if body.count(b"event: ping\ndata: {}\n\n") == 3:
            go_on.set()
    events = frames(body)
    check_life(events, "completed", "completed")
    assert said(events) == "one"


def test_what_is_no_stream_of_events_raises_before_anything_is_sent(
    server: OfflineServer, client: openai.OpenAI
) -> None:
    async def events() -> Any:
        yield {}

    whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    wrongs: list[object] = [events(), client.responses.stream(model="m", input="Hi"), whole, "text", None]
    for wrong in wrongs:
        with pytest.raises(TypeError, match="stream=True"):
            event_response(wrong)


# The client leaves


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("read", [0, 1, 3])
def test_the_upstream_is_closed_when_the_client_leaves(
    server: OfflineServer, client: openai.OpenAI, dialect: str, read: int
) -> None:
    server.replies = Reply("one two three", fault="stall")
    response = event_response(own(client, dialect))
    chunks = response.iter_encoded()
    for _ in range(read):
        next(chunks)
    response.close()
    response.close()
    assert server.requests[0].wait()
    assert server.requests[0].disconnected


def test_a_generator_is_closed_when_the_client_leaves() -> None:
    closed = threading.Event()

    def slow() -> Iterator[dict[str, Any]]:
        try:
            while True:
                time.sleep(0.02)
                yield delta("on and on ")
        finally:
            closed.set()

    response = event_response(slow())
    chunks = response.iter_encoded()
    next(chunks)
    next(chunks)
    response.close()
    assert closed.wait(5)


def test_a_slow_client_holds_the_upstream_back() -> None:
    made = 0

    def fast() -> Iterator[dict[str, Any]]:
        nonlocal made
        for _ in range(5000):
            made += 1
            yield delta("x")
        yield END

    response = event_response(fast())
    chunks = response.iter_encoded()
    body = next(chunks) + next(chunks)
    wait_until(lambda: made > 200)
    time.sleep(0.3)
    assert made < 1000
    body += b"".join(chunks)
    assert said(frames(body)) == "x" * 5000


class Served:
    """A real WSGI server with one route."""

    def __init__(self, view: Callable[[], ResponseReturnValue]) -> None:
        app = Flask("app")
        app.add_url_rule("/", "view", view)
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> socket.socket:
        self._thread.start()
        self._client = socket.create_connection(("127.0.0.1", self._server.server_port), timeout=10)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_the_upstream_is_closed_when_a_socket_breaks(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two three", fault="stall")

    def view() -> Response:
        return event_response(own(client, "responses"), heartbeat_seconds=0.05)

    with Served(view) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        seen = b""
        while b"one" not in seen:
            seen += connection.recv(65536)
        connection.close()
        assert server.requests[0].wait(10)
        assert server.requests[0].disconnected


def test_head_gets_headers_and_closes_the_upstream(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = Reply("one two three", fault="stall")
    app = Flask("app")
    app.add_url_rule("/", "view", lambda: event_response(own(client, "chat")))
    answer = app.test_client().head("/")
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    answer.close()
    assert server.requests[0].wait()
    assert server.requests[0].disconnected


def test_the_chat_stream_manager_gives_the_whole_too(server: OfflineServer, client: openai.OpenAI) -> None:
    server.replies = "All of it."
    with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "Hi"}]) as stream:
        events = frames(event_response(stream).get_data())
    check_life(events, "completed", "completed")
    assert said(events) == "All of it."
