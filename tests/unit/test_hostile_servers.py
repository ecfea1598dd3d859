"""Answers without limit, and addresses that lead elsewhere: what a model server, or who stands in its place, can send,
and what becomes of it."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import httpx2
import openai
import pytest
from flask import Flask

from assistream_flask import Assistant, ConfigurationError, event_response, events, lean
from assistream_flask.errors import RunError
from assistream_flask.events import Json
from assistream_flask.extension import Registration
from assistream_flask.fast import read_gate
from assistream_flask.fast.chunk_reader import new_client
from assistream_flask.fast.read_gate import ReadGate
from assistream_flask.platform import openai_sdk
from assistream_flask.runs.runner import Runner
from assistream_flask.settings import Settings
from assistream_flask.testing import OfflineServer, Reply
from assistream_flask.upstream import answer_stream, event_reader
from assistream_flask.upstream.delivered import Shown
from assistream_flask.upstream.deltas import Annotation, End, Text
from assistream_flask.web import doctor
from tests.conftest import KEY, Caller, MakeApp, quick_client, text, wait_until
from tests.contract.test_upstream import DIALECTS, assistant, read
from tests.http_helpers import request_of
from tests.unit.test_failing_servers import HEAD, RESPONSE, TURNS, Serve, answer, chunk
from tests.unit.test_failing_servers import serve as serve

BEGIN = b'data: {"type":"response.output_text.delta","delta":"'
DELTA = b'data: {"type":"response.output_text.delta","delta":"word "}\n\n'
MEGABYTE = b"a" * (1 << 20)


class Endless:
    """Answers with ``first``, then with ``piece`` until the client leaves, or a hundred megabytes went."""

    def __init__(self, first: bytes, piece: bytes) -> None:
        self._first, self._piece = first, chunk(piece)
        self.left = threading.Event()
        self.requests: list[bytes] = []

    def __call__(self, peer: socket.socket, number: int) -> None:
        self.requests.append(request_of(peer))
        try:
            peer.sendall(self._first)
            for _ in range(100 * (1 << 20) // len(self._piece)):
                peer.sendall(self._piece)
        except OSError:
            self.left.set()


def code_of(client: openai.OpenAI, dialect: str = "responses") -> str:
    with pytest.raises(RunError) as caught:
        answer(client, dialect)
    return caught.value.code


def at(url: str, *, is_lean: bool = True, **more: Any) -> openai.OpenAI:
    http_client = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(api_key=KEY, base_url=url, http_client=lean(http_client) if is_lean else http_client, **more)


def mocked(handler: Callable[[httpx2.Request], httpx2.Response]) -> openai.OpenAI:
    http_client = httpx2.Client(transport=httpx2.MockTransport(handler))
    return openai.OpenAI(api_key=KEY, base_url="http://model/v1", http_client=http_client)


def streamed(*told: Json) -> Callable[[httpx2.Request], httpx2.Response]:
    body = b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in told)
    return lambda request: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)


# One event


@pytest.mark.parametrize("is_lean", [True, False])
@pytest.mark.parametrize(
    "piece", [MEGABYTE, b"data: 1\n" * 8192, b'"}\ndata: {"x":"' * 4096], ids=["line", "lines", "json"]
)
def test_an_event_without_end_fails_the_run_and_closes_the_connection(
    serve: Serve, piece: bytes, is_lean: bool
) -> None:
    endless = Endless(HEAD + chunk(BEGIN), piece)
    tracemalloc.start()
    try:
        with at(serve(endless).url, is_lean=is_lean) as client:
            stream = answer_stream.open(client, Assistant("a", model="m"), TURNS, 5)
            with pytest.raises(RunError) as caught:
                list(stream)
            stream.close()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == "answer_too_long"
    assert "16777216 bytes" in caught.value.said
    assert endless.left.wait(10)
    assert most < 100 << 20


def test_an_event_that_is_merely_large_is_read(serve: Serve) -> None:
    whole = {"type": "response.completed", "response": {"status": "completed", "padding": "a" * (12 << 20)}}
    body = b'data: {"type":"response.output_text.delta","delta":"fine"}\n\ndata: %b\n\n' % json.dumps(whole).encode()

    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(HEAD + chunk(body) + b"0\r\n\r\n")

    with at(serve(what).url) as client:
        assert answer(client, "responses") == "fine"


def test_a_read_that_says_nothing_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[None] = []

    class Slice:
        def share(self) -> None:
            shared.append(None)

    monkeypatch.setattr(event_reader, "TimeSlice", Slice)
    body = iter([b": ping\n\n"] * 50 + [RESPONSE])
    with mocked(lambda request: httpx2.Response(200, content=body)) as client:
        assert answer(client, "responses") == "fine"
    assert len(shared) >= 50


@pytest.mark.parametrize("piece", [b": ping\n\n", b"id: 1\n\n", b":" + b" " * 2_000 + b"\n"])
def test_an_answer_fails_of_which_megabytes_say_nothing(piece: bytes) -> None:
    piece *= 65_536 // len(piece)
    with mocked(lambda request: httpx2.Response(200, content=itertools.chain([piece] * 80, [RESPONSE]))) as client:
        assert code_of(client) == "answer_too_long"


def test_an_answer_that_says_nothing_for_long_again_and_again_is_read() -> None:
    told = b'data: {"type":"response.output_text.delta","delta":"x"}\n\n'
    body = itertools.chain(([b": ping\n\n" * 8_000] * 40 + [told]) * 3, [RESPONSE])
    with mocked(lambda request: httpx2.Response(200, content=body)) as client:
        assert answer(client, "responses").startswith("xxx")


_GREEDY = """
from gevent import monkey; monkey.patch_all()
import socket, threading, time
from assistream_flask.fast.read_gate import TimeSlice

ours, theirs = socket.socketpair()
slices = 0

def flood():
    global slices
    turn = TimeSlice()
    while True:
        until = time.monotonic() + 0.003
        while time.monotonic() < until:
            pass
        slices += 1
        turn.share()

def echo():
    while data := theirs.recv(1):
        theirs.sendall(data)

for one in [flood] * 20 + [echo]:
    threading.Thread(target=one, daemon=True).start()
for _ in range(10):
    ours.sendall(b"x")
    ours.recv(1)
print(slices)
"""


def test_floods_however_many_let_others_go_on_whose_bytes_have_come() -> None:
    found = subprocess.run([sys.executable, "-c", _GREEDY], capture_output=True, text=True, check=True, timeout=60)
    # Two ways there and back, ten times, with twenty floods: if all of them went on each time, it would be 400.
    assert int(found.stdout) <= 80


@pytest.mark.parametrize("told", ["at once", "one by one", "empty"])
def test_an_answer_of_very_many_parts_fails(told: str) -> None:
    parts: list[Json] = [{"type": "output_text", "text": "" if told == "empty" else "a"} for _ in range(20_000)]
    done = {"type": "response.completed", "response": {"status": "completed", "output": []}}
    if told == "one by one":
        deltas: Iterable[Json] = (
            {"type": "response.output_text.delta", "delta": "a", "output_index": n} for n in range(1_100)
        )
        events_of: list[Json] = [*deltas, done]
    else:
        known = [{"type": "response.output_text.delta", "delta": "a", "output_index": n} for n in range(900)]
        output = [{"type": "message", "content": parts}]
        events_of = [*known, {**done, "response": {"status": "completed", "output": output}}]
    with mocked(streamed(*events_of)) as client:
        assert code_of(client) == "answer_too_long"


@pytest.mark.parametrize("name", ["content", "annotations", "summary"])
def test_an_event_of_more_values_than_a_worker_can_look_at_in_between_fails(name: str) -> None:
    item = {"type": "reasoning" if name == "summary" else "message", "content": [{"type": "output_text", "text": "a"}]}
    item |= {name: [{}] * 60_000}
    done = {"type": "response.completed", "response": {"status": "completed", "output": [item]}}
    with mocked(streamed(done)) as client:
        assert code_of(client) == "answer_too_long"


def test_a_long_answer_may_have_something_to_say_of_each_of_its_tokens() -> None:
    tokens = [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []} for _ in range(60_000)]
    content = [{"type": "output_text", "text": "a" * 60_000, "annotations": [], "logprobs": tokens}]
    output = [{"type": "message", "content": content}]
    prompt = {"prompt_token_ids": list(range(60_000))}
    done = {"type": "response.completed", "response": {"status": "completed", "output": output, **prompt}}
    with mocked(streamed(done)) as client:
        assert answer(client, "responses") == "a" * 60_000


def test_what_is_read_ahead_is_bounded() -> None:
    gate, taken = ReadGate(), itertools.count()
    gate.source, gate.is_fed = iter(lambda: next(taken), 100_000), True
    feeding = threading.Thread(target=gate.feed, daemon=True)
    feeding.start()
    wait_until(lambda: len(gate._fed) == read_gate._AHEAD)
    assert next(taken) <= read_gate._AHEAD + 1
    # Its stream takes them, and more come.
    assert len(next(one for one in gate.through(iter(())) if one)) == read_gate._AHEAD
    wait_until(lambda: len(gate._fed) >= read_gate._AHEAD)
    gate.is_left = True
    feeding.join(10)
    assert not feeding.is_alive()


# What is compressed


def test_an_answer_is_asked_for_without_compression_unless_the_apps_client_says_otherwise(
    server: OfflineServer,
) -> None:
    server.replies = "fine"
    for more, said in ({}, "identity"), ({"default_headers": {"accept-encoding": "gzip"}}, "gzip"):
        with quick_client(server, **more) as client:
            assert [answer(client, dialect) for dialect in DIALECTS[:2]] == ["fine", "fine"]
        assert {request.headers["accept-encoding"] for request in server.requests[-2:]} == {said}


@pytest.mark.parametrize("is_error", [True, False])
def test_a_few_bytes_that_become_very_many_are_not_taken(serve: Serve, is_error: bool) -> None:
    body = gzip.compress(BEGIN + MEGABYTE * 200)
    status = b"500 Oh" if is_error else b"200 OK"
    head = b"HTTP/1.1 %b\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"

    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(head % (status, len(body)) + body)

    tracemalloc.start()
    try:
        with at(serve(what).url) as client:
            assert code_of(client) == ("upstream_error" if is_error else "answer_too_long")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100 << 20


def test_a_compressed_answer_is_still_read(serve: Serve) -> None:
    body = gzip.compress(DELTA * 40_000 + RESPONSE)

    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        peer.sendall(head % len(body) + body)

    with at(serve(what).url) as client:
        assert answer(client, "responses") == "word " * 40_000 + "fine"


# What is no stream


def test_an_error_without_end_is_read_as_far_as_the_log_needs(serve: Serve) -> None:
    endless = Endless(HEAD.replace(b"200 OK", b"429 Oh") + chunk(b'{"error": "quota exceeded, '), MEGABYTE)
    with at(serve(endless).url) as client:
        assert code_of(client) in ("rate_limit_exceeded", "insufficient_quota")
    assert endless.left.wait(10)


def test_the_body_of_an_error_that_breaks_off_leaves_its_status(serve: Serve) -> None:
    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(b"HTTP/1.1 401 Oh\r\nContent-Length: 1000\r\n\r\n{")

    with at(serve(what).url) as client:
        assert code_of(client) == "upstream_unauthorized"


def test_a_polled_answer_without_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_sdk, "LONGEST_BODY", 1000)

    def handler(request: httpx2.Request) -> httpx2.Response:
        if "stream" in str(request.url):
            return httpx2.Response(400, json={"error": {"message": "streamed no more"}})
        return httpx2.Response(200, json={"status": "completed", "output": [], "padding": "a" * 1000})

    state = {"response_id": "r", "sequence": 1, "slots": [], "paragraph": False}
    with mocked(handler) as client, pytest.raises(RunError) as caught:
        list(answer_stream.resume(client, Assistant("a", model="m", background=True), state, 5, every=0.01))
    assert caught.value.code == "answer_too_long"


# The whole answer


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_is_cut_at_its_limit_and_ends_as_one_that_its_server_cut(server: OfflineServer, dialect: str) -> None:
    server.replies = Reply("one two three four five six", delay=0.001)
    with quick_client(server) as client:
        ask = assistant(dialect)
        got = read(lambda: answer_stream.open(client, ask, TURNS, 5, most=9))
        assert (got.text, got.end) == ("one two t", End("max_tokens", None))
        # What is as long as it may be is whole.
        got = read(lambda: answer_stream.open(client, ask, TURNS, 5, most=27))
        assert got.end is not None
        assert (got.text, got.end.reason) == ("one two three four five six", None)


@pytest.mark.parametrize("dialect", ["responses", "chat"])
def test_reasoning_and_refusals_count_too(server: OfflineServer, dialect: str) -> None:
    server.replies = Reply("12345", reasoning="12345", refusal="12345")
    with quick_client(server) as client:
        got = read(lambda: answer_stream.open(client, assistant(dialect), TURNS, 5, most=12))
    assert (got.reasoning, got.text, list(got.refusals.values())) == ("12345", "12345", ["12"])
    assert got.end == End("max_tokens", None)


def test_annotations_count_too() -> None:
    note = {"type": "url_citation", "url": "https://example.org"}
    told: list[Json] = [{"type": "response.output_text.annotation.added", "annotation": note}] * 100
    parts = [part for parts in answer_stream.translate(iter(told), most=1000) for part in parts]
    assert 0 < sum(isinstance(part, Annotation) for part in parts) < 25
    assert parts[-1] == End("max_tokens", None)


def test_a_run_that_is_cut_is_incomplete_keeps_its_text_and_leaves_its_server(
    make_app: MakeApp, server: OfflineServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.replies = Reply("word " * 1000, delay=0.001)
    caller = Caller(make_app(max_answer_chars=12))
    caller.run("tutor")
    entry = caller.wait()[-1]
    assert text(entry) == "word word wo"
    assert entry["run"]["status"] == "incomplete"
    assert entry["run"]["incomplete_details"] == {"reason": "max_completion_tokens"}
    assert entry["message"]["incomplete_details"] == {"reason": "max_tokens"}
    assert server.requests[0].wait()
    assert server.requests[0].disconnected
    assert "ASSISTREAM_MAX_ANSWER_CHARS" in caplog.text


def test_an_answer_that_is_gone_on_with_is_cut_at_the_same_place(server: OfflineServer) -> None:
    server.replies = Reply("one two three four five six", delay=0.001)
    background = Assistant("a", model="m", background=True)
    with quick_client(server) as client:
        first = answer_stream.open(client, background, TURNS, 5)
        said = ""
        for parts in first:
            said += "".join(part.value for part in parts if isinstance(part, Text))
            if len(said) > 7:
                break
        state = first.state()
        first.close()
        assert state is not None
        message = events.message("thread", "assistant", [events.text_part(said)])
        for shown in (None, Shown(message, [])):
            got = read(partial(answer_stream.resume, client, background, state, 5, shown=shown, most=20))
            assert said + got.text == "one two three four five six"[:20]
            assert got.end == End("max_tokens", None)
        got = read(lambda: answer_stream.resume(client, background, state, 5, most=3))
        assert (got.text, got.end) == ("", End("max_tokens", None))


def test_a_stream_of_ones_own_is_cut_too() -> None:
    told: list[Json] = [{"type": "response.output_text.delta", "delta": "word " * 10}]
    app = Flask("app")
    app.config["ASSISTREAM_MAX_ANSWER_CHARS"] = 7
    with app.app_context():
        body = event_response(iter(told)).get_data()
    assert b'"value":"word wo"' in body
    assert b"thread.run.incomplete" in body


def test_a_limit_of_answers_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ASSISTREAM_MAX_ANSWER_CHARS is 0: give at least 1"):
        Settings.read({"ASSISTREAM_MAX_ANSWER_CHARS": 0})


def test_a_run_ends_with_its_time_in_the_midst_of_a_flood(
    make_app: MakeApp, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever looks by the second may have no turn.
    monkeypatch.setattr(Runner, "heed", lambda self: None)
    over = threading.Event()

    def what(peer: socket.socket, number: int) -> None:
        request_of(peer)
        peer.sendall(HEAD)
        while not over.is_set():
            peer.sendall(chunk(DELTA))

    with at(serve(what).url) as client:
        caller = Caller(make_app(client=client, run_seconds=0.5, max_answer_chars=10**9))
        caller.run("tutor")
        entry = caller.wait(20)[-1]
        over.set()
    assert (entry["run"]["status"], entry["run"]["last_error"]["code"]) == ("failed", "run_time_limit")
    assert text(entry).startswith("word word")


# Addresses that lead elsewhere


def leading_to(to: str, status: int) -> Callable[[socket.socket, int], None]:
    head = f"HTTP/1.1 {status} Go\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()

    def what(peer: socket.socket, number: int) -> None:
        peer.recv(65_536)
        peer.sendall(head)
        # A close with something unread would be a reset.
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(65_536):
            pass

    return what


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_our_own_client_takes_no_thread_to_where_an_answer_leads(
    serve: Serve, server: OfflineServer, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = f"{server.base_url}/responses"
    monkeypatch.setenv("OPENAI_BASE_URL", serve(leading_to(to, status)).url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with new_client() as client:
        with pytest.raises(RunError) as caught:
            answer(client, "responses")
        found = doctor._model_server("assistream", Registration([], None, client, None))
    assert caught.value.code == "upstream_redirected"
    assert to in caught.value.said
    assert "OPENAI_BASE_URL" in caught.value.said
    assert (found.level, to in found.text) == ("FAIL", True)
    assert server.requests == []


def test_a_client_of_the_apps_own_goes_where_it_likes(serve: Serve, server: OfflineServer) -> None:
    to = f"{server.base_url}/responses"
    server.replies = "fine"
    with at(serve(leading_to(to, 307)).url) as client:
        assert answer(client, "responses") == "fine"
    assert len(server.requests) == 1
