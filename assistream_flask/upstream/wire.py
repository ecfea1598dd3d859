"""Reads a stream: from its bytes where it is the SDK's, from its events where it is any iterator."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Final

import httpx2
import openai
from pydantic_core import from_json

from ..errors import RunError
from ..events import Json
from ..sse import Decoder
from .gate import Gate
from .lean import Connection
from .stencil import Stencil

DONE: Final = "[DONE]"
"""The kind of the in-band end mark that OpenAI's streams close with."""


def unpadded(client: openai.OpenAI) -> Json:
    """Gives the stream options that leave out OpenAI's padding; other servers may refuse them.

    It is there against an eavesdropper who reads lengths, and it doubles the bytes of a delta.
    """
    host = client.base_url.host
    return {"include_obfuscation": False} if f".{host}".endswith((".openai.com", ".openai.azure.com")) else {}


def read(stream: Any, gate: Gate | None = None, *, joined: bool = False) -> Iterator[list[tuple[str, Json]]]:
    """Gives lists of ``(kind, data)``, one list a network read; ``kind`` is the event's type or name. Where they may
    be ``joined``, one event may have the texts of all of a read.

    Gives an empty list at the ``gate``. Raises :class:`RunError` for an event that is not JSON, and whatever the
    transport raises.
    """
    response: Any = getattr(stream, "response", None)
    reads: Iterable[Any]
    split: Callable[[Any], Any]
    parse: Callable[[Any], tuple[str, Json]]
    some: Any
    decoder, stencil = Decoder(), Stencil() if joined else None
    if hasattr(response, "iter_bytes") and not response.is_stream_consumed:
        # Typed events cost twenty times what their bytes do, and an unknown one is built as the wrong class.
        reads, split, parse = _bytes(response, gate), decoder.split, _parsed
    else:
        reads, split, parse, stencil = _lists(iter(stream), gate), iter, _plain, None
    for some in reads:
        if not some:
            yield []
            continue
        if stencil is not None and decoder.between and (event := stencil.read(some)):
            yield [event]
            continue
        batch: list[tuple[str, Json]] = []
        try:
            items = split(some)
            for item in items:
                batch.append(parse(item))
            if stencil is not None and batch:
                stencil.learn(items[-1], batch[-1])
        except Exception:
            # What came before it in the same read was said.
            if batch:
                yield batch
            raise
        if batch:
            yield batch


def _bytes(response: Any, gate: Gate | None) -> Iterable[bytes]:
    connection = response.extensions.get("network_stream")
    headers = response.headers
    if (
        isinstance(connection, Connection)
        and headers.get("Transfer-Encoding", "").lower() == "chunked"
        and "Content-Encoding" not in headers
    ):
        timeout = response.request.extensions.get("timeout", {}).get("read")
        return chain(connection.chunks(timeout, gate), response.iter_bytes())
    return map(b"".join, _lists(response.iter_bytes(), gate))


def _lists(source: Iterator[Any], gate: Gate | None) -> Iterator[list[Any]]:
    return gate.through(source) if gate is not None else ([item] for item in source)


def _parsed(frame: tuple[bytes, bytes]) -> tuple[str, Json]:
    name, text = frame
    try:
        data = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        if text.startswith(DONE.encode()):
            return DONE, {}
        # Three times as slow, and it takes what is no UTF-8, and lone surrogates.
        try:
            data = json.loads(text.decode("utf-8", "replace"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RunError("upstream_malformed") from error
    kind = name.decode("utf-8", "replace")
    if isinstance(data, dict) and data.get("type") == kind != "":
        return kind, data
    return _kind(kind, data)


def _no_constant(name: str) -> None:
    # NaN and Infinity are no JSON, and no browser reads them.
    raise ValueError(name)


def _kind(name: str, data: Any) -> tuple[str, Json]:
    if not isinstance(data, dict):
        return name, {}
    kind = data.get("type")
    if name.startswith("thread.") or name in ("done", "error") or not isinstance(kind, str):
        kind = name
    if kind == "" and data.get("error"):
        kind = "error"
    return kind, data


def _plain(event: Any) -> tuple[str, Json]:
    """An event object of the SDK, or the mapping it was made from."""
    data = event if isinstance(event, dict) else event.to_dict(mode="json", warnings=False)
    if data.get("type") == "chunk" and isinstance(data.get("chunk"), dict):
        # What client.chat.completions.stream() gives beside its own events.
        data = data["chunk"]
    if "event" in data and "data" in data:
        return _kind(data["event"] or "", data["data"])
    return _kind("", data)


def timed_out(error: Exception) -> bool:
    """Tells whether the transport gave up waiting for a byte."""
    return isinstance(error, httpx2.TimeoutException | TimeoutError)


def not_connected(error: Exception) -> bool:
    """Tells whether a time-out came before there was a connection."""
    return isinstance(error.__cause__, httpx2.ConnectTimeout)


def close(stream: Any) -> None:
    """Closes the stream's connection, also while another thread reads from it."""
    response: Any = getattr(stream, "response", None)
    network = getattr(response, "extensions", {}).get("network_stream")
    # An HTTP/2 connection carries other streams too.
    if network is not None and not response.is_closed and response.http_version != "HTTP/2":
        raw = network.get_extra_info("socket")
        if raw is not None:
            try:
                # close() alone does not wake a thread that waits in recv().
                raw.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
    if hasattr(stream, "close"):
        try:
            stream.close()
        except ValueError:
            # A generator that runs in another thread cannot be closed from here; its reader closes it.
            pass
