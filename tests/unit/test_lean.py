"""The lean reading of chunks: whatever a server sends, in whatever pieces, it is what httpx2 alone makes of it.

The oracle is httpx2's own transport over the same bytes. Both read from httpcore2's mock of a network, which gives the
pieces as they are here; a real network, TLS and proxies are at the end.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpcore2
import httpx2
import openai
import pytest

from assistream_flask import lean
from assistream_flask.fast import chunk_reader
from assistream_flask.fast.read_gate import ReadGate
from assistream_flask.upstream import errors, event_reader
from tests.socket_server import SocketServer

CERTIFICATE = Path(__file__).parents[1] / "localhost.pem"
TRIALS = int(os.environ.get("ASSISTREAM_TRIALS", "80")) * 4
# Made once: it takes longer than a trial.
TLS = ssl.create_default_context()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Got(NamedTuple):
    """The bytes of a body, what ended it (an error's class, by what it means), and whether the connection is used
    again."""

    body: bytes
    error: str | None
    kept: bool


class Network(httpcore2.MockBackend):
    """Gives one connection its pieces; the next one an answer of its own."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__(list(pieces))
        self.connections = 0

    def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        self.connections += 1
        if self.connections > 1:
            return httpcore2.MockStream([HEAD + END])
        return super().connect_tcp(*args, **kwargs)


def fetched(pieces: Sequence[bytes], *, quick: bool) -> Got:
    """Give what a client makes of an answer in these pieces."""
    network = Network(pieces)
    client = httpx2.Client(verify=TLS)
    client._transport._pool._network_backend = network  # type: ignore[attr-defined]
    if quick:
        lean(client)
    body, error = bytearray(), None
    with client:
        try:
            with client.stream("POST", "http://server/") as response:
                for data in chunk_reader.body(response, None) if quick else response.iter_bytes():
                    assert data
                    body += data
        except (httpx2.TransportError, httpcore2.ProtocolError, httpcore2.NetworkError) as caught:
            error = type(caught).__name__
        before = network.connections
        try:
            client.post("http://server/")
        except httpx2.TransportError as caught:
            error = f"{error}, then {type(caught).__name__}"
        return Got(bytes(body), error, network.connections == before)


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    """Give the bytes in pieces, of one byte often; at the end the server closes."""
    size = chance.choice([1, 2, 7, 60, 400, 10_000])
    pieces = []
    while data:
        at = chance.randint(1, size)
        pieces.append(data[:at])
        data = data[at:]
    return pieces


def chunk(data: bytes, chance: random.Random) -> bytes:
    size = b"%x" % len(data)
    if chance.random() < 0.2:
        size = size.upper() if chance.random() < 0.5 else b"000" + size
    if chance.random() < 0.02:
        size += chance.choice([b";a=b", b' ; a="\r"', b" ", b"\t"])
    return size + b"\r\n" + data + b"\r\n"


def payload(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.6:
        return b'data: {"delta":"%d"}\n\n' % chance.randrange(10**6)
    if kind < 0.8:
        return bytes(chance.choices(b"0a\r\n;", k=chance.randint(1, 12)))
    return chance.randbytes(chance.choice([1, 9, 15, 16, 17, 255, 256, 4095, 5000]))


def answer(chance: random.Random) -> bytes:
    data = HEAD + b"".join(chunk(payload(chance), chance) for _ in range(chance.randint(0, 12)))
    kind = chance.random()
    if kind < 0.1:
        data += b"0\r\nTrailer: yes\r\n\r\n"
    elif kind < 0.9:
        data += END
    if chance.random() < 0.1:
        data = b"HTTP/1.1 103 Early Hints\r\n\r\n" + data
    if chance.random() < 0.25:
        # Damaged, in the body.
        at = chance.randrange(len(HEAD), len(data) + 1)
        data = data[:at] + chance.choice([b"", b"x", b"\r", b"\n", b"0", b"-1", b"0x1", b"ffffffffff"]) + data[at + 1 :]
    if chance.random() < 0.1:
        data = data[: chance.randint(1, len(data))]
    return data


def test_any_answer_in_any_pieces_is_what_httpx2_makes_of_it() -> None:
    for trial in range(TRIALS):
        chance = random.Random(f"lean/{trial}")
        data = answer(chance)
        pieces = cut(data, chance)
        assert fetched(pieces, quick=True) == fetched(pieces, quick=False), (trial, pieces)


@pytest.mark.parametrize(
    "body",
    [
        END,
        b"3\r\nabc\r\n" + END,
        b"3\r\nabc\r\n03\r\nabc\r\n" + END,
        b"0a\r\n0123456789\r\n" + END,
        b"3\r\nab",
        b"3\r\nabc",
        b"3\r\nabc\r",
        b"3\r\nabcd\r\n" + END,
        b"3\r\nabc\n" + END,
        b"3\nabc\r\n" + END,
        b"3;x=y\r\nabc\r\n3\r\nabc\r\n" + END,
        b"g\r\nabc\r\n" + END,
        b"0x3\r\nabc\r\n" + END,
        b"+3\r\nabc\r\n" + END,
        b"1_0\r\n0123456789abcdef\r\n" + END,
        b"\r\n3\r\nabc\r\n" + END,
        b"3\r\nabc\r\n0\r\nTrailer: yes\r\n\r\n",
        b"3\r\nabc\r\n0\r\n",
        b"3\r\nabc\r\n" + END + b"HTTP/1.1 200 OK\r\n\r\n",
        b"00000000000000000000003\r\nabc\r\n" + END,
    ],
)
def test_a_body_that_is_cut_anywhere_is_what_httpx2_makes_of_it(body: bytes) -> None:
    data = HEAD + body
    for at in range(len(HEAD) - 5, len(data)):
        for pieces in ([data[:at], data[at:]], [data[:at], *(data[i : i + 1] for i in range(at, len(data)))]):
            assert fetched(pieces, quick=True) == fetched(pieces, quick=False), pieces


# Over a real network


class Wire:
    """A server that answers each request with the deltas ``one``, ``two``, ``three``, 20 ms apart or each when ``go``
    is released, then ``stops`` or goes silent. The second has a chunk ``extension``."""

    def __init__(
        self, *, tls: bool, stops: bool = True, extension: bytes = b"", go: threading.Semaphore | None = None
    ) -> None:
        self._extension, self._go = extension, go
        self.context = ssl.create_default_context(cafile=CERTIFICATE)
        self._stops, self._server = stops, SocketServer(self._answer)
        self.port = self._server.port
        self.url = f"{'https' if tls else 'http'}://localhost:{self.port}/v1"
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if self._tls:
            self._tls.load_cert_chain(CERTIFICATE)

    @property
    def accepted(self) -> int:
        return self._server.connections

    def _answer(self, peer: socket.socket, _: int) -> None:
        with self._tls.wrap_socket(peer, server_side=True) if self._tls else peer as connection:
            asked = b""
            while more := connection.recv(65_536):
                asked += more
                if not asked.endswith(b"}"):
                    continue
                asked = b""
                connection.sendall(HEAD)
                for word in ("one", "two", "three"):
                    if self._go is None:
                        time.sleep(0.02)
                    else:
                        self._go.acquire()
                    event = b'data: {"type": "response.output_text.delta", "delta": "%b"}\n\n' % word.encode()
                    extension = self._extension if word == "two" else b""
                    connection.sendall(b"%x%b\r\n%b\r\n" % (len(event), extension, event))
                if self._stops:
                    connection.sendall(END)

    def close(self) -> None:
        self._server.close()


class Tunnel:
    """A proxy for CONNECT, reached over TLS or not."""

    def __init__(self, *, tls: bool = False) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self._server = context.wrap_socket(self._server, server_side=True)
        self.port: int = self._server.getsockname()[1]
        self.asked: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._server.accept()
                line = peer.recv(65_536).split(b"\r\n")[0]
                self.asked.append(line)
                host, _, port = line.split()[1].decode().partition(":")
                other = socket.create_connection((host, int(port)))
                self._open += [peer, other]
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for pair in ((peer, other), (other, peer)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # Ends the accept() that waits, too.
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in self._open:
            one.close()


def asked(client: httpx2.Client, server: Wire) -> openai.Stream[Any]:
    sdk = openai.OpenAI(base_url=server.url, api_key="k", http_client=client, max_retries=0)
    return sdk.responses.create(model="m", input="Hi", stream=True, timeout=0.5)


def deltas(client: httpx2.Client, server: Wire) -> tuple[list[str], int]:
    """Give the deltas that a stream gives, and how often it stood at the gate; every second time it is read there."""
    stream = asked(client, server)
    gate, stops, found = ReadGate(), 0, list[str]()
    for batch in event_reader.read(stream, gate):
        found += [data["delta"] for _, data in batch]
        if not batch:
            stops += 1
            end = time.monotonic() + 0.3
            if gate.socket is None:
                continue
            while stops % 2 and not gate.read() and time.monotonic() < end:
                time.sleep(0.001)
    return found, stops


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("proxied", [False, True])
def test_tls_and_proxies_are_read_so_too_and_connections_are_kept(
    tls: bool, proxied: bool, closing: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, tunnel = Wire(tls=tls), Tunnel()
    closing.callback(server.close)
    closing.callback(tunnel.close)
    if proxied and tls:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{tunnel.port}")
    elif proxied:
        # A forwarding proxy is asked as if it were the server.
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")
    client = closing.enter_context(lean(openai.DefaultHttpxClient(verify=server.context)))
    for _ in range(2):
        found, reads = deltas(client, server)
        assert found == ["one", "two", "three"]
        assert reads > 0
    assert server.accepted == 1
    assert [line.split()[0] for line in tunnel.asked] == ([b"CONNECT"] if proxied and tls else [])


def test_tls_within_the_tls_of_a_proxy_is_read_too(closing: contextlib.ExitStack) -> None:
    server, tunnel = Wire(tls=True), Tunnel(tls=True)
    closing.callback(server.close)
    closing.callback(tunnel.close)
    proxy = httpx2.Proxy(f"https://localhost:{tunnel.port}", ssl_context=server.context)
    client = closing.enter_context(lean(openai.DefaultHttpxClient(verify=server.context, proxy=proxy)))
    for _ in range(2):
        assert deltas(client, server) == (["one", "two", "three"], 0)
    assert server.accepted == len(tunnel.asked) == 1


@pytest.mark.parametrize("tls", [False, True])
def test_a_silent_server_is_given_up_after_the_time_out(tls: bool, closing: contextlib.ExitStack) -> None:
    server = Wire(tls=tls, stops=False)
    closing.callback(server.close)
    client = closing.enter_context(lean(openai.DefaultHttpxClient(verify=server.context)))
    with pytest.raises(TimeoutError) as caught:
        deltas(client, server)
    assert errors.timed_out(caught.value)


@pytest.mark.parametrize("tls", [False, True])
def test_one_look_at_the_gate_brings_all_that_has_arrived(tls: bool, closing: contextlib.ExitStack) -> None:
    # A server may send a TLS record a token.
    go = threading.Semaphore(0)
    server = Wire(tls=tls, stops=False, go=go)
    closing.callback(server.close)
    client = closing.enter_context(lean(openai.DefaultHttpxClient(verify=server.context)))
    gate, told = ReadGate(), list[str]()
    with asked(client, server) as stream:
        batches = event_reader.read(stream, gate)
        assert next(batches) == []
        go.release(3)
        time.sleep(0.5)
        assert gate.read()
        while batch := next(batches):
            told += [data["delta"] for _, data in batch]
    assert told == ["one", "two", "three"]


@pytest.mark.parametrize("tls", [False, True])
def test_before_h11_reads_on_the_gate_says_so(tls: bool, closing: contextlib.ExitStack) -> None:
    go = threading.Semaphore(0)
    server = Wire(tls=tls, stops=False, extension=b";a=b", go=go)
    closing.callback(server.close)
    client = closing.enter_context(lean(openai.DefaultHttpxClient(verify=server.context)))
    gate, told = ReadGate(), list[str]()

    def read() -> None:
        with asked(client, server) as stream:
            for batch in event_reader.read(stream, gate):
                if not batch:
                    go.release()
                told.extend([data["delta"] for _, data in batch] or ["go on" if gate.socket is None else "wait"])

    with pytest.raises(httpx2.ReadTimeout):
        read()
    assert told == ["wait", "one", "wait", "go on", "two", "three"]


def test_a_certificate_that_nobody_signed_is_refused(closing: contextlib.ExitStack) -> None:
    server = Wire(tls=True)
    closing.callback(server.close)
    client = closing.enter_context(lean(openai.DefaultHttpxClient()))
    with pytest.raises(openai.APIConnectionError):
        deltas(client, server)


def test_a_client_with_a_transport_of_its_own_stays_as_it_is() -> None:
    own = httpx2.Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(200)))
    assert lean(own) is own
    assert own.get("http://server/").status_code == 200


_IDLE = """
from gevent import monkey; monkey.patch_all()
import socket, threading, time
from httpcore2._backends.sync import SyncStream
from assistream_flask.fast.chunk_reader import Connection

ours, theirs = socket.socketpair()
idle, turns = Connection(SyncStream(ours)), 0

def others():
    global turns
    while True:
        time.sleep(0)
        turns += 1

threading.Thread(target=others, daemon=True).start()
time.sleep(0.01)
before, found = turns, [idle.get_extra_info("is_readable") for _ in range(100)]
assert not any(found) and turns == before, turns - before
theirs.close()
assert idle.get_extra_info("is_readable")
idle.close()
assert idle.get_extra_info("is_readable")
"""


def test_a_look_at_an_idle_connection_gives_no_turn_to_others() -> None:
    done = subprocess.run([sys.executable, "-c", _IDLE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
