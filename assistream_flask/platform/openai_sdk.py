"""What is known of the OpenAI SDK beyond what it promises: where requests are seen and sent, and what calls take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

import httpx2
import openai

from ..errors import RunError
from . import reliances

LONGEST_BODY: Final = 16 << 20
"""So many bytes an answer may have that is no stream: as many as one event of a stream."""
_LONGEST_ERROR: Final = 1 << 20
# What a body's bytes no longer are, once they were read.
_OF_BODY: Final = ("content-encoding", "content-length", "transfer-encoding")


def _own(client: openai.OpenAI, name: str, who: str, instead: str) -> Any:
    """Give a method that is the SDK's own; ``None`` where it has none of that name, which the log says once."""
    found = getattr(client, name, None)
    # What an app's tests have in a client's place has none either.
    if found is None and isinstance(client, openai.OpenAI):
        reliances.miss(who, reliances.Missing("openai", f"OpenAI.{name}"), instead)
    return found


def on_request(client: openai.OpenAI, call: Callable[[httpx2.Request], None]) -> None:
    """Have ``call`` called with each request of ``client``, a copy that nobody else uses, before it is sent.

    The SDK has a method for that, which is its own to call and an app's class to override. The hooks of the HTTP client
    below are no other way: that one is shared by all copies, and which of them a request is of shows nowhere.
    """
    prepare = _own(
        client, "_prepare_request", "stale_connection", "a request that meets a closed connection fails its run"
    )
    if prepare is None:
        return

    def prepared(request: httpx2.Request) -> None:
        prepare(request)
        call(request)

    client._prepare_request = prepared  # type: ignore[method-assign]


def let_go(client: openai.OpenAI) -> None:
    """Have ``client``, a copy that asks no more, be freed with the last who uses it.

    Its resources know it, and so does what :func:`on_request` and :func:`bound` put in place: the garbage collector
    alone would find that, which comes round once in millions of objects.
    """
    for name, value in list(getattr(client, "__dict__", {}).items()):
        is_resource = isinstance(getattr(type(client), name, None), cached_property)
        if is_resource or getattr(value, "__module__", None) == __name__:
            delattr(client, name)


def drop_events(stream: Any) -> None:
    """Have an SDK's ``stream``, whose bytes are read and never its events, be freed with the last who uses it, and
    with it the request, which has a whole history.

    The generator of its events, which nobody begins, knows the stream, and the stream it. Without that private name
    they are garbage, as before.
    """
    events = getattr(stream, "_iterator", None)
    if inspect.isgenerator(events):
        events.close()


def keywords(call: Callable[..., Any]) -> frozenset[str] | None:
    """Name what a method of the SDK takes; ``None`` where that is anything, or cannot be told."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return None
    if any(one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in parameters.values()):
        return None
    return frozenset(parameters) - {"self"}


def bound(client: openai.OpenAI) -> None:
    """Have ``client``, a copy that nobody else uses, read no more than so many bytes of an answer that is no stream,
    an error's included: the SDK reads those whole, however long they are, and whatever they are decompressed to.

    An error's body is cut there. Where another's is longer the request raises :class:`RunError`. The SDK has no bound,
    and hooks of the HTTP client below, or another in its place, would be for the app's other requests too.
    """
    send = _own(client, "_send_request", "bounded_bodies", "the body of an error is read whole, however long it is")
    if send is None:
        return

    def sent(request: httpx2.Request, *, stream: bool, **more: Any) -> httpx2.Response:
        response: httpx2.Response = send(request, stream=True, **more)
        return response if stream and response.is_success else _whole(response)

    client._send_request = sent  # type: ignore[method-assign]


def _whole(response: httpx2.Response) -> httpx2.Response:
    """Give ``response`` with its body read."""
    body, most = bytearray(), LONGEST_BODY if response.is_success else _LONGEST_ERROR
    try:
        # The HTTP client decompresses in pieces.
        for piece in response.iter_bytes():
            body += piece
            if len(body) > most:
                break
    except Exception:
        # Of an error the status is known, whatever becomes of its body.
        if response.is_success:
            raise
    finally:
        response.close()
    if len(body) > most and response.is_success:
        raise RunError("answer_too_long", said=f"a body of more than {most} bytes")
    headers = [pair for pair in response.headers.multi_items() if pair[0].lower() not in _OF_BODY]
    # The class too: the SDK also takes clients of httpx, which is another library.
    return type(response)(
        response.status_code,
        headers=headers,
        content=bytes(body[:most]),
        request=response.request,
        extensions=response.extensions,
        history=response.history,
    )
