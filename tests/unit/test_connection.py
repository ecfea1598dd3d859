"""A request's connection: what comes on it has a time in all, also under a server of threads."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from werkzeug.serving import BaseWSGIServer, make_server

from assistream_flask.platform import connection
from assistream_flask.runs.open_bodies import OpenBodies
from tests.conftest import MakeApp


def alone(cut: Callable[[], None]) -> Callable[[], None]:
    """Give way to nobody."""
    return lambda: None


@pytest.fixture
def server(make_app: MakeApp) -> Iterator[BaseWSGIServer]:
    server = make_server("127.0.0.1", 0, make_app(owner=lambda: "me", body_seconds=0.5), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_werkzeugs_server_too_refuses_a_body_that_does_not_come_in_time(server: BaseWSGIServer) -> None:
    request = b"POST /assistream/threads HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
        peer.sendall(request + b"Content-Length: 100\r\n\r\n{")
        with http.client.HTTPResponse(peer) as answer:
            answer.begin()
            assert answer.status == 408
            assert json.loads(answer.read())["error"]["code"] == "body_too_slow"


def test_what_was_read_in_time_is_not_cut_later() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with connection.read_within({"gunicorn.socket": ours}, 0.2, alone):
            theirs.send(b"in time")
            assert ours.recv(20) == b"in time"
        ours.settimeout(0.5)
        with pytest.raises(TimeoutError):
            ours.recv(20)


def test_what_reading_raises_goes_on_where_nothing_was_cut() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(LookupError), connection.read_within({"gunicorn.socket": ours}, 20, alone):
        raise LookupError


def test_what_reading_raises_as_it_was_cut_is_told_as_the_time_being_over() -> None:
    ours, theirs = socket.socketpair()

    def read() -> None:
        with connection.read_within({"gunicorn.socket": ours}, 0.1, alone):
            assert ours.recv(20) == b""
            raise OSError("the body broke off")

    with ours, theirs, pytest.raises(TimeoutError):
        read()


def test_of_an_addresss_bodies_the_oldest_gives_way_and_no_others() -> None:
    bodies, cut = OpenBodies(2), list[str]()

    def begin(address: str | None, name: str) -> Callable[[], None]:
        return bodies.begin(address, lambda: cut.append(name))

    begin("a", "1")
    done = begin("a", "2")
    for name in "34":
        begin("b", name)
        begin(None, name)
    assert cut == []
    begin("a", "5")
    assert cut == ["1"]
    done()
    begin("a", "6")
    assert cut == ["1"]
    begin("a", "7")
    assert cut == ["1", "5"]


def test_nobody_gives_way_where_any_number_is_allowed() -> None:
    bodies = OpenBodies(0)
    for _ in range(1000):
        bodies.begin("a", lambda: pytest.fail("it was cut"))


@pytest.mark.parametrize("length", [0, 1, connection.PIECE, connection.PIECE + 1, 3 * connection.PIECE])
def test_an_answer_goes_in_pieces_and_leaves_the_connection_as_it_was(length: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(7)
        chunk = bytes(range(256)) * (length // 256 + 1)
        body = connection.TimedBody({"gunicorn.socket": ours}, [chunk[:length], b"end"], 0.3)
        assert ours.gettimeout() == 0.3
        pieces = list(body)
        assert b"".join(pieces) == chunk[:length] + b"end"
        assert max(map(len, pieces)) <= connection.PIECE
        body.close()
        body.close()
        assert ours.gettimeout() == 7
