"""The route of a thread's event stream, and how any stream is answered with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Response, current_app, g, has_app_context, request

from .. import sse
from ..errors import RequestError
from ..fast import direct_send
from ..log.protocol import EventId
from ..platform import threaded
from ..runs.open_streams import OpenStream
from ..runs.service import OwnedThread
from ..settings import Settings
from . import event_streams
from .answers import argument
from .auth import Call, asking_again
from .event_response import relay


def events(call: Call, thread: OwnedThread) -> Response:
    """``GET /threads/<id>/events``: all that happens in a thread from the asked-for place on."""
    asked = request.headers.get("Last-Event-ID") or argument("last_event_id")
    ask_again = asking_again(call)
    return streamed(
        call,
        lambda send, place: event_streams.view(call.runtime, thread.id, EventId.parse(asked), send, ask_again, place),
        begin=True,
    )


Start = Callable[[event_streams.Send, OpenStream], event_streams.Frames]


def streamed(call: Call, start: Start, begin: bool = False) -> Response:
    """Answer with a stream; one that is to ``begin`` before the headers can still be answered with an error."""
    runtime, settings = call.runtime, call.runtime.settings
    if request.method == "HEAD":
        return Response(headers=sse.HEADERS)
    if runtime.stopping.is_set():
        raise RequestError(503, "shutting_down", "The server restarts. Try again.", retry_after=1)
    server = threaded.server(request.environ)
    if server is not None:
        threaded.warn(server, server.most_streams(settings.worker_streams))
    place = OpenStream(call.owner, call.address)
    if not runtime.streams.enter(place, runtime.most_streams(server)):
        raise _full(server)
    try:
        # Closed when a heartbeat stays unacknowledged for nine tenths of the interval: before the second one after it.
        peer = direct_send.ViewerConnection(request.environ, settings.slow_seconds, 0.9 * settings.heartbeat_seconds)
        stream = start(peer.send, place)
        first = next(stream) if begin else b""
    except BaseException:
        runtime.streams.leave(place)
        raise
    g.assistream_body = direct_send.Body(first, stream, peer, lambda: runtime.streams.leave(place))
    return _Streamed(g.assistream_body, headers=sse.HEADERS)


def _full(server: threaded.ThreadedServer | None) -> RequestError:
    said = "The server has too many event streams open. Try again."
    if server is not None:
        said = (
            f"The server answers {server.requests} requests at once, and as many of them are event streams as may be. "
            f"Try again. If that is too few: {server.fix}."
        )
    return RequestError(503, "server_full", said, retry_after=5)


def let_go(error: BaseException | None) -> None:
    """Close the body of a request that failed after its view, say in the app's ``after_request``: no server has it."""
    body = g.pop("assistream_body", None)
    if error is not None and body is not None:
        body.close()


class _Streamed(Response):
    def __call__(self, environ: Any, start_response: Any) -> Any:
        try:
            return direct_send.given(super().__call__(environ, start_response), self.response)
        except BaseException:
            self.close()
            raise


def event_response(stream: Any, *, heartbeat_seconds: float = 15) -> Response:
    """Give a Flask response that streams any OpenAI iterator as events of the vocabulary.

    ``stream`` is what ``client.responses.create(..., stream=True)``, ``client.chat.completions.create(...,
    stream=True)`` or an Assistants run with ``stream=True`` gives, or an iterator of its events. Heartbeats go out
    while it is silent, it is closed when the client leaves, and the last frame is ``event: done``. It is cut where it
    is longer than ``ASSISTREAM_MAX_ANSWER_CHARS``.

    Raises ``TypeError`` for what is no such iterator, an async one included.
    """
    most = (Settings.read(current_app.config) if has_app_context() else Settings()).max_answer_chars
    return Response(relay(stream, heartbeat_seconds, most), headers=sse.HEADERS)
