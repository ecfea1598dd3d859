"""An assistant is configuration in the app's code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .errors import ConfigurationError

UPSTREAMS: Final = ("responses", "chat", "assistants")
_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_OURS: Final = frozenset({"input", "messages", "thread", "stream", "timeout", "conversation", "previous_response_id"})


class Assistant:
    """One assistant that threads can be run with.

    ``id`` is what pages send in ``assistant_ids``; it stays with the messages, so keep it.
    ``name`` and ``description`` are public. ``upstream`` is the dialect: ``"responses"``
    (``client.responses.create``), ``"chat"`` (``client.chat.completions.create``) or ``"assistants"``
    (``client.beta.threads.create_and_run``, with ``id`` or ``assistant_id=`` naming the ``asst_…``).
    Any other keyword is passed on to that call, see the OpenAI API reference.

    With ``background=True`` the model server goes on with an answer when this process ends, and another worker
    takes it over; it stores the answer for that, and its first word comes later. For ``upstream="responses"`` only.

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
        **arguments: Any,
    ) -> None:
        if not isinstance(id, str) or not _ID.fullmatch(id):
            raise ConfigurationError(f"Assistant id {id!r}: use 1 to 64 letters, digits, or any of _ . : -")
        if upstream not in UPSTREAMS:
            raise ConfigurationError(f"Assistant {id!r}: upstream={upstream!r} is not one of {', '.join(UPSTREAMS)}")
        if model is None and upstream != "assistants":
            raise ConfigurationError(f'Assistant {id!r}: add model="...", the name of a model that the server knows')
        if not isinstance(background, bool):
            raise ConfigurationError(f"Assistant {id!r}: background={background!r}: use True or False")
        if background and upstream != "responses":
            raise ConfigurationError(
                f'Assistant {id!r}: background=True needs upstream="responses", not {upstream!r}; remove one of the two'
            )
        if background and not arguments.get("store", True):
            raise ConfigurationError(
                f"Assistant {id!r}: background=True needs an answer that the model server stores; remove store="
            )
        if any(arguments.get(key) for key in ("tools", "functions", "mcp_servers")):
            raise ConfigurationError(f"Assistant {id!r}: tools are not supported yet; remove tools=")
        if taken := sorted(_OURS & arguments.keys()):
            raise ConfigurationError(
                f"Assistant {id!r}: {', '.join(taken)} is set by assistream for every run; remove it"
            )
        self.id = id
        self.model = model
        self.instructions = instructions
        self.name = name if name is not None else id
        self.description = description or ""
        self.upstream = upstream
        self.background = background
        self.arguments: Mapping[str, Any] = arguments

    def public(self) -> dict[str, str]:
        """Gives what any caller may read: id, name, description."""
        return {"id": self.id, "name": self.name, "description": self.description}

    def __repr__(self) -> str:
        return f"Assistant({self.id!r}, model={self.model!r}, upstream={self.upstream!r})"


def index(assistants: Sequence[Assistant]) -> dict[str, Assistant]:
    """Gives the assistants by id. Raises :class:`ConfigurationError` for a second one of the same id."""
    found: dict[str, Assistant] = {}
    for assistant in assistants:
        if not isinstance(assistant, Assistant):
            raise ConfigurationError(f"got {assistant!r} in the list of assistants; each must be an Assistant(...)")
        if assistant.id in found:
            raise ConfigurationError(f"two assistants have the id {assistant.id!r}; give each its own")
        found[assistant.id] = assistant
    return found
