"""Requests that do not end, and answers that nobody takes: none of them keeps what another needs."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.gunicorn_server import APP, Gunicorn, running

POST = b"POST /assistream/threads HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH, CHUNKED = b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
TIMED = (
    APP
    + """
from flask import request

@app.post("/timeout")
def timeout():
    request.get_data()
    return jsonify(request.environ["gunicorn.socket"].gettimeout())
"""
)


def connected(live: Gunicorn, data: bytes, *, buffer: int | None = None) -> socket.socket:
    """Give a connection on which ``data`` was sent."""
    peer = socket.socket()
    if buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    peer.connect(("127.0.0.1", live.port))
    peer.sendall(data)
    return peer


def trickled(peer: socket.socket, drop: bytes) -> bytes:
    """Give all that comes until the server closes, sending ``drop`` again and again meanwhile."""
    found, end = b"", time.monotonic() + 40
    peer.settimeout(0.1)
    while time.monotonic() < end:
        try:
            data = peer.recv(65536)
            if not data:
                return found
            found += data
        except TimeoutError:
            if not found:
                peer.sendall(drop)
        except ConnectionError:
            return found
    raise AssertionError(f"the connection is still open: {found!r}")


def error_of(answer: bytes) -> tuple[int, str]:
    """Give the status and the code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize("options", [["--worker-class", "gevent"], ["--worker-class", "gthread", "--threads", "4"]])
def test_a_body_that_does_not_come_in_time_is_refused_and_its_connection_closed(
    tmp_path: Path, options: list[str]
) -> None:
    # The server would wait for another request for longer than the test does.
    with running(tmp_path, body_seconds=1, options=[*options, "--keep-alive", "60"]) as live:
        for begun, drop in ((LENGTH, b""), (LENGTH, b" "), (CHUNKED, b""), (CHUNKED, b"1\r\n \r\n")):
            with connected(live, POST + begun) as peer:
                assert error_of(trickled(peer, drop)) == (408, "body_too_slow"), (begun, drop)


def test_bodies_that_never_come_give_the_workers_connections_back(tmp_path: Path) -> None:
    with running(tmp_path, body_seconds=1, options=["--worker-connections", "5"]) as live:
        peers = [connected(live, POST + LENGTH) for _ in range(12)]
        try:
            assert live.get("/assistream/assistants")["data"]
        finally:
            for peer in peers:
                peer.close()


def test_who_sends_many_halves_of_bodies_keeps_none_from_sending_a_whole_one(tmp_path: Path) -> None:
    with running(tmp_path, body_seconds=60, address_bodies=3, options=["--worker-connections", "10"]) as live:
        peers = [connected(live, POST + LENGTH) for _ in range(30)]
        try:
            assert live.request("POST", "/assistream/threads", {})["object"] == "thread"
            assert error_of(trickled(peers[0], b"")) == (408, "body_too_slow")
        finally:
            for peer in peers:
                peer.close()


def test_who_sends_in_time_keeps_the_connection_however_long_after(tmp_path: Path) -> None:
    with running(tmp_path, body_seconds=0.5, app=TIMED, options=["--keep-alive", "20"]) as live:
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
        try:
            for _ in range(2):
                connection.request("POST", "/assistream/threads", "{}", {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 201
                answer.read()
                port = connection.sock.getsockname()[1]
                # The app's own routes have the time that they had.
                connection.putrequest("POST", "/timeout")
                connection.putheader("Content-Length", "2")
                connection.endheaders(b"{")
                time.sleep(1)
                connection.send(b"}")
                answer = connection.getresponse()
                assert json.loads(answer.read()) is None
                assert connection.sock.getsockname()[1] == port
        finally:
            connection.close()


def test_chunks_that_break_http_are_400(tmp_path: Path) -> None:
    with running(tmp_path) as live:
        for body in (b"zz\r\n", b"2\r\n{}zz\r\n", b"2;\x01\r\n{}\r\n0\r\n\r\n"):
            with connected(live, POST + b"Transfer-Encoding: chunked\r\n\r\n" + body) as peer:
                assert error_of(trickled(peer, b"")) == (400, "invalid_json"), body


def test_gunicorn_itself_ends_a_connection_whose_headers_do_not_come_within_its_keep_alive(tmp_path: Path) -> None:
    # What docs/guides/deploy.md says of it.
    with running(tmp_path, options=["--keep-alive", "1"]) as live:
        for begun, drop in ((b"", b""), (b"GET /assistream/assistants HTTP/1.1\r\nHost", b"x")):
            with connected(live, begun) as peer:
                assert trickled(peer, drop) == b""


# Answers


@pytest.fixture(scope="module")
def long_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gunicorn, str]]:
    # It waits for longer than a slow reader takes for what the system has of its page.
    options = ["--keep-alive", "30"]
    with running(tmp_path_factory.mktemp("long"), slow_seconds=2, app=TIMED, options=options) as live:
        thread = live.thread()
        for number in range(30):
            live.request("POST", f"{thread}/messages", {"content": f"{number} " + "x" * 99_000})
        yield live, thread


def get(path: str) -> bytes:
    return f"GET {path}/messages?limit=200 HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def test_a_reader_that_takes_nothing_of_a_page_is_cut(long_thread: tuple[Gunicorn, str]) -> None:
    live, thread = long_thread

    def left() -> Any:
        return live.get("/left")["files"]

    before = left()
    peers = [connected(live, get(thread), buffer=4096) for _ in range(10)]
    try:
        wait_until(lambda: left() >= before + 10)
        wait_until(lambda: left() <= before)
    finally:
        for peer in peers:
            peer.close()


def test_a_reader_that_asks_again_and_again_and_takes_nothing_is_cut(long_thread: tuple[Gunicorn, str]) -> None:
    live, _ = long_thread
    before = live.get("/left")["files"]
    with socket.create_connection(("127.0.0.1", live.port)) as peer:
        peer.settimeout(0.5)
        request = b"GET /assistream/assistants HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
        # Until neither side takes any more.
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                peer.sendall(request)
        wait_until(lambda: live.get("/left")["files"] <= before)


def test_a_reader_that_takes_a_page_slowly_gets_all_of_it(long_thread: tuple[Gunicorn, str]) -> None:
    live, thread = long_thread
    with connected(live, get(thread), buffer=4096) as slow, http.client.HTTPResponse(slow) as answer:
        answer.begin()
        body, start = b"", time.monotonic()
        while len(body) < int(answer.headers["Content-Length"]):
            body += answer.read1(8192)
            time.sleep(0.02)
        assert time.monotonic() - start > 2, "it was not slow"
        assert answer.headers["Connection"] == "keep-alive"
        page = json.loads(body)
        assert 15 < len(page["data"]) < 30
        assert page["has_more"]
        slow.sendall(b"POST /timeout HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        assert trickled(slow, b"").endswith(b"null\n")


def test_who_goes_back_through_long_messages_gets_each_once(long_thread: tuple[Gunicorn, str]) -> None:
    live, thread = long_thread
    query, numbers = "", list[str]()
    while True:
        page = live.get(f"{thread}/messages?limit=200{query}")
        texts = [entry["message"]["content"][0]["text"]["value"] for entry in page["data"]]
        numbers = [text.split()[0] for text in texts] + numbers
        if not page["has_more"]:
            break
        query = f"&before={page['data'][0]['message']['id']}"
    assert numbers == [str(number) for number in range(30)]
