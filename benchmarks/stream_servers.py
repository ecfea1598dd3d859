"""What `stream.py` measures with: a model server that costs little, and the relays that it compares ours with.

    python -m benchmarks.stream_servers upstream PORT
    python -m benchmarks.stream_servers raw PORT UPSTREAM_PORT MODEL

The model server answers each POST with the deltas that its ``model`` asks for, ``<deltas a second>:<deltas>``, in the
Responses API's events, one chunk and one write each; 0 a second is as fast as they are taken. The text of a delta is
the time at which it was written, in nanoseconds, and a space.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import select
import socket
import sys
import time
from typing import Any, Final

_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.I)
_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _frame(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **data}).encode())


# As OpenAI sends it, without the padding that nobody needs to ask for.
_DELTA: Final = _frame(
    "response.output_text.delta",
    {"sequence_number": 1111111, "item_id": "msg_" + "6" * 48, "output_index": 0, "content_index": 0}
    | {"delta": "1" * 19 + " ", "logprobs": []},
)
_BEFORE, _BETWEEN, _AFTER = re.split(rb"1111111111111111111|1111111", _chunk(_DELTA))
_CREATED: Final = _chunk(_frame("response.created", {"sequence_number": 0, "response": {"id": "resp_1"}}))
_USAGE: Final = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
_OVER: Final = {"id": "resp_1", "status": "completed", "output": [], "usage": _USAGE}
_COMPLETED: Final = _chunk(_frame("response.completed", {"sequence_number": 9, "response": _OVER})) + b"0\r\n\r\n"


class Peer:
    """One connection: what it asked, and how far its answer is."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.asked, self.rest = connection, b"", b""
        self.model = ""
        self.rate = self.left = self.sent = 0
        self.due = 0.0

    def asks(self) -> bool:
        """Take what there is to read; whether that completes a request."""
        data = self.socket.recv(262_144)
        if not data:
            raise ConnectionError
        self.asked += data
        head, found, body = self.asked.partition(b"\r\n\r\n")
        if not found:
            return False
        length = _LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return False
        self.asked = b""
        self.model = json.loads(body)["model"]
        return True

    def begin(self) -> None:
        """Begin the answer that was asked for."""
        self.rate, self.left = map(int, self.model.split(":"))
        self.sent = 0
        self.write(_HEAD + _CREATED)

    def write(self, data: bytes) -> None:
        if self.rest:
            self.rest += data
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        self.rest = data[sent:]

    def delta(self) -> None:
        self.sent += 1
        self.left -= 1
        self.write(b"%b%d%b%019d%b" % (_BEFORE, 1_000_000 + self.sent, _BETWEEN, time.time_ns(), _AFTER))
        if not self.left:
            self.write(_COMPLETED)


class Upstream:
    """The model server: its connections, those whose deltas come at a rate and those whose come as they are taken."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._server.setblocking(False)
        self._poll = select.epoll()
        self._poll.register(self._server, select.EPOLLIN)
        self._peers: dict[int, Peer] = {}
        self._timers: list[tuple[float, int, Peer]] = []
        self._fast: dict[int, Peer] = {}

    def turn(self) -> None:
        """Wait until there is something to do, and do it."""
        for fd, event in self._poll.poll(self._wait()):
            if fd == self._server.fileno():
                self._accept()
            else:
                self._attend(fd, event)
        self._send_due()
        self._send_fast()

    def _wait(self) -> float:
        wait = 0.0 if any(not peer.rest for peer in self._fast.values()) else 1.0
        if self._timers:
            wait = min(wait, max(0.0, self._timers[0][0] - time.monotonic()))
        return wait

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers[connection.fileno()] = Peer(connection)
        self._poll.register(connection, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _attend(self, fd: int, event: int) -> None:
        """Send what was held up, and takes a request."""
        peer = self._peers.get(fd)
        if peer is None:
            # A connection that was dropped, or given away, in the same turn.
            return
        try:
            if event & select.EPOLLOUT and peer.rest:
                rest, peer.rest = peer.rest, b""
                peer.write(rest)
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and peer.asks():
                self.answer(fd, peer)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(fd)

    def answer(self, fd: int, peer: Peer) -> None:
        """Begin to answer what the peer asked."""
        peer.begin()
        if peer.rate:
            peer.due = time.monotonic()
            heapq.heappush(self._timers, (peer.due, fd, peer))
        else:
            self._fast[fd] = peer

    def give(self, fd: int) -> socket.socket:
        """Give the peer's connection to whoever answers it otherwise."""
        self._poll.unregister(fd)
        return self._peers.pop(fd).socket

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, fd, peer = heapq.heappop(self._timers)
            if self._peers.get(fd) is not peer:
                continue
            try:
                peer.delta()
            except OSError:
                self._drop(fd)
                continue
            if peer.left:
                peer.due += 1 / peer.rate
                heapq.heappush(self._timers, (peer.due, fd, peer))

    def _send_fast(self) -> None:
        for fd, peer in list(self._fast.items()):
            try:
                for _ in range(8):
                    if peer.rest or not peer.left:
                        break
                    peer.delta()
            except OSError:
                self._drop(fd)
            if not peer.left:
                self._fast.pop(fd, None)

    def _drop(self, fd: int) -> None:
        self._fast.pop(fd, None)
        self._peers.pop(fd).socket.close()


def serve_upstream(port: int) -> None:
    """Serve until it is killed."""
    upstream = Upstream(port)
    while True:
        upstream.turn()


def serve_raw(port: int, upstream: int, model: str) -> None:
    """Send each request on and each answer back, unread: what gevent itself costs."""
    from gevent.server import StreamServer
    from gevent.socket import create_connection

    body = json.dumps({"model": model}).encode()

    def relay(peer: Any, _: Any) -> None:
        peer.recv(65_536)
        other = create_connection(("127.0.0.1", upstream))
        other.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        while data := other.recv(65_536):
            peer.sendall(data)
            if data.endswith(b"\r\n0\r\n\r\n"):
                break
        peer.close()

    StreamServer(("127.0.0.1", port), relay, backlog=4096).serve_forever()


def make_app() -> Any:
    """Give the app that gunicorn serves: ours below /assistream, and /naive as people write it."""
    import openai
    from flask import Flask, Response, request

    from assistream_flask import Assistant, create_blueprint

    app = Flask("stream")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    model = os.environ["MODEL"]
    client = openai.OpenAI()
    # A client of the app's own has the SDK's ordinary transport.
    ours = create_blueprint([Assistant("a", model=model)], owner=lambda: "me", client=_client())
    app.register_blueprint(ours, url_prefix="/assistream")

    @app.post("/naive")
    def naive() -> Response:
        stream = client.responses.create(model=model, input=request.json["content"], stream=True)
        return Response((f"data: {event.model_dump_json()}\n\n" for event in stream), mimetype="text/event-stream")

    return app


def _client() -> Any:
    import openai

    return openai.OpenAI() if os.environ["TRANSPORT"] == "default" else None


def main() -> None:
    """Serve what the command line names."""
    if sys.argv[1] == "upstream":
        serve_upstream(int(sys.argv[2]))
    else:
        serve_raw(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])


if __name__ == "__main__":
    main()
