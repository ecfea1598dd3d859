"""An assistant is configuration in the app's code."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from .errors import ConfigurationError, meant
from .events import Json
from .mcp import McpServer, checked
from .tools import Tool, check_seconds, sorted_out
from .types import AssistantSummary
from .upstream.dialects import DIALECTS
from .upstream.protocol import ToolSpec

_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_OURS: Final = frozenset({"input", "messages", "thread", "stream", "timeout", "conversation", "previous_response_id"})
_OWN: Final = frozenset(
    {
        "model",
        "instructions",
        "name",
        "description",
        "upstream",
        "background",
        "system_role",
        "max_history",
        "tools",
        "mcp",
        "max_rounds",
        "max_tool_seconds",
    }
)


class Assistant:
    """One assistant that threads can be run with.

    ``id`` is what pages send in ``assistant_ids``; it stays with the messages, so keep it.
    ``name`` and ``description`` are public. ``upstream`` is the dialect: ``"responses"``
    (``client.responses.create``), ``"chat"`` (``client.chat.completions.create``) or ``"assistants"``
    (``client.beta.threads.create_and_run``, with ``id`` or ``assistant_id=`` naming the ``asst_…``).
    Any other keyword is passed on to that call, see the OpenAI API reference; what only your model server knows goes
    into ``extra_body={...}``.

    ``system_role=False`` is for a model whose chat template has no system role (such as Gemma's): the instructions go
    into the first user's turn. ``max_history`` limits what of a thread it is sent, the oldest messages left out: a
    number of characters, ``{"characters": ..., "messages": ...}`` with one or both, or a callable that takes the
    history, a list of ``{"role", "assistant_id", "content"}``, oldest first, and gives what to send of it. Without it
    the settings ``ASSISTREAM_MAX_HISTORY_CHARS`` and ``ASSISTREAM_MAX_HISTORY_MESSAGES`` count.

    With ``background=True`` the model server goes on with an answer when this process ends, and another worker
    takes it over; it stores the answer for that, and its first word comes later. For ``upstream="responses"`` only.

    ``tools`` are what the model may call: functions of the app's, plain or from :func:`tool`, what the page executes
    from :func:`page_tool`, and tools of the model server as it takes them, such as ``{"type": "web_search"}``. ``mcp``
    are servers of the app's own that have more, each an :class:`McpServer`. After
    ``max_rounds`` answers with calls the model is asked once more and may call nothing, so that the user gets words.
    All calls of a run together may take ``max_tool_seconds``, waiting for people left out.

    Raises :class:`ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        id: str,
        *,
        model: str | None = None,
        instructions: str | None = None,
        name: str | None = None,
        description: str | None = None,
        upstream: str = "responses",
        background: bool = False,
        system_role: bool = True,
        max_history: int
        | Mapping[str, int]
        | Callable[[list[dict[str, Any]]], Sequence[Mapping[str, Any]]]
        | None = None,
        tools: Sequence[Tool | Callable[..., Any] | Mapping[str, Any]] = (),
        mcp: Sequence[McpServer] = (),
        max_rounds: int = 10,
        max_tool_seconds: float = 120.0,
        **arguments: Any,
    ) -> None:
        _check(id, model, upstream, background, system_role, max_history, arguments)
        _check_rounds(id, max_rounds, max_tool_seconds)
        self.id = id
        self.model = model
        self.instructions = instructions
        self.name = name if name is not None else id
        self.description = description or ""
        self.upstream = upstream
        self.background = background
        self.system_role = system_role
        self.max_history = {"characters": max_history} if isinstance(max_history, int) else max_history
        self.tools: Mapping[str, Tool]
        self.hosted: Sequence[Json]
        try:
            self.tools, self.hosted = sorted_out(tools)
            self.mcp: Sequence[McpServer] = checked(mcp, self.tools)
            self._lacking: tuple[str, ...] = ()
        except ConfigurationError as error:
            raise ConfigurationError(f"Assistant {id!r}: {error}") from error.__cause__
        self.max_rounds, self.max_tool_seconds = max_rounds, max_tool_seconds
        self.arguments: Mapping[str, Any] = arguments

    def equipped(self, more: Mapping[str, Tool], said: str, lacking: Sequence[str]) -> Assistant:
        """Give the assistant with ``more`` tools, without those whose names begin as ``lacking`` says, and with what is
        ``said`` to its model beside its instructions."""
        found = copy.copy(self)
        found.tools, found._lacking = {**self.tools, **more}, tuple(lacking)
        # Of an assistant that the model server keeps, they would stand instead of the instructions there.
        if said and (self.instructions or DIALECTS[self.upstream].needs_model):
            found.instructions = "\n\n".join(filter(None, (self.instructions, said)))
        return found

    def lacks(self, tool: str) -> bool:
        """Tell whether ``tool``, which it has not, is of a server that cannot be reached now."""
        return tool.startswith(self._lacking)

    @property
    def specs(self) -> list[ToolSpec]:
        """Give the functions as a model is told of them."""
        return [one.spec for one in self.tools.values()]

    @property
    def page_tools(self) -> frozenset[str]:
        """Give the names of the tools that pages execute."""
        return frozenset(name for name, one in self.tools.items() if one.kind == "page")

    @property
    def system(self) -> str | None:
        """Give the instructions, where they are sent by themselves."""
        return self.instructions if self.system_role else None

    @property
    def most_tokens(self) -> int | None:
        """Give the number of tokens that an answer of ``upstream="responses"`` may have."""
        found = {**(self.arguments.get("extra_body") or {}), **self.arguments}.get("max_output_tokens")
        return found if isinstance(found, int) else None

    def public(self) -> AssistantSummary:
        """Give what any caller may read: id, name, description."""
        return {"id": self.id, "name": self.name, "description": self.description}

    def __repr__(self) -> str:
        return f"Assistant({self.id!r}, model={self.model!r}, upstream={self.upstream!r})"


def _check(
    id: object,
    model: str | None,
    upstream: str,
    background: object,
    system_role: object,
    max_history: object,
    arguments: Mapping[str, Any],
) -> None:
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise ConfigurationError(f"Assistant id {id!r}: use 1 to 64 letters, digits, or any of _ . : -")
    if upstream not in DIALECTS:
        raise ConfigurationError(f"Assistant {id!r}: upstream={upstream!r} is not one of {', '.join(DIALECTS)}")
    if model is None and DIALECTS[upstream].needs_model:
        raise ConfigurationError(f'Assistant {id!r}: add model="...", the name of a model that the server knows')
    for name, value in (("background", background), ("system_role", system_role)):
        if not isinstance(value, bool):
            raise ConfigurationError(f"Assistant {id!r}: {name}={value!r}: use True or False")
    if not _limits(max_history):
        raise ConfigurationError(
            f"Assistant {id!r}: max_history={max_history!r}: give a number of characters from 1 on, "
            '{"characters": ..., "messages": ...}, or a callable'
        )
    if background:
        _check_background(id, upstream, arguments)
    if arguments.get("functions"):
        raise ConfigurationError(f"Assistant {id!r}: give tools=[...] the Python functions, not functions=")
    if taken := sorted(_OURS & arguments.keys()):
        raise ConfigurationError(f"Assistant {id!r}: {', '.join(taken)} is set by assistream for every run; remove it")
    _check_keywords(id, upstream, arguments)


def _check_rounds(id: object, max_rounds: object, max_tool_seconds: object) -> None:
    if type(max_rounds) is not int or max_rounds < 1:
        raise ConfigurationError(f"Assistant {id!r}: max_rounds={max_rounds!r}: give a number from 1 on")
    check_seconds(f"Assistant {id!r}", "max_tool_seconds", max_tool_seconds)


def _check_keywords(id: object, upstream: str, arguments: Mapping[str, Any]) -> None:
    """Raise where the SDK would refuse an argument, which would else fail each run."""
    taken = DIALECTS[upstream].keywords() if arguments else None
    if taken is None:
        return
    for name in sorted(arguments.keys() - taken):
        near = meant(name, (taken | _OWN) - _OURS)
        raise ConfigurationError(
            f"Assistant {id!r}: {name}= is no argument of the SDK's call for upstream={upstream!r}: "
            + (f"write {near}=, or, " if near else "remove it, or, ")
            + f'where your model server knows it, extra_body={{"{name}": ...}}'
        )


def _check_background(id: object, upstream: str, arguments: Mapping[str, Any]) -> None:
    if not DIALECTS[upstream].can_resume:
        able = " or ".join(f'"{name}"' for name, dialect in DIALECTS.items() if dialect.can_resume)
        raise ConfigurationError(
            f"Assistant {id!r}: background=True needs upstream={able}, not {upstream!r}; remove one of the two"
        )
    if not arguments.get("store", True):
        raise ConfigurationError(
            f"Assistant {id!r}: background=True needs an answer that the model server stores; remove store="
        )


def _limits(value: object) -> bool:
    """Tell whether ``value`` can limit a history."""
    if value is None or callable(value):
        return True
    numbers = value if isinstance(value, Mapping) else {"characters": value}
    return (
        bool(numbers)
        and set(numbers) <= {"characters", "messages"}
        and all(type(number) is int and number >= 1 for number in numbers.values())
    )


def index(assistants: Sequence[Assistant]) -> dict[str, Assistant]:
    """Give the assistants by id. Raises :class:`ConfigurationError` for a second one of the same id."""
    found: dict[str, Assistant] = {}
    for assistant in assistants:
        if not isinstance(assistant, Assistant):
            raise ConfigurationError(f"got {assistant!r} in the list of assistants; each must be an Assistant(...)")
        if assistant.id in found:
            raise ConfigurationError(f"two assistants have the id {assistant.id!r}; give each its own")
        found[assistant.id] = assistant
    return found
