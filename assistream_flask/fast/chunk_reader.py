"""Reads the chunks of an HTTP/1.1 answer below httpx2, which takes longer for them than all else that a delta needs.

Connections, TLS, proxies, time-outs, keep-alive and the heads of answers stay httpx2's, httpcore2's and h11's. A
network backend, which httpcore2 is made to take, sees the bytes first: it gives h11 the head, and what it can prove to
be whole, ordinary chunks (RFC 9112, section 7.1) it gives out itself. All else, the last chunk included, is left for
h11, which so keeps the connection's state and judges what is malformed.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, Final, Literal

import httpcore2
import httpx2
import openai

from ..platform import reliances
from .read_gate import READ_BYTES, ReadGate, readable, through
from .switches import SWITCHES

NAME: Final = "chunk_reader"

_HEAD_END: Final = re.compile(rb"\n\r?\n")
_CHUNK: Final = re.compile(rb"([0-9a-fA-F]{1,7})\r\n")
_CUT: Final = re.compile(rb"[0-9a-fA-F]{1,7}\r?")


def lean(client: httpx2.Client) -> httpx2.Client:
    """Have ``client``, one that has sent nothing yet, read event streams with a fraction of the work; give it back.

    For a client of the app's own: ``OpenAI(http_client=lean(DefaultHttpxClient()))``. Works with httpx2's own
    transports, those for proxies included; others stay as they are, and so do all where ``chunk_reader`` is off.
    """
    if not SWITCHES.is_on(NAME):
        return client
    if (lacks := _lacks(client)) is not None:
        reliances.miss(NAME, lacks, "streams are read as the SDK reads them, slower")
        return client
    for transport in _transports(client):
        pool: Any = getattr(transport, "_pool", None)
        backend = getattr(pool, "_network_backend", None)
        # HTTP/2 has no chunks.
        if (
            isinstance(backend, httpcore2.NetworkBackend)
            and not isinstance(backend, _Backend)
            and not getattr(pool, "_http2", False)
        ):
            pool._network_backend = _Backend(backend)
    return client


def new_client() -> openai.OpenAI:
    """Make the client of who names none: with the SDK's settings from the environment, lean, and without following
    redirects: a 307 would have it send the thread's history wherever the answer says."""
    # A server of one's own often wants no key, the SDK insists on one.
    own = os.environ.get("OPENAI_BASE_URL") and not os.environ.get("OPENAI_API_KEY")
    http_client = openai.DefaultHttpxClient(follow_redirects=False)
    return openai.OpenAI(api_key="none" if own else None, http_client=lean(http_client))


def missing() -> reliances.Missing | None:
    """Tell what of httpx2 and httpcore2 is not as :func:`lean` knows it.

    Both take a network backend, or a transport, when they are made. But httpx2 hands none on, and a transport of ours
    would have to do again what its own does: proxies of the environment, TLS, what its errors mean.
    """
    # Without certificates, which take long to load.
    with httpx2.Client(transport=httpx2.HTTPTransport(verify=False), trust_env=False) as client:
        return _lacks(client)


def _transports(client: httpx2.Client) -> Iterable[object]:
    return (client._transport, *client._mounts.values())


def _lacks(client: httpx2.Client) -> reliances.Missing | None:
    """Tell which name ``client``, or what it is made of, has no more. Transports of an app's own have none of them."""
    for name in ("_transport", "_mounts"):
        if not hasattr(client, name):
            return reliances.Missing("httpx2", f"Client.{name}")
    for transport in _transports(client):
        if not isinstance(transport, httpx2.HTTPTransport):
            continue
        if not hasattr(transport, "_pool"):
            return reliances.Missing("httpx2", "HTTPTransport._pool")
        for name in ("_network_backend", "_http2"):
            if not hasattr(transport._pool, name):
                return reliances.Missing("httpcore2", f"ConnectionPool.{name}")
    return None


def body(response: Any, gate: ReadGate | None) -> Iterable[bytes]:
    """Give the bytes of the SDK's ``response`` as they come, and ``b""`` before each read where there is a ``gate``.

    Raises what the transport does.
    """
    connection = response.extensions.get("network_stream")
    headers = response.headers
    if (
        isinstance(connection, Connection)
        and headers.get("Transfer-Encoding", "").lower() == "chunked"
        and "Content-Encoding" not in headers
        and SWITCHES.is_on(NAME)
    ):
        timeout = response.request.extensions.get("timeout", {}).get("read")
        return chain(connection.chunks(timeout, gate), response.iter_bytes())
    return map(b"".join, through(_parted(response.iter_bytes()), gate))


def _parted(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Give the same in pieces of a read: what is decompressed comes a megabyte at a time, all of whose events would be
    told before anything else has its turn."""
    for piece in pieces:
        for at in range(0, len(piece), READ_BYTES):
            yield piece if len(piece) <= READ_BYTES else piece[at : at + READ_BYTES]


def _whole(data: bytes) -> list[bytes]:
    """Give the data of each chunk where ``data`` is nothing but whole ones without CRLF in them, as of nearly every
    read; many at once cost less so."""
    lines = data.split(b"\r\n")
    sizes, found = lines[:-1:2], lines[1::2]
    if lines[-1] or b"" in found or b" ".join(sizes).lower() != b" ".join([b"%x" % len(one) for one in found]):
        return []
    return found


def _split(data: bytes, left: int) -> tuple[list[bytes], bytes, int, Literal["malformed", "h11"] | None]:
    """Give the data of chunks, cut ones too; the bytes behind it; and what of a chunk that is cut is still to come.

    ``left`` is that of the read before, the chunk's CRLF included. The last of the four says why reading ends here: a
    chunk is malformed, or what comes next is for h11, such as the last chunk or a head that is not an ordinary one.
    """
    found: list[bytes] = []
    at = 0
    while at < len(data):
        if left == 0:
            size = _CHUNK.match(data, at)
            if size is None:
                return found, data[at:], 0, None if _CUT.fullmatch(data, at) else "h11"
            left = int(size[1], 16)
            if left == 0:
                return found, data[at:], 0, "h11"
            at, left = size.end(), left + 2
        stop = at + left
        if stop <= len(data):
            found.append(data[at : stop - 2])
            if data[stop - 2 : stop] != b"\r\n":
                return found, b"", 0, "malformed"
            at, left = stop, 0
        elif left > 2:
            # All but what may be the line's end.
            part = data[at : at + left - 2]
            found.append(part)
            at, left = at + len(part), left - len(part)
        else:
            break
    return found, data[at:], left, None


class _Backend(httpcore2.NetworkBackend):
    def __init__(self, inner: httpcore2.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        return Connection(self._inner.connect_tcp(host, port, timeout, local_address, socket_options))

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.NetworkStream:
        return Connection(self._inner.connect_unix_socket(path, timeout, socket_options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class Connection(httpcore2.NetworkStream):
    """A connection that knows where the body of an answer begins."""

    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner
        self._rest = b""
        # Of the head so far, for an end that comes in two reads; None behind it.
        self._head: bytes | None = None
        self._at_body = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._at_body = False
        if self._rest:
            data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
            return data
        data = self._inner.read(max_bytes, timeout)
        if self._head is not None:
            end = _HEAD_END.search(self._head + data)
            if end is None:
                self._head = (self._head + data)[-2:]
            else:
                at = end.end() - len(self._head)
                data, self._rest = data[:at], data[at:]
                self._head, self._at_body = None, True
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._head, self._at_body = b"", False
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return Connection(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return bool(self._rest) or self._is_readable()
        return self._inner.get_extra_info(info)

    def _is_readable(self) -> bool:
        # The pool asks each idle connection at each request, under its lock. httpcore2 asks gevent, which lets the
        # whole worker go on meanwhile: behind a hundred of those all other requests waited.
        raw = self._inner.get_extra_info("socket")
        if not isinstance(raw, socket.socket) or raw.fileno() < 0:
            return bool(self._inner.get_extra_info("is_readable"))
        return bool(readable([raw.fileno()]))

    def chunks(self, timeout: float | None, gate: ReadGate | None = None) -> Iterator[bytes]:
        """Give the data of ordinary chunks, that of one read together; nothing where the body has been begun.

        It gives ``b""`` before each read where there is a ``gate``. What follows is for :meth:`read`. Raises what a
        socket does.
        """
        if not self._at_body:
            return
        data, left = self._rest, 0
        self._rest, self._at_body = b"", False
        read, gate = self._reader(timeout, gate)
        while True:
            whole = [] if left else _whole(data)
            found, data, left, end = (whole, b"", 0, None) if whole else _split(data, left)
            if some := b"".join(found):
                yield some
            if end is not None:
                if end == "malformed":
                    raise httpcore2.RemoteProtocolError("a chunk does not end in CRLF")
                break
            if gate is not None:
                yield b""
            more = read(READ_BYTES) if gate is None else gate.taken_or(read)
            if not more:
                break
            data += more
        # h11 says what this means, and reads on.
        self._rest = data
        if gate is not None:
            gate.socket = None
            yield b""

    def _reader(self, timeout: float | None, gate: ReadGate | None) -> tuple[Callable[[int], bytes], ReadGate | None]:
        """Give what reads the body's bytes, and the gate where it may wait at the socket itself."""
        raw = self.get_extra_info("socket")
        # TLS within a proxy's TLS is decrypted above the socket.
        if not hasattr(raw, "recv") or isinstance(self.get_extra_info("ssl_object"), ssl.SSLObject):
            return partial(self._inner.read, timeout=timeout), None
        raw.settimeout(timeout)
        if gate is not None:
            gate.socket = raw
        return raw.recv, gate
