"""Asks a server of the Model Context Protocol, with the client of the package ``mcp``, which is an extra.

Each list and each call has a session and a connection of its own, which end with it. So nothing that a server keeps of
one person is another's, any worker can do any call, and no session is there that could be over.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar

import httpx2
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp.types import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    CallToolRequest,
    CallToolRequestParams,
    JSONRPCError,
    JSONRPCResponse,
    ListToolsResult,
    PaginatedRequestParams,
)
from opentelemetry import context, trace
from pydantic import BaseModel, Field

from ..events import Json, dumps
from ..mcp import MOST_TOOLS
from ..platform import mcp_spans

MOST_BYTES: Final = 2_000_000
"""So many bytes a server may answer with in a session, whatever it is that it answers."""
MOST_PIECES: Final = 100_000
"""So many lists and objects may be in all that it answers, whose brackets in texts count too: while they are read each
takes some hundred bytes for the three that it came in."""
MOST_MESSAGES: Final = 1_000
"""So many messages it may send in a session, most of which nobody reads."""
_MOST_PAGES: Final = 20
_MOST_PAGES_WANTED: Final = 200
_MOST_SAID: Final = 2_000
# Of streams that a server broke off, and would have asked for again.
_MOST_GETS: Final = 20
_PROTOCOL: Final = re.compile(r"progressToken\Z|io\.modelcontextprotocol/")
_CONNECT_SECONDS: Final = 5.0
# So long a session may take to end, and so long again each time that it is cancelled.
_END_SECONDS: Final = 2.0
_MOST_CANCELS: Final = 5
# So much longer than the call itself its session may last, which whoever waits for it cancels before.
_MORE_SECONDS: Final = 5.0

T = TypeVar("T")


class Era(NamedTuple):
    """How a server is spoken to, which is found out with its list: ``mode`` is that of the package's client. What else
    the server said of itself is not kept, as it may be long."""

    mode: str


class Listed(NamedTuple):
    """The tools of a server."""

    tools: list[tuple[str, str, Json]]
    """Of each its name, what it is for, and the JSON schema of its arguments."""
    era: Era


class McpError(Exception):
    """What a server, or the way to it, failed with. ``said`` are words of the server's own on what it was asked, where
    it said any; the cause is for the log."""

    def __init__(self, why: Literal["unreachable", "timed out", "too large", "refused"], said: str = "") -> None:
        super().__init__(why)
        self.why, self.said = why, said


async def listed(url: str, headers: Mapping[str, str], seconds: float, wanted: Collection[str] | None = None) -> Listed:
    """Ask for the tools, or for those that are ``wanted``. Raises :class:`McpError`."""

    async def work(client: Client) -> Listed:
        found = await _pages(client, wanted)
        era = Era("legacy" if client.session.discover_result is None else client.protocol_version)
        return Listed([(one.name, one.description or "", one.input_schema) for one in found], era)

    return await _within(url, headers, Era("auto"), seconds, work)


async def called(
    url: str, headers: Mapping[str, str], era: Era, name: str, arguments: Json, seconds: float
) -> tuple[str, bool]:
    """Call a tool; give what it answers, and whether that is an error of its own. Raises :class:`McpError`; whether the
    tool was executed is not known then, unless the server ``refused`` the call."""
    request = CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))

    async def work(client: Client) -> tuple[str, bool]:
        # Not the client's own method: that checks what the tool gives by a schema of the server's, which may take for
        # ever, and asks for the whole list before.
        try:
            found = await client.session.send_request(request, _Answer)
        except MCPError as error:
            if error.code != HEADER_MISMATCH:
                raise
            # It wants arguments in headers, by annotations in its list, and did nothing.
            await _pages(client, [name])
            found = await client.session.send_request(request, _Answer)
        if found.kind == "input_required":
            raise McpError("refused", "The tool asks for more input, which it cannot be given here.")
        return _text(found), found.is_error

    return await _within(url, headers, era, seconds + _MORE_SECONDS, work)


async def _pages(client: Client, wanted: Collection[str] | None) -> Sequence[Any]:
    """Give tools page by page: all, or until those that are ``wanted`` are there, however far behind they stand."""
    found: dict[str, Any] = {}
    cursor: str | None = None
    for _ in range(_MOST_PAGES if wanted is None else _MOST_PAGES_WANTED):
        params = None if cursor is None else PaginatedRequestParams(cursor=cursor)
        page: ListToolsResult = await client.session.list_tools(params=params)
        for one in page.tools:
            if wanted is None or one.name in wanted:
                found.setdefault(one.name, one)
        cursor = page.next_cursor
        if cursor is None or len(found) > MOST_TOOLS or (wanted is not None and len(found) == len(wanted)):
            break
    return list(found.values())


# What a tool gives


class _Answer(BaseModel):
    """What is looked at of an answer. The package has held it to the protocol by then."""

    kind: str | None = Field(None, alias="resultType")
    content: list[Json] = []
    is_error: bool = Field(False, alias="isError")
    structured: Any = Field(None, alias="structuredContent")


def _text(answer: _Answer) -> str:
    """Give what a tool answered as a model is told it: texts, and a line for what is none."""
    if not answer.content and answer.structured is not None:
        return dumps(answer.structured)
    return "\n".join(map(_part, answer.content))


def _part(block: Json) -> str:
    kind = block.get("type")
    if kind == "text":
        return str(block.get("text", ""))
    inner = block.get("resource")
    if kind == "resource" and isinstance(inner, dict) and isinstance(inner.get("text"), str):
        return str(inner["text"])
    if kind == "resource_link":
        return f"[{block.get('name', '')}: {block.get('uri', '')}]"[:_MOST_SAID]
    about = block.get("mimeType") or (inner.get("mimeType") if isinstance(inner, dict) else None) or "of unknown type"
    return f"[{kind}, {about}: not shown]"[:_MOST_SAID]


# Sessions


# Sessions that are over for whoever asked, and whose end the server may still draw out. Of a task that nothing holds
# asyncio may lose sight.
_ENDING: Final[set[asyncio.Task[None]]] = set()


async def _within(
    url: str, headers: Mapping[str, str], era: Era, seconds: float, work: Callable[[Client], Awaitable[T]]
) -> T:
    """Give what ``work`` gives in a session of its own, as soon as it is there: how the session ends says nothing of
    it, and is bounded by itself. Raises :class:`McpError`."""
    limits = _Limits()
    given: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    session = asyncio.create_task(_perform(url, headers, era, limits, work, given))
    try:
        async with asyncio.timeout(seconds):
            return await given
    except Exception as error:
        raise _failure(error, limits) from error
    finally:
        if given.cancelled():
            session.cancel()
        ending = asyncio.create_task(_see_ended(session))
        _ENDING.add(ending)
        ending.add_done_callback(_ENDING.discard)


async def _perform(
    url: str,
    headers: Mapping[str, str],
    era: Era,
    limits: _Limits,
    work: Callable[[Client], Awaitable[T]],
    given: asyncio.Future[T],
) -> None:
    _QUIET.set(True)
    _go_untraced()
    failure: Exception = McpError("unreachable")
    try:
        async with _session(url, headers, era, limits) as client:
            found = await work(client)
            if not given.done():
                given.set_result(found)
    except Exception as error:
        failure = error
    finally:
        # What it answered counts, however the session ended.
        if not given.done():
            given.set_exception(failure)


async def _see_ended(session: asyncio.Task[None]) -> None:
    """Have a session end in bounded time. A time-out of its own is not enough: that fires once, and what ends the
    session then asks the server, which may answer a byte now and then for good."""
    for _ in range(_MOST_CANCELS):
        await asyncio.wait({session}, timeout=_END_SECONDS)
        if session.done():
            return
        session.cancel()


async def ended() -> None:
    """Wait until all sessions have ended, which is not for long."""
    while _ENDING:
        await asyncio.wait(set(_ENDING))


@asynccontextmanager
async def _session(url: str, headers: Mapping[str, str], era: Era, limits: _Limits) -> AsyncIterator[Client]:
    timeout = httpx2.Timeout(_CONNECT_SECONDS, read=None)
    sent = {**headers, "accept-encoding": "identity"}
    transport = _Limited(limits)
    async with httpx2.AsyncClient(headers=sent, timeout=timeout, transport=transport, trust_env=False) as http:
        client = Client(
            _streams(url, http, limits),
            mode=era.mode,
            cache=None,
        )
        async with client:
            yield client


@asynccontextmanager
async def _streams(url: str, http: httpx2.AsyncClient, limits: _Limits) -> AsyncIterator[tuple[Any, Any]]:
    async with streamable_http_client(url, http_client=http, max_sse_event_size=MOST_BYTES) as (answers, requests):
        yield _Answers(answers, limits), _Requests(requests)


class _Messages:
    """One way of a session's messages."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    async def aclose(self) -> None:
        await self._messages.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Answers(_Messages):
    """What a server answers. What it asks or tells by itself is dropped before the client sees it, who would have a
    task for each, and send an answer: a server can put 45,000 of them into what it may answer with."""

    def __init__(self, messages: Any, limits: _Limits) -> None:
        super().__init__(messages)
        self._limits = limits

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage:
        async for message in self._messages:
            self._limits.messages -= 1
            if self._limits.is_over:
                break
            if isinstance(message, SessionMessage) and isinstance(message.message, JSONRPCResponse | JSONRPCError):
                return message
        raise StopAsyncIteration


def _failure(error: Exception, limits: _Limits) -> McpError:
    """Give what became of a session, in words that say nothing of what was sent."""
    inner: BaseException = error
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    if limits.is_over:
        return McpError("too large")
    if isinstance(inner, McpError):
        return inner
    if isinstance(inner, TimeoutError):
        return McpError("timed out")
    if isinstance(inner, MCPError) and inner.code == INVALID_PARAMS:
        return McpError("refused", inner.message[:_MOST_SAID])
    return McpError("unreachable")


class _Limits:
    """How much a server may still answer."""

    def __init__(self) -> None:
        self.left, self.pieces = MOST_BYTES, MOST_PIECES
        self.gets, self.messages = _MOST_GETS, MOST_MESSAGES

    @property
    def is_over(self) -> bool:
        """Tell whether it answered more."""
        return min(self.left, self.pieces, self.messages) < 0


@cache
def _tls() -> Any:
    # It takes longer to make than a call.
    return httpx2.create_ssl_context()


def prepare() -> None:
    """Make what takes long to make."""
    _tls()


class _Limited(httpx2.AsyncBaseTransport):
    """Sends requests, and reads no more than a server may answer."""

    def __init__(self, limits: _Limits) -> None:
        self._limits = limits
        self._inner = httpx2.AsyncHTTPTransport(verify=_tls(), trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            # A stream for what the server has to say by itself, which nobody would read: only one that goes on with a
            # call's is let through.
            self._limits.gets -= 1
            if "last-event-id" not in request.headers or self._limits.gets < 0:
                return httpx2.Response(405, request=request)
        elif request.method == "DELETE":
            request.extensions["timeout"] = httpx2.Timeout(_END_SECONDS).as_dict()
        answer = await self._inner.handle_async_request(request)
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            # It was asked for none, and a few bytes can be many.
            await answer.aclose()
            raise httpx2.RemoteProtocolError("the answer is compressed, though it was asked for as it is")
        assert isinstance(answer.stream, httpx2.AsyncByteStream)
        return httpx2.Response(
            answer.status_code,
            headers=answer.headers,
            stream=_Counted(answer.stream, self._limits),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Counted(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, limits: _Limits) -> None:
        self._stream, self._limits = stream, limits

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._limits.left -= len(chunk)
            self._limits.pieces -= chunk.count(b"[") + chunk.count(b"{")
            if self._limits.is_over:
                raise httpx2.StreamError("the server answers too much")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


# Traces


def _go_untraced() -> None:
    """Have nothing of the present task's traced, and nothing of the app's trace or its baggage there: the package makes
    spans with what a server says, and would tell that server of both. The tool's own span is ours."""
    mcp_spans.heed_suppression()
    # Where it cannot: samplers heed a parent that is not sampled. The id is what no sampler by ratio takes.
    nobody = trace.SpanContext(trace_id=2**128 - 1, span_id=1, is_remote=False, trace_flags=trace.TraceFlags(0))
    parent = trace.set_span_in_context(trace.NonRecordingSpan(nobody), context.Context())
    context.attach(context.set_value(mcp_spans.SUPPRESSED, True, parent))


class _Requests(_Messages):
    """What is sent to a server. Of what stands beside the arguments it has only what is the protocol's."""

    async def send(self, message: SessionMessage) -> None:
        """Send one."""
        params = getattr(message.message, "params", None)
        if params is not None and "_meta" in params:
            params["_meta"] = {name: value for name, value in params["_meta"].items() if _PROTOCOL.match(name)}
            if not params["_meta"]:
                del params["_meta"]
        await self._messages.send(message)


# The log

_QUIET: Final[ContextVar[bool]] = ContextVar("assistream_mcp_quiet", default=False)
# They write what a server sent, as often as it sends it, ids of sessions, and addresses that may have a key.
_THEIRS: Final = (
    "client",
    "httpcore2.connection",
    "httpcore2.http11",
    "httpx2",
    "mcp.client.streamable_http",
    "mcp.shared.jsonrpc_dispatcher",
)


def keep_quiet() -> None:
    """Have the package's own log say nothing of sessions that are made here: of those that fail, ours does. Idempotent;
    the app's own are left alone."""
    for name in _THEIRS:
        log = logging.getLogger(name)
        if _is_others not in log.filters:
            log.addFilter(_is_others)


def _is_others(record: logging.LogRecord) -> bool:
    return not _QUIET.get()
