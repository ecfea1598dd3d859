"""A viewer's connection, and sending to it past gunicorn's own loop over a body."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, Final

from gevent import monkey
from gevent.socket import socket as GeventSocket

from .. import sse
from ..log.protocol import Receipt
from ..platform import connection, gunicorn, reliances
from ..platform.connection import PIECE
from .switches import SWITCHES

NAME: Final = "direct_send"


class OutermostApp:
    """What gunicorn's worker calls as its app, and all middlewares are in.

    Where it is given our own body unwrapped, no middleware changes that. So it may be sent past gunicorn's loop: as
    gunicorn's own response object, whose method ``start_response`` is, would frame it.
    """

    def __init__(self, worker: Any) -> None:
        self._worker, self._inner = worker, worker.wsgi

    def __call__(self, environ: Any, start_response: Any) -> Any:
        # A middleware may change it, and what answers HEAD has no body.
        is_head = environ.get("REQUEST_METHOD") == "HEAD"
        given = self._inner(environ, start_response)
        # Who put an app of its own around this one is in between.
        if type(given) is UnwrappedBody and not is_head and self._worker.wsgi is self:
            answer = getattr(start_response, "__self__", None)
            if answer is None:
                missing = reliances.Missing("gunicorn", "method of its Response for start_response")
                reliances.miss(NAME, missing, "events go out by gunicorn's own loop, slower")
            given.peer.allow_direct_sending(answer)
        return given

    def __getattr__(self, name: str) -> Any:
        # Hooks of the operator's, such as worker_exit, look for the app here.
        return getattr(self._inner, name)


def attach() -> None:
    """Have gunicorn's worker call its app by an :class:`OutermostApp`. Does nothing elsewhere, such as under threads,
    where writing to a connection may wait. Idempotent."""
    worker = gunicorn.worker()
    if worker is not None and gunicorn.patched() and not is_attached():
        worker.wsgi = OutermostApp(worker)


def is_attached() -> bool:
    """Tell whether gunicorn's worker calls an :class:`OutermostApp`."""
    return isinstance(getattr(gunicorn.worker(), "wsgi", None), OutermostApp)


def missing() -> reliances.Missing | None:
    """Tell what of gunicorn is not as :class:`OutermostApp` and :class:`ViewerConnection` know it."""
    worker = gunicorn.worker()
    if worker is not None and not hasattr(worker, "wsgi"):
        return reliances.Missing("gunicorn", "Worker.wsgi")
    try:
        # It takes what a response is made of, and does nothing with it yet.
        answer = gunicorn.http_1_response()(None, None, None)
    except (AttributeError, ImportError, TypeError):
        return reliances.Missing("gunicorn", "http.wsgi.Response(req, sock, cfg)")
    for name in ("status", "headers_sent", "chunked", "response_length", "sent"):
        if not hasattr(answer, name):
            return reliances.Missing("gunicorn", f"http.wsgi.Response.{name}")
    return None


def _is_plain(answer: Any) -> bool:
    """Tell whether it frames a body as HTTP/1 does, chunked or to the connection's end, with no rule of its own."""
    if answer is None or type(answer) is not gunicorn.http_1_response():
        return False
    return answer.response_length is None and str(answer.status).startswith("200")


class ViewerConnection:
    """The connection of an event stream's viewer, from the WSGI ``environ``; where the server shows none, nothing is
    done.

    A piece of at most 64 KiB must be taken within ``slow_seconds``, and what was sent be acknowledged within
    ``dead_seconds``, or the connection is cut; the system holds at most half a MiB for it.
    """

    def __init__(self, environ: Mapping[str, Any], slow_seconds: float, dead_seconds: float) -> None:
        self._socket: Any = environ.get("gunicorn.socket")
        self._slow_seconds, self._dead_seconds = slow_seconds, dead_seconds
        # Gunicorn's response, which writes the body: what the outermost app saw of it, and where it is used.
        self._seen: Any = None
        self._answer: Any = None
        self._rest = b""

    def allow_direct_sending(self, answer: object) -> None:
        """Take note that gunicorn iterates the body itself, and writes it by ``answer``."""
        self._seen = answer

    def _begin(self) -> None:
        if self._socket is None:
            return
        self._socket.settimeout(self._slow_seconds)
        if connection.keep_little(self._socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self._dead_seconds * 1000)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        # Over TLS what is written is not what is sent.
        if type(self._socket) is GeventSocket and SWITCHES.is_on(NAME) and _is_plain(self._seen):
            self._answer = self._seen

    def send(self, data: bytes) -> Receipt:
        """Send a piece of the body from outside of it, as gunicorn does but without waiting; while its own greenlet
        waits only. Where a part is left the body has to go on, if with ``b""``."""
        answer = self._answer
        if answer is None or not answer.headers_sent or self._rest or not 0 < len(data) <= PIECE:
            return Receipt.NO
        framed = b"%X\r\n%b\r\n" % (len(data), data) if answer.chunked else data
        try:
            # gevent's own send() would wait. The number is asked for each time: one of a connection that was closed is
            # soon another's.
            sent = os.write(self._socket.fileno(), framed)
        except OSError:
            # The body meets it too.
            return Receipt.NO
        # For gunicorn's access log.
        answer.sent += len(data)
        self._rest = framed[sent:]
        return Receipt.PART if self._rest else Receipt.WHOLE

    def pieces(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """Give the bytes of ``frames``, until the viewer is gone."""
        self._begin()
        # The last is for what was left.
        for chunk in chain(frames, [b""]):
            if self._rest:
                rest, self._rest = self._rest, b""
                self._socket.sendall(rest)
            # Else it would show at the second write only.
            if chunk is sse.PING and self._gone():
                return
            yield from connection.pieces(chunk)

    def _gone(self) -> bool:
        # gevent's own recv() would wait, and a plain socket of the same number does not. Under threads that would have
        # the connection itself wait no more.
        if not isinstance(self._socket, GeventSocket):
            return False
        try:
            inside = monkey.get_original("socket", "socket")(fileno=self._socket.fileno())
        except (OSError, ValueError):
            return True
        try:
            # The app may have given new sockets a time-out.
            inside.settimeout(0)
            return not inside.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            inside.detach()

    def release(self) -> None:
        """Leave the connection to other requests. Idempotent."""
        ours, self._socket, self._answer, self._seen = self._socket, None, None, None
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
        """End the body, and leave the connection to other requests. The server calls it in any case. Idempotent."""
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


class UnwrappedBody:
    """What the app gives the server to iterate for a :class:`Body`, which is in it as it was made."""

    def __init__(self, iterable: Iterable[bytes], peer: ViewerConnection) -> None:
        self._iterable, self.peer = iterable, peer

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._iterable)

    def close(self) -> None:
        """End the body. The server calls it in any case."""
        close = getattr(self._iterable, "close", None)
        if close is not None:
            close()


def given(iterable: Any, body: object) -> Any:
    """Give what the app is to give the server for ``iterable``, which has the ``body`` in it: an
    :class:`UnwrappedBody` where that is a :class:`Body`, else the same."""
    return UnwrappedBody(iterable, body.peer) if isinstance(body, Body) else iterable
