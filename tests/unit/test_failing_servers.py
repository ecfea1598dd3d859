"""Connections that had been closed, models that load, ends that don't come, limits that are not told of, and what the
log says of all that."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from assistream_flask import Assistant, lean
from assistream_flask.errors import RUN_ERRORS, RunError, masked
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.upstream import answer_stream, items
from assistream_flask.upstream.deltas import End, Text
from assistream_flask.upstream.errors import failure
from tests.conftest import KEY, Caller, MakeApp, quick_client, text, wait_until
from tests.http_helpers import request_of
from tests.socket_server import SocketServer

TURNS = [items.Turn("user", "Hi")]
CHAT = b'data: {"choices":[{"delta":{"content":"fine"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
RESPONSE = (
    b'data: {"type":"response.output_text.delta","delta":"fine"}\n\n'
    b'data: {"type":"response.completed","response":{"status":"completed"}}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket, int], None]], SocketServer]]:
    servers: list[SocketServer] = []

    def make(what: Callable[[socket.socket, int], None]) -> SocketServer:
        servers.append(SocketServer(what))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


Serve = Callable[[Callable[[socket.socket, int], None]], SocketServer]


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer(client: openai.OpenAI, dialect: str = "chat", **more: Any) -> str:
    stream = answer_stream.open(client, Assistant("a", model="m", upstream=dialect, **more), TURNS, 5)
    return "".join(part.value for parts in stream for part in parts if isinstance(part, Text))


# Connections that were kept, and closed meanwhile


@pytest.mark.parametrize("is_lean", [True, False])
@pytest.mark.parametrize("way", ["closed before", "closed at the request", "reset"])
def test_a_kept_connection_that_gives_no_byte_is_replaced_once(serve: Serve, way: str, is_lean: bool) -> None:
    asked: list[int] = []

    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        asked.append(number)
        peer.sendall(HEAD + chunk(CHAT) + b"0\r\n\r\n")
        if number < 2:
            # The idle limit ends in the moment in which the next request is under way.
            if way != "closed before":
                peer.recv(1)
            if way == "reset":
                reset(peer)
            return
        request_of(peer)
        asked.append(number)
        peer.sendall(HEAD + chunk(CHAT) + b"0\r\n\r\n")

    server = serve(what)
    http_client = openai.DefaultHttpxClient(verify=False)
    http_client = lean(http_client) if is_lean else http_client
    with openai.OpenAI(api_key=KEY, base_url=server.url, http_client=http_client) as client:
        for _ in range(4):
            assert answer(client) == "fine"
    assert asked == [0, 1, 2, 2]


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_new_connection_that_gives_no_byte_is_not_asked_again(serve: Serve, is_reset: bool) -> None:
    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        if is_reset:
            reset(peer)

    server = serve(what)
    with (
        openai.OpenAI(api_key=KEY, base_url=server.url) as client,
        pytest.raises(RunError, match="could not be reached"),
    ):
        answer(client)
    assert server.connections == 1


def test_a_kept_connection_that_gave_a_byte_is_not_asked_again(serve: Serve) -> None:
    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(HEAD + chunk(CHAT) + b"0\r\n\r\n")
        request_of(peer)
        peer.sendall(HEAD + chunk(b": hi\n\n"))

    server = serve(what)
    with openai.OpenAI(api_key=KEY, base_url=server.url) as client:
        assert answer(client) == "fine"
        with pytest.raises(RunError) as caught:
            answer(client)
    assert caught.value.code == "upstream_cut"
    assert server.connections == 1


def test_a_client_that_prepares_its_requests_still_does(serve: Serve) -> None:
    seen: list[bytes] = []

    def what(peer: socket.socket, number: int) -> None:
        seen.append(request_of(peer))
        peer.sendall(HEAD + chunk(CHAT) + b"0\r\n\r\n")

    class Signing(openai.OpenAI):
        def _prepare_request(self, request: httpx2.Request) -> None:
            request.headers["X-Signed"] = "yes"

    with Signing(api_key=KEY, base_url=serve(what).url) as client:
        assert answer(client) == "fine"
    assert b"x-signed: yes" in seen[0].lower()


# Ends that don't come


@pytest.mark.parametrize("behind", [b": heartbeat\n\n", b'event: ping\ndata: {"type": "ping"}\n\n', b""])
@pytest.mark.parametrize("body", [CHAT, CHAT.removesuffix(b"data: [DONE]\n\n"), RESPONSE])
def test_a_connection_that_stays_open_behind_the_last_word_is_left(
    serve: Serve, body: bytes, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All words come in one piece, so that a short wait for more of them loses none.
    monkeypatch.setattr(answer_stream, "LATE_SECONDS", 0.2)
    left = threading.Event()

    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(HEAD + chunk(body))
        peer.settimeout(0.05)
        while True:
            try:
                if not peer.recv(1):
                    break
            except TimeoutError:
                if behind:
                    peer.sendall(chunk(behind))
        left.set()

    dialect = "responses" if body == RESPONSE else "chat"
    with openai.OpenAI(api_key=KEY, base_url=serve(what).url) as client:
        assistant = Assistant("a", model="m", upstream=dialect)
        parts = [part for parts in answer_stream.open(client, assistant, TURNS, 60) for part in parts]
    assert parts == [Text(0, "fine"), End(None, None)]
    assert left.wait(20)


def test_an_answer_goes_on_behind_an_end_that_came_too_early(serve: Serve) -> None:
    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(HEAD)
        for word in ("one", " two", " three"):
            data = json.dumps({"choices": [{"delta": {"content": word}, "finish_reason": "stop"}]})
            peer.sendall(chunk(f"data: {data}\n\n".encode()))
            threading.Event().wait(answer_stream.LATE_SECONDS * 0.6)
        peer.sendall(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    with openai.OpenAI(api_key=KEY, base_url=serve(what).url) as client:
        assert answer(client) == "one two three"


# Models that load


def test_a_model_that_is_loading_is_asked_again_and_says_so_meanwhile(make_app: MakeApp) -> None:
    loads, asked = threading.Event(), threading.Event()

    def transport(request: httpx2.Request) -> httpx2.Response:
        if not loads.is_set():
            asked.set()
            body = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
            return httpx2.Response(503, json=body)
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=RESPONSE)

    http_client = httpx2.Client(transport=httpx2.MockTransport(transport))
    with openai.OpenAI(api_key=KEY, base_url="http://model/v1", http_client=http_client) as client:
        caller = Caller(make_app(client=client))
        run_id, waiting = caller.run("tutor")[0], {"code": "model_loading"}
        wait_until(lambda: (caller.entry(run_id)["run"]["last_error"] or {}).get("code") == waiting["code"])
        run = caller.entry(run_id)["run"]
        assert run["status"] == "in_progress"
        assert "It is asked again" in run["last_error"]["message"]
        loads.set()
        entry = caller.wait(20)[-1]
    assert (entry["run"]["status"], entry["run"]["last_error"], text(entry)) == ("completed", None, "fine")
    assert entry["run"]["started_at"] is not None


def test_a_model_that_loads_is_asked_again_where_its_server_gives_a_key_the_same_answer(make_app: MakeApp) -> None:
    keys: list[str] = []

    def transport(request: httpx2.Request) -> httpx2.Response:
        keys.append(request.headers["Idempotency-Key"])
        if keys[-1] == keys[0]:
            return httpx2.Response(503, json={"error": "Model is currently loading"})
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=RESPONSE)

    http_client = httpx2.Client(transport=httpx2.MockTransport(transport))
    with openai.OpenAI(api_key=KEY, base_url="http://model/v1", http_client=http_client) as client:
        caller = Caller(make_app([Assistant("tutor", model="m", background=True)], client=client))
        (run_id,) = caller.run("tutor")
        assert text(caller.wait(20)[-1]) == "fine"
    assert keys == [f"{run_id}-0", f"{run_id}-1"]


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_a_run_that_waits_for_its_model_can_be_cancelled_and_ends_with_its_time(make_app: MakeApp, end: str) -> None:
    refuse = httpx2.MockTransport(lambda request: httpx2.Response(503, json={"error": "Model is currently loading"}))
    with openai.OpenAI(api_key=KEY, base_url="http://model/v1", http_client=httpx2.Client(transport=refuse)) as client:
        caller = Caller(make_app(client=client, run_seconds=100 if end == "cancelled" else 1))
        (run_id,) = caller.run("tutor")
        wait_until(lambda: caller.entry(run_id)["run"]["last_error"])
        if end == "cancelled":
            caller.cancel(run_id)
        run = caller.wait(20)[-1]["run"]
    assert run["status"] == end
    assert run["last_error"] == (
        None if end == "cancelled" else {"code": "model_loading", "message": RUN_ERRORS["model_loading"]}
    )


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (503, '{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}', "model_loading"),
        (503, '{"error":"Model org/name is currently loading","estimated_time":20.0}', "model_loading"),
        (400, '{"error":"Error loading image https://cdn.x/15035.png"}', "upstream_rejected"),
        (503, "<html><img loading=lazy></html>", "upstream_error"),
        (500, '{"error":"Failed loading plugin, 1503 tokens"}', "upstream_error"),
        (503, '{"error":"no healthy upstream"}', "upstream_error"),
    ],
)
def test_only_a_model_that_is_loading_is_waited_for(status: int, body: str, code: str) -> None:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(status, content=body.encode()))
    with (
        openai.OpenAI(
            api_key=KEY, base_url="http://model/v1", http_client=httpx2.Client(transport=transport)
        ) as client,
        pytest.raises(RunError) as caught,
    ):
        answer(client)
    assert caught.value.code == code


# Limits that are not told of


@pytest.mark.parametrize(("limit", "reason"), [(7, "max_tokens"), (6, "max_tokens"), (8, None), (None, None)])
@pytest.mark.parametrize("where", ["arguments", "extra_body"])
def test_an_answer_as_long_as_it_may_be_was_cut_whatever_its_server_says(
    limit: int | None, reason: str | None, where: str
) -> None:
    usage = b'{"input_tokens":1,"output_tokens":7}'
    body = RESPONSE.replace(b'"status":"completed"', b'"status":"completed","usage":' + usage)
    transport = httpx2.MockTransport(
        lambda request: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    )
    more: dict[str, Any] = {} if limit is None else {"max_output_tokens": limit}
    more = {"extra_body": more} if where == "extra_body" else more
    with openai.OpenAI(
        api_key=KEY, base_url="http://model/v1", http_client=httpx2.Client(transport=transport)
    ) as client:
        stream = answer_stream.open(client, Assistant("a", model="m", **more), TURNS, 5)
        ends = [part for parts in stream for part in parts if isinstance(part, End)]
    assert [end.reason for end in ends] == [reason]


# What the log says


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Incorrect API key provided: sk-proj-abcdefgh1234.", "Incorrect API key provided: ***"),
        ("Incorrect API key provided: abcdef-123456", "Incorrect API key provided: ***"),
        ("the key sk-proj-abcdefgh1234 is wrong", "the key sk-*** is wrong"),
        ("Authorization: Api-Key AQVN123456", "Authorization: Api-Key ***"),
        ('{"raw":"{\\"api_key\\": \\"my-own-secret-77\\"}"}', '{"raw":"{\\"api_key\\": \\"***\\"}"}'),
        ("GET /v1?key=abc1234567&x=1", "GET /v1?key=***&x=1"),
        ("AKIAABCDEFGHIJKLMNOP", "AKIA***"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("key AIzaSyA1234567890abcdef is wrong", "key AIza*** is wrong"),
        ("https://user:secret@host/v1", "https://***@host/v1"),
        ('{"api_key":"0123abcd4567"}', '{"api_key":"***"}'),
        ("token eyJhbGciOi.eyJzdWIiOi.x", "token eyJ***"),
        ("0123456789abcdef0123456789abcdef", "***"),
        ("gsk_abcdefghij and hf_abcdefghij", "gsk_*** and hf_***"),
        ("a\nb\r\x1b[31m", "a\\nb\\r\\x1b[31m"),
        ("maximum context length is 8192 tokens", "maximum context length is 8192 tokens"),
        ("größer als 日本", "größer als 日本"),
    ],
)
def test_the_log_has_no_key_and_one_line(said: str, kept: str) -> None:
    assert masked(said) == kept
    assert RunError("upstream_error", said=said).said == kept


def test_the_log_has_a_bounded_line() -> None:
    assert len(masked("x" * 100_000)) == 500


def test_every_code_has_words_for_the_user() -> None:
    for code, message in RUN_ERRORS.items():
        assert str(RunError(code)) == message
        assert message.endswith(".")


@pytest.mark.parametrize("speaks", ["tutor", "poet"])
@pytest.mark.parametrize("fault", ["401", "429", "500", "400", "error_nested", "error_flat", "cut", "malformed"])
def test_a_failed_run_has_one_line_in_the_log_with_what_the_server_said(
    make_app: MakeApp, server: OfflineServer, caplog: pytest.LogCaptureFixture, speaks: str, fault: str
) -> None:
    caplog.set_level(logging.INFO, "assistream_flask")
    server.replies = Reply("one two three", fault=fault)
    caller = Caller(make_app())
    (run_id,) = caller.run(speaks)
    code = caller.wait()[-1]["run"]["last_error"]["code"]
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([line for line in lines if run_id in line and code in line]) == 1, lines
    assert len(lines) == 1
    assert KEY not in caplog.text
    assert "***" in lines[0] or fault in ("cut", "malformed")


def test_a_stream_of_ones_own_says_in_the_log_why_it_failed(caplog: pytest.LogCaptureFixture) -> None:
    from assistream_flask.web.event_response import relay

    failed = {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "out of memory"}}}
    frames = b"".join(relay(iter([failed]), 10))
    assert b"thread.run.failed" in frames
    assert b"out of memory" not in frames
    assert "out of memory" in caplog.text


def test_what_cannot_be_read_is_logged_once_a_run(caplog: pytest.LogCaptureFixture) -> None:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": [{"type": "hologram", "depth": 3}]}}]},
        {"choices": [{"delta": {"content": [{"type": "hologram", "depth": 4}]}}]},
        {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]},
    ]
    for _ in range(2):
        caplog.clear()
        parts = [part for parts in answer_stream.translate(iter(chunks)) for part in parts]
        assert parts == [Text(0, "fine"), End(None, None)]
        assert [record.getMessage().count("hologram") for record in caplog.records] == [1]


@pytest.mark.parametrize("value", [{"a": {"b": {"c": {"d": {"e": "quota"}}}}}, [[]], 5, None, "", float("nan")])
def test_any_value_can_be_an_error(value: Any) -> None:
    assert failure(value).code in RUN_ERRORS
    assert failure(value, 418).code in ("upstream_rejected", "insufficient_quota")


@pytest.mark.parametrize("indent", [None, 1, "\t"])
def test_a_whole_answer_may_be_laid_out_in_any_way_and_be_large(indent: Any) -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}] * 3000}
    choice = {"index": 0, "message": {"content": "fine"}, "logprobs": logprobs, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]}, indent=indent)
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, content=iter([body.encode()])))
    with openai.OpenAI(
        api_key=KEY, base_url="http://model/v1", http_client=httpx2.Client(transport=transport)
    ) as client:
        assert answer(client) == "fine"


def test_a_fast_request_is_as_it_was(server: OfflineServer) -> None:
    with quick_client(server) as client:
        server.replies = "fine"
        assert [answer(client, dialect) for dialect in ("responses", "chat")] == ["fine", "fine"]
