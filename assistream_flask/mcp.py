"""MCP servers of the app's own, whose tools an assistant may call."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from .errors import ConfigurationError
from .tools import Approval, Tool, ToolContext, check_approval, check_seconds

Headers = Mapping[str, str] | Callable[[], Mapping[str, str]] | Callable[[ToolContext], Mapping[str, str]]

BETWEEN: Final = "__"
"""Stands between a server's name and that of its tool."""
MOST_TOOLS: Final = 128
"""So many of a server's a model is told of, which is as many as OpenAI takes."""
_NAME: Final = re.compile(r"(?!.*__)[A-Za-z0-9-](?:[A-Za-z0-9_-]{0,22}[A-Za-z0-9-])?")
_PACKAGE: Final = "mcp"
# As pyproject.toml says.
_LOWEST: Final = (2, 3)
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE: Final = re.compile(r"[\x20-\x7e\t]*")
# The protocol's own, and what says how long a body is.
_TAKEN: Final = re.compile(
    r"(?i)mcp-.*|accept|accept-encoding|content-.*|host|connection|transfer-encoding|last-event-id"
)


class McpServer:
    """A server of the Model Context Protocol (MCP) that the app asks itself, over streamable HTTP. Its tools are an
    assistant's like the app's own functions: ``Assistant(mcp=[McpServer("https://…")])``.

    - ``name``: what its tools' names begin with, as ``name__tool``; by default made of the host's. Two servers of an
      assistant have two names.
    - ``headers``: what is sent with each request, such as ``{"Authorization": ...}``; or a callable that gives it,
      asked within the app's context for each list of tools and each call, so that a token is fresh. It may take a
      :class:`ToolContext`, whose ``tool_call_id`` is empty where the list is asked for.
    - ``allowed``: the tools that a model may call, by their names at the server; all by default.
    - ``approval``: whether a person must approve of a call: ``True``, the names of the tools for which, all of them in
      ``allowed``, or a callable as that of :func:`tool`.
    - ``timeout``: so many seconds a call may take.
    - ``sequential``: no other call of a run is executed beside one of this server's.
    - ``list_seconds``: for so long the list of its tools is kept.

    Raises :class:`ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        headers: Headers | None = None,
        allowed: Collection[str] | None = None,
        approval: Approval | Collection[str] = False,
        timeout: float = 30.0,
        sequential: bool = False,
        list_seconds: float = 300.0,
    ) -> None:
        self.url, host = _checked_url(url)
        label = f"McpServer({_shown(self.url)!r})"
        self.name = _default_name(host) if name is None else name
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"{label}: name={self.name!r}: use 1 to 24 letters of English, digits, - or _, with no _ at an end and "
                "no two in a row"
            )
        for option, value in (("timeout", timeout), ("list_seconds", list_seconds)):
            check_seconds(label, option, value)
        if not isinstance(sequential, bool):
            raise ConfigurationError(f"{label}: sequential={sequential!r}: use True or False")
        self.allowed = None if allowed is None else _names(label, "allowed", allowed)
        self._asked: frozenset[str] | None = None
        self._approval: Approval = False
        if isinstance(approval, bool) or callable(approval):
            check_approval(label, approval)
            self._approval = approval
        else:
            self._asked = _names(label, "approval", approval)
            # A name that the server does not have would be a tool that runs unasked: misspelt, or renamed there.
            if self.allowed is None:
                raise ConfigurationError(
                    f"{label}: approval= names tools, and any other is called unasked: name all that may be called in "
                    "allowed=, or give approval=True"
                )
            if unknown := sorted(self._asked - self.allowed):
                raise ConfigurationError(f"{label}: approval= names {unknown[0]!r}, which allowed= has not")
        self._headers, self._takes_context = _checked_headers(label, headers)
        self.timeout, self.sequential, self.list_seconds = float(timeout), sequential, float(list_seconds)
        _check_client(label)

    def approval(self, tool: str) -> Approval:
        """Tell whether a call of ``tool``, by its name at the server, needs a person's approval."""
        return self._approval if self._asked is None else tool in self._asked

    @property
    def asks_the_app(self) -> bool:
        """Tell whether its headers are given by a function of the app's, which may take long."""
        return callable(self._headers)

    def headers(self, context: ToolContext) -> dict[str, str]:
        """Give what is sent with a request. Raises what the app raises, and :class:`ConfigurationError` where what it
        gives cannot be sent; that has no value in it."""
        given: Any = self._headers
        if callable(given):
            given = given(context) if self._takes_context else given()
        return _sendable(f"McpServer {self.name!r}", given)

    def __repr__(self) -> str:
        return f"McpServer({_shown(self.url)!r}, name={self.name!r})"


def _check_client(label: str) -> None:
    """Raise :class:`ConfigurationError` where the client's package is not there, too old, or behind a module of the
    app's own: it is imported in the worker only, where each run would be without the tools."""
    install = "pip install 'assistream-flask[mcp]'"
    found = importlib.util.find_spec(_PACKAGE)
    if found is None:
        raise ConfigurationError(f"{label}: its client is not installed: {install}")
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        package = None
    # One that is installed to be edited is elsewhere, and nothing is known of it.
    folder = None if package is None else Path(str(package.locate_file(_PACKAGE)))
    if package is None or (folder is not None and folder.is_dir() and not _is_in(found, folder)):
        raise ConfigurationError(
            f"{label}: its client is the package mcp, and {found.origin!r} stands before that: give it another name, "
            f"and {install}"
        )
    if tuple(map(int, re.findall(r"\d+", package.version)[:2])) < _LOWEST:
        lowest = ".".join(map(str, _LOWEST))
        raise ConfigurationError(f"{label}: its client is mcp {package.version}, and has to be {lowest}: {install}")


def _is_in(found: ModuleSpec, folder: Path) -> bool:
    return any(Path(one).resolve() == folder.resolve() for one in found.submodule_search_locations or ())


def _checked_url(url: object) -> tuple[str, str]:
    """Give the address, and the name of the host in it."""
    fix = 'give the address of a server that speaks streamable HTTP, such as "https://example.org/mcp"'
    if not isinstance(url, str):
        raise ConfigurationError(f"McpServer: got {url!r}, and commands (stdio) cannot be used: {fix}")
    # What is wrong with it is said without the address, which may have a password.
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigurationError(f"McpServer: its address cannot be read: {fix}") from None
    if "://" not in url and not parts.scheme.startswith("http"):
        raise ConfigurationError(f"McpServer: got {url[:60]!r}, and commands (stdio) cannot be used: {fix}")
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigurationError(f"McpServer: its address is none of HTTP: {fix}")
    if "@" in parts.netloc:
        raise ConfigurationError('McpServer: its address has a password: give headers={"Authorization": ...} instead')
    if parts.fragment:
        raise ConfigurationError("McpServer: its address has a #: remove it and what is behind it")
    return url, host


def _shown(url: str) -> str:
    # What is behind the ? may be a key.
    return url.partition("?")[0]


def _default_name(host: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "_", host)[:24].strip("_")


def _names(label: str, option: str, given: object) -> frozenset[str]:
    if (
        isinstance(given, str | Mapping)
        or not isinstance(given, Collection)
        or not all(isinstance(n, str) for n in given)
    ):
        raise ConfigurationError(f"{label}: {option}={given!r}: give a list of names of tools")
    return frozenset(given)


def _checked_headers(label: str, headers: object) -> tuple[object, bool]:
    """Give what gives the headers, and whether that takes a context."""
    if headers is None:
        return {}, False
    if not callable(headers):
        return _sendable(label, headers), False
    if inspect.iscoroutinefunction(headers):
        raise ConfigurationError(f"{label}: headers= is an async def: give a plain function")
    for given in ((), (None,)):
        try:
            inspect.signature(headers).bind(*given)
        except ValueError:
            # That of a function in C, which says nothing of its parameters.
            return headers, False
        except TypeError:
            continue
        return headers, bool(given)
    raise ConfigurationError(f"{label}: headers= takes several arguments: take none, or a ToolContext")


def _sendable(label: str, headers: object) -> dict[str, str]:
    """Give headers that can be sent. What is said of others has no value in it, as that is a secret."""
    if not isinstance(headers, Mapping):
        raise ConfigurationError(f"{label}: headers= gave no dict of names and values")
    found: dict[str, str] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER.fullmatch(name) or not isinstance(value, str):
            raise ConfigurationError(f"{label}: headers= gave something else than texts, or a name that is no header's")
        # A key that was read from a file ends with a line's end; whatever else is wrong would be told with its value.
        if not _VALUE.fullmatch(value.strip()):
            raise ConfigurationError(f"{label}: headers= gave a value for {name} that no header can have")
        if _TAKEN.fullmatch(name):
            raise ConfigurationError(f"{label}: headers= gave {name}, which assistream sends itself: remove it")
        found[name] = value.strip()
    return found


def checked(given: object, tools: Mapping[str, Tool]) -> tuple[McpServer, ...]:
    """Give the servers of ``Assistant(mcp=...)``. Raises :class:`ConfigurationError`, also where a name of a tool of
    one could be that of another's, or of one of ``tools``."""
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ConfigurationError(f"mcp={given!r}: give a list")
    names: set[str] = set()
    for one in given:
        if not isinstance(one, McpServer):
            raise ConfigurationError(f"mcp has {one!r}: give McpServer(...)")
        if one.name in names:
            raise ConfigurationError(f"two MCP servers have the name {one.name!r}: give one another with name=")
        names.add(one.name)
        if taken := next((name for name in tools if name.startswith(one.name + BETWEEN)), None):
            raise ConfigurationError(
                f"the tool {taken!r} has a name as those of the MCP server {one.name!r} have: give one of the two "
                "another with name="
            )
    return tuple(given)
