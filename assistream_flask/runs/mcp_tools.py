"""The tools of the app's MCP servers, as those of an assistant: lists that are kept for a while, and calls.

A list is one of a server as it is asked with certain headers: what a person's token may see, another's may not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..assistants import Assistant
from ..events import Json, clean, dumps
from ..mcp import BETWEEN, MOST_TOOLS, McpServer
from ..platform.async_loop import AsyncLoop, beside
from ..platform.log_throttle import LogThrottle
from ..platform.threads import spawn
from ..tools import Tool, ToolContext, ToolFailedError
from ..upstream import tool_schema
from ..upstream.protocol import ToolSpec
from ..upstream.tool_schema import UnfitError
from .tool_execution import BUSY, Within

if TYPE_CHECKING:
    from ..upstream.mcp_session import Era, Listed

_log = logging.getLogger(__name__)

UNKNOWN: Final = "The server of this tool could not be reached, or failed. Whether the tool did anything is not known."
TOO_LARGE: Final = "The tool's answer is too much to be read. Ask it for less."
REFUSED: Final = "The server of this tool refused the call: "
MOST_SCHEMA: Final = 20_000
MOST_DESCRIPTION: Final = 4_000
MOST_LIST: Final = 200_000
"""So many characters of a list are kept, with the names."""
_MOST_NAME: Final = 64
_LIST_SECONDS: Final = 5.0
_HEADERS_SECONDS: Final = 5.0
# While so many calls of headers= go on that nobody waits for, none is begun: each has a thread.
_MOST_LATE: Final = 8
# For so long a server that could not be asked is not asked again: each run would wait for it.
_AGAIN_SECONDS: Final = 15.0
# For so long a list is waited for that is not there. It always comes in time; if not, one may be asked for again.
_WAITED_SECONDS: Final = 15.0
# Lists of a worker: a token that is made anew for each run makes a list each.
_MOST_LISTS: Final = 200
_MOST_KEPT: Final = 4_000_000


class McpTool(Tool):
    """A tool of a server's. Its arguments are that server's to check, and its function takes them in one."""

    def keywords(self, arguments: Json, context: ToolContext) -> dict[str, Any]:
        """Give what the function is to be called with. Raises :class:`.ToolArgumentsError`."""
        return {"arguments": self._validated(arguments), "context": context}


class _Theirs(NamedTuple):
    """A tool as its server has it, and as a model is told of it. ``schema`` is text: as objects it takes up to twenty
    times as much, and lists are kept."""

    name: str
    ours: str
    description: str
    schema: str

    @property
    def size(self) -> int:
        """Give how many characters it has."""
        return len(self.name) + len(self.ours) + len(self.description) + len(self.schema)

    def spec(self) -> ToolSpec:
        """Give what a model is told. Not strict: that the server's schema happens to be within what OpenAI takes so
        promises nothing of the next one."""
        return ToolSpec(self.ours, self.description, json.loads(self.schema), strict=False)


class Told(NamedTuple):
    """What models are told of a server's tools: which are ``left_out`` and why, and which it has not, though
    ``allowed`` names them."""

    tools: list[_Theirs]
    left_out: dict[str, str]
    missing: list[str]


def told(server: McpServer, tools: Sequence[tuple[str, str, Any]]) -> Told:
    """Give it of a list of names, descriptions and schemas."""
    found: dict[str, _Theirs] = {}
    left_out: dict[str, str] = {}
    left = MOST_LIST
    for name, description, schema in tools:
        if server.allowed is not None and name not in server.allowed:
            continue
        try:
            one = _theirs(server, name, description, schema, left if len(found) < MOST_TOOLS else 0)
            if one.ours in found:
                raise UnfitError(f"{found[one.ours].name!r} has the same name for models")
        except UnfitError as error:
            left_out[name] = str(error)
            continue
        found[one.ours] = one
        left -= one.size
    missing = (server.allowed or frozenset()) - {one.name for one in found.values()} - left_out.keys()
    return Told(list(found.values()), left_out, sorted(missing))


def _theirs(server: McpServer, name: str, description: str, schema: Any, left: int) -> _Theirs:
    """Give a tool, of ``left`` characters at most. Raises :class:`.UnfitError`."""
    ours = server.name + BETWEEN + re.sub("[^A-Za-z0-9_-]", "_", name)
    if len(ours) > _MOST_NAME:
        raise UnfitError(f"its name is longer than {_MOST_NAME} letters with the server's")
    try:
        length = len(dumps(schema))
        if length > MOST_SCHEMA:
            raise UnfitError(f"its schema is longer than {MOST_SCHEMA:,} characters")
        # First, as the rest costs more.
        if length + len(ours) + len(name) + MOST_DESCRIPTION > left:
            raise UnfitError("those before it are as much as a model is told of")
        tool_schema.check(schema)
        rest, more = tool_schema.without_combining(schema)
        text = dumps({"properties": {}, **rest})
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise UnfitError("its schema is no JSON") from None
    if len(more) > MOST_DESCRIPTION // 2:
        raise UnfitError("what its schema combines at the top is too long to be told in words")
    more = more and f"\n\n{more}"
    said = clean(description)[: MOST_DESCRIPTION - len(more)]
    return _Theirs(name, ours, (said + more).strip(), text)


class _List:
    """What one server has, or that it could not be asked. It is asked for once, for all who wait."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.until = time.monotonic() + _WAITED_SECONDS
        self.tools: Sequence[_Theirs] = ()
        self.size = 0
        self.era: Era | None = None
        """How it is spoken to; ``None`` where it could not be asked."""

    @property
    def is_fresh(self) -> bool:
        """Tell whether it is still to be taken, or waited for."""
        return time.monotonic() < self.until

    def settle(self, tools: Sequence[_Theirs], era: Era | None, seconds: float) -> None:
        """Have it be there, for so many seconds."""
        self.tools, self.era, self.until = tools, era, time.monotonic() + seconds
        self.size = sum(one.size for one in tools)
        self.over.set()


def prepare() -> None:
    """Import what asks servers, while a worker is made: it takes half a second in which nothing else goes on, which the
    streams of others would stand still for in the first run."""
    with suppress(Exception):
        # What is wrong with it is said where it is needed.
        from ..upstream import mcp_session

        mcp_session.prepare()


class _Headers:
    """One call of what gives a server's headers. It is the app's, and may never end: then nothing can end it, and it is
    among those that are ``late`` for as long as it takes."""

    def __init__(self, server: McpServer, context: ToolContext, late: set[_Headers]) -> None:
        self._server, self._context, self._late = server, context, late
        self._given: Future[dict[str, str]] = Future()
        self._is_done = False
        self.name = f"assistream-headers_{server.name}"

    def run(self) -> dict[str, str]:
        """Call it."""
        try:
            return self._server.headers(self._context)
        finally:
            self._is_done = True
            self._late.discard(self)

    def begin(self, within: Within) -> None:
        """Call it in a thread or greenlet of its own, where it may take long."""
        if self._server.asks_the_app:
            spawn(self.name, copy_context().run, self._settle, within)
        else:
            self._settle(within)

    def _settle(self, within: Within) -> None:
        try:
            with within():
                self._given.set_result(self.run())
        except BaseException as error:
            self._given.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def refuse(self, error: Exception) -> None:
        """Have it fail, and not be called."""
        self._is_done = True
        self._given.set_exception(error)

    def wait(self, seconds: float) -> dict[str, str]:
        """Give what it gives. Raises that of the app, and :class:`TimeoutError`."""
        try:
            return self._given.result(max(0.0, seconds))
        finally:
            self.leave()

    def leave(self) -> None:
        """Wait for it no longer. Idempotent."""
        # It looks the other way round: it is never among them for good, whichever is first.
        if not self._is_done:
            self._late.add(self)
        if self._is_done:
            self._late.discard(self)


class McpTools:
    """Asks the MCP servers of one worker's assistants."""

    def __init__(self, loop: AsyncLoop, throttle: LogThrottle) -> None:
        self._loop, self._throttle = loop, throttle
        # They come and go by one step each, so no lock is needed.
        self._late: set[_Headers] = set()
        # Changed by one step each, so no lock is needed; two that ask at once would ask twice.
        self._lists: dict[tuple[str, str, frozenset[str] | None, bytes], _List] = {}

    def ask(self, assistant: Assistant, context: ToolContext, within: Within) -> Equipment:
        """Begin to ask for what the assistant's servers have; those whose list is known are not asked."""
        asked = [(server, self._begin(server, context, within)) for server in assistant.mcp]
        until = time.monotonic() + _HEADERS_SECONDS
        found: list[tuple[McpServer, _List | None]] = []
        for server, headers in asked:
            try:
                sent = headers.wait(until - time.monotonic())
            except Exception as error:
                self._throttle.error(
                    _log, error, "headers= of the MCP server %s failed: a run goes without", server.name
                )
                found.append((server, None))
                continue
            found.append((server, self._list(server, sent)))
        return Equipment(self, assistant, found)

    def _begin(self, server: McpServer, context: ToolContext, within: Within) -> _Headers:
        made = _Headers(server, context, self._late)
        if self._is_busy(server):
            made.refuse(TimeoutError(f"{len(self._late)} calls of headers= do not end"))
        else:
            made.begin(within)
        return made

    def _is_busy(self, server: McpServer) -> bool:
        return server.asks_the_app and len(self._late) >= _MOST_LATE

    def _list(self, server: McpServer, headers: Mapping[str, str]) -> _List:
        digest = hashlib.sha256(dumps(sorted(headers.items())).encode()).digest()
        key = server.url, server.name, server.allowed, digest
        known = self._lists.get(key)
        if known is not None and known.is_fresh:
            return known
        # Behind all others, also where it was there before: the oldest are first.
        self._lists.pop(key, None)
        made = self._lists[key] = _List()
        self._forget()
        self._loop.submit(self._listed(server, headers), partial(_settle, made, server))
        return made

    def _forget(self) -> None:
        """Drop the lists that are over, and the oldest of more than a worker keeps."""
        lists = list(self._lists.items())
        left, number = _MOST_KEPT, _MOST_LISTS
        # The oldest are first.
        for key, one in reversed(lists):
            left, number = left - one.size, number - 1
            if not one.is_fresh or left < 0 or number < 0:
                self._lists.pop(key, None)

    async def _listed(self, server: McpServer, headers: Mapping[str, str]) -> tuple[list[_Theirs], Era] | None:
        try:
            # Its package is an extra, and may be another one than was looked for.
            from ..upstream import mcp_session

            mcp_session.keep_quiet()
            seconds = min(server.timeout, _LIST_SECONDS)
            found = await mcp_session.listed(server.url, headers, seconds, server.allowed)
            return self._tools(server, found), found.era
        except Exception as error:
            said = "the MCP server %s cannot be asked for its tools: runs go on without them"
            self._throttle.error(_log, error, said, server.name)
            return None

    def _tools(self, server: McpServer, found: Listed) -> list[_Theirs]:
        given = told(server, found.tools)
        if given.left_out:
            name, why = next(iter(given.left_out.items()))
            self._throttle.warn(
                _log,
                "the MCP server %s has %d tools that no model can be told of, such as %.80r: %s",
                *(server.name, len(given.left_out), name, why),
            )
        if given.missing:
            said = "the MCP server %s has no tool %.80r, which allowed= has"
            self._throttle.warn(_log, said, server.name, given.missing[0])
        return given.tools

    def tool(self, server: McpServer, theirs: _Theirs, of: _List) -> Tool:
        """Give what a model may call."""

        async def call(arguments: Json, context: ToolContext) -> str:
            return await self._call(server, theirs.name, of, arguments, context)

        return McpTool(
            theirs.spec(),
            "server",
            call,
            timeout=server.timeout,
            approval=server.approval(theirs.name),
            sequential=server.sequential,
        )

    async def _call(self, server: McpServer, name: str, of: _List, arguments: Json, context: ToolContext) -> str:
        from ..upstream import mcp_session

        assert of.era is not None
        headers = await self._headers(server, context)
        try:
            said, is_error = await mcp_session.called(server.url, headers, of.era, name, arguments, server.timeout)
        except mcp_session.McpError as error:
            raise self._failed(server, of, error) from error
        if is_error:
            raise ToolFailedError(said, "failed")
        return said

    async def _headers(self, server: McpServer, context: ToolContext) -> dict[str, str]:
        if self._is_busy(server):
            raise ToolFailedError(BUSY, "busy")
        made = _Headers(server, context, self._late)
        try:
            # The app's context goes along.
            return await beside(made.name, made.run)
        finally:
            made.leave()

    def _failed(self, server: McpServer, of: _List, error: Any) -> ToolFailedError:
        if error.why == "refused":
            return ToolFailedError(REFUSED + error.said, "refused")
        if error.why == "too large":
            return ToolFailedError(TOO_LARGE, "too large")
        # It may be another one when it comes back: the next run asks.
        of.until = 0.0
        if error.why == "timed out":
            return ToolFailedError(f"Timed out after {server.timeout:g} seconds.", "timed out")
        return ToolFailedError(UNKNOWN, "unreachable")


class Equipment:
    """What a run is to have of its assistant's servers, once all have answered."""

    def __init__(self, tools: McpTools, assistant: Assistant, found: Sequence[tuple[McpServer, _List | None]]) -> None:
        self._tools, self._assistant, self._found = tools, assistant, found

    def wait(self, seconds: float) -> bool:
        """Wait until it is there, at most so long, and tell whether it is."""
        until = time.monotonic() + seconds
        return all(one is None or one.over.wait(max(0.0, until - time.monotonic())) for _, one in self._found)

    @property
    def missing(self) -> list[str]:
        """Give the names of the servers that could not be asked."""
        return [server.name for server, found in self._found if found is None or found.era is None]

    def assistant(self) -> Assistant:
        """Give the assistant with the tools. Its model is told which servers are missing, so that it says so rather
        than something that it made up."""
        more = {
            theirs.ours: self._tools.tool(server, theirs, found)
            for server, found in self._found
            if found is not None
            for theirs in found.tools
        }
        said, missing = "", self.missing
        if missing:
            said = (
                f"The tools of {', '.join(missing)} cannot be reached at the moment. Where the answer would need them, "
                "say that they cannot be reached now, and make nothing up instead."
            )
        return self._assistant.equipped(more, said, [name + BETWEEN for name in missing])


def _settle(made: _List, server: McpServer, found: tuple[list[_Theirs], Era] | None) -> None:
    if found is None:
        made.settle((), None, _AGAIN_SECONDS)
    else:
        made.settle(*found, server.list_seconds)
