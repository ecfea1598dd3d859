"""Events are sent from where they come, past the server's own loop: what arrives is as if it had sent them."""

from __future__ import annotations

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.gunicorn_server import Gunicorn, running

APP = """
import collections, json, os, time
from flask import Flask, jsonify, request
from assistream_flask import Assistant, create_blueprint
from assistream_flask.fast import direct_send
from assistream_flask.testing import OfflineServer

app = Flask(__name__)
app.config.update(json.loads(os.environ["APP_CONFIG"]))
servers, taken, seen = [], collections.Counter(), []
send = direct_send.ViewerConnection.send

def counted(peer, data):
    found = send(peer, data)
    taken[found.name] += 1
    return found

direct_send.ViewerConnection.send = counted

def client():
    servers.append(OfflineServer(" ".join(f"word{n}" for n in range(3000)), delay=0).start())
    return servers[0].client()

assistants = [Assistant(id, model="m") for id in ("one", "two", "three")]
app.register_blueprint(create_blueprint(assistants, client=client, owner=lambda: "me"), url_prefix="/assistream")

@app.after_request
def watched(response):
    if "watch" in request.args:
        body = response.response
        response.response = (seen.append(len(piece)) or piece for piece in body)
        response.call_on_close(body.close)
    return response

class Louder:
    # Changes what goes through, as one that compresses does.
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, environ, start_response):
        body = self.inner(environ, start_response)
        how = environ["QUERY_STRING"]
        if how == "generator":
            return (piece.upper() for piece in body)
        return map(bytes.upper, body) if how == "map" else body

app.wsgi_app = Louder(app.wsgi_app)

@app.get("/counts")
def counts():
    open_streams = app.extensions["assistream"].runtime().open_streams
    return jsonify(taken=taken, seen=sum(seen), open=open_streams)

@app.get("/page")
def page():
    return "up"
"""
WORDS = " ".join(f"word{n}" for n in range(3000))


def connect(live: Gunicorn, buffer: int | None = None) -> socket.socket:
    viewer = socket.socket()
    if buffer is not None:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    viewer.settimeout(40)
    viewer.connect(("127.0.0.1", live.port))
    return viewer


def ask(live: Gunicorn, path: str, *, version: str = "1.1", buffer: int | None = None) -> socket.socket:
    """Give a connection on which three answers were asked for as a stream."""
    viewer = connect(live, buffer)
    body = json.dumps({"assistant_ids": ["one", "two", "three"], "content": "Hello"}).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nAccept: text/event-stream\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    viewer.sendall(head.encode() + body)
    return viewer


def read(viewer: socket.socket) -> bytes:
    """Read to the end; give the body, each of whose chunks must be whole."""
    data = b""
    with viewer:
        while piece := viewer.recv(65_536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    found, at = b"", 0
    while True:
        size = re.compile(rb"([0-9A-F]+)\r\n").match(body, at)
        assert size is not None, body[at : at + 50]
        start, length = size.end(), int(size[1], 16)
        found += body[start : start + length]
        at = start + length + 2
        assert body[at - 2 : at] == b"\r\n"
        if length == 0:
            assert at == len(body)
            return found


def texts(body: bytes) -> list[str]:
    """Give what the messages' pieces add up to; the events' ids must be in order, and ``done`` the last."""
    found, last = dict[str, str](), 0
    assert body.endswith(b"event: done\ndata: [DONE]\n\n")
    for frame in body.split(b"\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if line)
        if "id" in fields:
            offset = int(fields["id"].rpartition("-")[2])
            assert offset > last
            last = offset
        if fields.get("event") == "thread.message.delta":
            data = json.loads(fields["data"])
            found[data["id"]] = found.get(data["id"], "") + data["delta"]["content"][0]["text"]["value"]
    return list(found.values())


def taken(live: Gunicorn) -> Counter[str]:
    return Counter(live.get("/counts")["taken"])


def straight(live: Gunicorn) -> int:
    """Give how often something was sent straight."""
    found = taken(live)
    return found["WHOLE"] + found["PART"]


@pytest.fixture(scope="module", params=["gevent", "gthread"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    options = ["--access-logfile", "-", "--access-logformat", "sent %(B)s", "--threads", "20"]
    with running(tmp_path_factory.mktemp("served"), app=APP, worker_class=request.param, options=options) as live:
        yield live


only_gevent = pytest.mark.parametrize("served", ["gevent"], indirect=True)


@pytest.mark.fast
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_what_is_sent_straight_is_framed_and_counted_as_gunicorn_does(
    served: Gunicorn, version: str, request: pytest.FixtureRequest
) -> None:
    before, logged = straight(served), len(served.log())
    body = read(ask(served, served.thread() + "/runs", version=version))
    assert texts(body) == [WORDS] * 3
    wait_until(lambda: f"sent {len(body)}\n" in served.log()[logged:])
    assert (straight(served) > before) == (request.node.callspec.params["served"] == "gevent")


@pytest.mark.fast
@only_gevent
def test_a_viewer_whose_buffers_are_full_gets_the_rest_of_what_was_sent_in_part(served: Gunicorn) -> None:
    before = taken(served)
    viewer = ask(served, served.thread() + "/runs", buffer=4096)
    wait_until(lambda: taken(served)["PART"] > before["PART"])
    time.sleep(0.2)
    body = read(viewer)
    assert texts(body) == [WORDS] * 3


@only_gevent
@pytest.mark.parametrize("how", ["generator", "map"])
def test_a_middleware_that_changes_a_stream_sees_all_of_it(served: Gunicorn, how: str) -> None:
    before = straight(served)
    body = read(ask(served, f"{served.thread()}/runs?{how}"))
    assert b"WORD2999" in body
    assert body == body.upper()
    assert straight(served) == before


@only_gevent
def test_an_app_that_puts_a_body_of_its_own_around_a_stream_sees_all_of_it(served: Gunicorn) -> None:
    before = straight(served)
    body = read(ask(served, served.thread() + "/runs?watch"))
    assert texts(body) == [WORDS] * 3
    assert served.get("/counts")["seen"] == len(body)
    assert straight(served) == before


@pytest.mark.fast
def test_a_stream_that_is_cut_off_in_the_midst_of_a_chunk_ends_it_first(tmp_path: Path) -> None:
    app = APP.replace("    taken[found.name] += 1\n", "    taken[found.name] += 1\n    stop_after(found)\n")
    app = app.replace(
        "direct_send.ViewerConnection.send = counted\n",
        """
def stop_after(found):
    if found.name == "PART":
        app.extensions["assistream"].runtime()._begin_stop()

direct_send.ViewerConnection.send = counted
""",
    )
    with running(tmp_path, app=app) as live:
        thread, viewer = live.thread(), connect(live, 4096)
        viewer.sendall(f"GET {thread}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: live.get("/counts")["open"] == 1)
        while not taken(live)["PART"]:
            live.request("POST", f"{thread}/messages", {"content": "x" * 50_000})
        # read() says that each chunk is whole.
        assert read(viewer).endswith(b"\n\n")
