"""The connection that a request came by: what comes and goes on it does so within a time, or it is cut.

Gunicorn's workers and Werkzeug's server show it to the app; where a server does not, nothing here does anything.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import gevent
from gevent import monkey

from . import gunicorn

PIECE: Final = 65_536
"""Bytes of an answer that have a time of their own to be taken: a socket's is for all of a ``sendall``."""
_BUFFER: Final = 262_144


def of(environ: Mapping[str, Any]) -> Any:
    """Give the connection's socket, ``None`` where the server does not show it."""
    return environ.get("gunicorn.socket") or environ.get("werkzeug.socket")


@contextmanager
def read_within(
    environ: Mapping[str, Any], seconds: float, begin: Callable[[Callable[[], None]], Callable[[], None]]
) -> Iterator[None]:
    """Have what is read of the request meanwhile end after so many ``seconds`` in all, however it trickles: nothing
    more is read of the connection then, and the server closes it. Raises ``TimeoutError`` where that was done.

    ``begin`` is given what does so at any time, without waiting, and gives what is called when it was read."""
    connection, is_cut = of(environ), False
    if connection is None:
        yield
        return

    def cut() -> None:
        nonlocal is_cut
        is_cut = True
        _end_reading(connection)

    done = begin(cut)
    cancel = _later(seconds, cut)
    try:
        yield
    except Exception:
        # Who reads may say in its own way that it ended early.
        if not is_cut:
            raise
    finally:
        cancel()
        done()
    if is_cut:
        raise TimeoutError


def _later(seconds: float, call: Callable[[], None]) -> Callable[[], object]:
    """Have ``call``, which waits for nothing, called after so many seconds; give what cancels that."""
    if gunicorn.patched():
        # A greenlet a request would cost much more.
        timer = gevent.get_hub().loop.timer(seconds)
        timer.start(call)
        return timer.close
    thread = threading.Timer(seconds, call)
    thread.daemon = True
    thread.start()
    return thread.cancel


def _end_reading(connection: Any) -> None:
    # Whoever waits for bytes is told that there are no more, under threads too, and can answer still. Not by the
    # connection's own method: of one with TLS that ends the encryption of what is sent as well.
    with suppress(OSError):
        plain = monkey.get_original("socket", "socket")(fileno=os.dup(connection.fileno()))
        with plain:
            plain.shutdown(socket.SHUT_RD)


def pieces(chunk: bytes) -> Iterator[bytes]:
    """Give the same bytes, in pieces of at most :data:`PIECE`."""
    if len(chunk) <= PIECE:
        yield chunk
    else:
        for at in range(0, len(chunk), PIECE):
            yield chunk[at : at + PIECE]


def keep_little(connection: Any) -> bool:
    """Have the system hold at most half a MiB of what is sent. By itself it holds more and more, and has room again
    only when a third of that was taken, which a slow reader does not do in seconds. Give ``False``, and do nothing,
    where the connection is not TCP's."""
    is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
    if is_tcp:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return is_tcp


class TimedBody:
    """A body of an answer, of whose pieces each is taken by the reader within ``seconds``, or the connection is cut."""

    def __init__(self, environ: Mapping[str, Any], body: Iterable[bytes], seconds: float) -> None:
        self._body, self._connection = body, of(environ)
        if self._connection is not None:
            self._before = self._connection.gettimeout()
            self._connection.settimeout(seconds)

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:
            if len(chunk) > PIECE and self._connection is not None:
                # Where it is closed already, sending says so.
                with suppress(OSError):
                    keep_little(self._connection)
            yield from pieces(chunk)

    def close(self) -> None:
        """Leave the connection to other requests. The server calls it in any case. Idempotent."""
        ours, self._connection = self._connection, None
        if ours is not None:
            with suppress(OSError):
                ours.settimeout(self._before)
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
