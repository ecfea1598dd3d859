"""A viewer's connection, and sending to it past gunicorn's own loop over a body."""

from __future__ import annotations

import socket
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, Final, TypeVar

from gevent.socket import socket as GeventSocket

from .. import sse
from ..log.protocol import Receipt

T = TypeVar("T")

_PIECE: Final = 65_536
_BUFFER: Final = 262_144


def _answer(given: object) -> Any:
    """Gives the response that gunicorn iterates ``given`` for, in a call of ours, with no other hand in between and no
    rule of its own for the body; ``None`` where there is none."""
    frame = sys._getframe()
    while not frame.f_globals.get("__name__", "").startswith("gunicorn.workers."):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    answer: Any = frame.f_locals.get("resp")
    kind = type(answer)
    is_known = kind.__module__ == "gunicorn.http.wsgi" and kind.__name__ == "Response"
    if not is_known or given is None or frame.f_locals.get("respiter") is not given:
        return None
    return answer if answer.response_length is None and not answer._omits_body else None


class ViewerConnection:
    """The connection of an event stream's viewer, from the WSGI ``environ``; where the server shows none, nothing is
    done.

    A piece of at most 64 KiB must be taken within ``slow_seconds``, and what was sent be acknowledged within
    ``dead_seconds``, or the connection is cut; the system holds at most half a MiB for it.
    """

    def __init__(self, environ: Mapping[str, Any], slow_seconds: float, dead_seconds: float) -> None:
        self._socket: Any = environ.get("gunicorn.socket")
        self._slow_seconds, self._dead_seconds = slow_seconds, dead_seconds
        self._given: Callable[[], object] = lambda: None
        # Gunicorn's response, where it is known how its body is written.
        self._answer: Any = None
        self._rest = b""

    def give(self, iterable: object) -> None:
        """``iterable`` is what the app gives the server to iterate, with the body in it as it was made."""
        # What is dropped unread is to be gone at once: it has the body, which has this.
        with suppress(TypeError):
            self._given = weakref.ref(iterable)

    def _begin(self) -> None:
        if self._socket is None:
            return
        self._socket.settimeout(self._slow_seconds)
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                milliseconds = int(self._dead_seconds * 1000)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        if type(self._socket) is GeventSocket:
            self._answer = _answer(self._given())

    def send(self, data: bytes) -> Receipt:
        """Sends a piece of the body from outside of it, as gunicorn does but without waiting; while its own greenlet
        waits only. Where a part is left the body has to go on, if with ``b""``."""
        answer = self._answer
        if answer is None or not answer.headers_sent or self._rest or not 0 < len(data) <= _PIECE:
            return Receipt.NO
        framed = b"%X\r\n%b\r\n" % (len(data), data) if answer.chunked else data
        try:
            sent = self._socket._sock.send(framed)
        except OSError:
            # The body meets it too.
            return Receipt.NO
        # For gunicorn's access log.
        answer.sent += len(data)
        self._rest = framed[sent:]
        return Receipt.PART if self._rest else Receipt.WHOLE

    def pieces(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """Gives the bytes of ``frames``, until the viewer is gone."""
        self._begin()
        # The last is for what was left.
        for chunk in chain(frames, [b""]):
            if self._rest:
                rest, self._rest = self._rest, b""
                self._socket.sendall(rest)
            # Else it would show at the second write only.
            if chunk is sse.PING and self._gone():
                return
            if len(chunk) <= _PIECE:
                yield chunk
            else:
                for at in range(0, len(chunk), _PIECE):
                    yield chunk[at : at + _PIECE]

    def _gone(self) -> bool:
        # gevent's own recv() would wait; that of the socket inside does not.
        inside = getattr(self._socket, "_sock", None)
        if inside is None:
            return False
        try:
            return not inside.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def release(self) -> None:
        """The connection may serve other requests now. Idempotent."""
        ours, self._socket, self._answer = self._socket, None, None
        if ours is not None:
            with suppress(OSError):
                ours.settimeout(None)


class Body:
    """A body whose end is told once: when it is closed, has been read, or nobody has it any more, such as where the app
    answers with something else in the end."""

    def __init__(
        self, first: bytes, frames: Generator[bytes, None, None], peer: ViewerConnection, ended: Callable[[], None]
    ) -> None:
        self.peer = peer
        self._frames = _whole(first, frames, ended)
        # A generator that was never begun runs no ``finally``.
        next(self._frames)

    def __iter__(self) -> Iterator[bytes]:
        return self.peer.pieces(self._frames)

    def close(self) -> None:
        """Called by the server, whatever happened. Idempotent."""
        self._frames.close()
        self.peer.release()


def _whole(
    first: bytes, frames: Generator[bytes, None, None], ended: Callable[[], None]
) -> Generator[bytes, None, None]:
    try:
        yield b""
        if first:
            yield first
        yield from frames
    finally:
        ended()
        frames.close()


def given(iterable: T, body: object) -> T:
    """Gives ``iterable``, which the app gives the server for ``body``. A :class:`Body` learns of it."""
    if isinstance(body, Body):
        body.peer.give(iterable)
    return iterable
