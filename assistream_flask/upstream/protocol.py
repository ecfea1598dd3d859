"""What a dialect is: a way to ask a model server, and a way to read what it answers.

A dialect is a module with a class of this protocol, and a line in :mod:`assistream_flask.upstream.dialects`, where all
are found by their names. The contract suite asks the offline server in it, which needs to know it too:
``testing/_answers.py`` and ``testing/_wire.py``. Background answers are those of the Responses API only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import openai

from ..events import Json
from .deltas import Delta, End, Failed, Source
from .items import Turn


class ToolSpec(NamedTuple):
    """A function as a model is told of it: ``parameters`` is a JSON schema of an object, ``strict`` whether it
    qualifies for OpenAI's strict mode."""

    name: str
    description: str
    parameters: Json
    strict: bool

    def function(self) -> Json:
        """Give it as Chat Completions and the Assistants API are told of it."""
        return {"type": "function", "function": self._asdict()}


class ModelRequest(NamedTuple):
    """What a model server is asked for: the next message of an assistant after ``turns``.

    ``system`` is what is sent as instructions by themselves, ``arguments`` are the app's own for the SDK's call. The
    server is to fail that sends no byte for ``stall`` seconds. ``tools`` are the functions that the model may call, and
    ``hosted`` what the server executes itself, as the app gave it; ``may_call`` says whether it may call any now.
    ``followup`` is that of the answer whose calls the last turn has the outputs of, see :class:`.deltas.End`, with
    these as its ``outputs``.
    """

    assistant_id: str
    model: str | None
    system: str | None
    arguments: Mapping[str, Any]
    background: bool
    turns: Sequence[Turn]
    stall: float
    tools: Sequence[ToolSpec] = ()
    hosted: Sequence[Mapping[str, Any]] = ()
    may_call: bool = True
    followup: Json | None = None

    def body(self, told: Callable[[ToolSpec], Json], **sent: Any) -> Json:
        """Give the ``extra_body`` of the SDK's call: ``sent`` and the tools, beside what the app gave there.

        The SDK looks through typed arguments, at more cost than all else that a request needs; this it sends as it is.
        """
        body = {**(self.arguments.get("extra_body") or {}), **sent}
        if tools := [*map(told, self.tools), *self.hosted]:
            body["tools"] = [*body.get("tools", ()), *tools]
        if not self.may_call and body.get("tools"):
            # What the app says of it in its arguments is overwritten by a body's.
            body["tool_choice"] = "none"
        return body


class Reading(NamedTuple):
    """What there is to know before an answer is read: that it has at most so many tokens, where the request said so.
    One that calls a function fails unless the assistant ``has_tools``. ``learn`` is of :meth:`Dialect.learner`."""

    most_tokens: int | None = None
    has_tools: bool = False
    learn: Callable[[], None] | None = None


UNREAD: Final = Reading()
"""That nothing is known."""


class Translator(Protocol):
    """Translates the events of one answer to deltas. Made for one answer, and used by one thread at a time."""

    joins: ClassVar[bool]
    """Whether the texts of one read may come in one event."""
    source: Source | None
    """What the server says of the answer as a whole, known once that is over."""

    def feed(self, kind: str, data: Json) -> list[Delta]:
        """Take one event, and give its deltas. Raise :class:`.errors.RunError`, or give :class:`.deltas.Failed` where
        something was said before. Ignore what is not known: servers send events of their own."""
        ...

    def texts(self, batch: Sequence[tuple[str, Json]]) -> list[Delta] | None:
        """Do what :meth:`feed` does for each, in one step, where all of ``batch`` are pieces of one text; where they
        are not, do nothing and give ``None``."""
        ...

    def settled(self) -> End | Failed | None:
        """Give how the answer ends if its stream stops now; ``None`` where that would be no end."""
        ...


class Dialect(Protocol):
    """One of the APIs that model servers speak. One object serves all answers of a process: it keeps nothing, but for
    what it learned of the servers."""

    name: ClassVar[str]
    """What ``Assistant(upstream=...)`` calls it."""
    needs_model: ClassVar[bool]
    """Whether a request must name a model."""
    can_resume: ClassVar[bool]
    """Whether an answer can go on in the background and be asked for again, as ``Assistant(background=True)`` wants
    it. True only for the Responses API so far, whose translator :mod:`.background` uses."""

    def keywords(self) -> frozenset[str] | None:
        """Name what the SDK's call takes, so that a misspelt argument is found; ``None`` where that is anything."""
        ...

    def create(self, client: openai.OpenAI, request: ModelRequest) -> Any:
        """Ask the server, once, and give the SDK's stream. Raise whatever the SDK raises."""
        ...

    def instead(
        self, client: openai.OpenAI, request: ModelRequest, error: openai.APIStatusError
    ) -> ModelRequest | None:
        """Give what to ask for instead of a request that the server refused with ``error``; ``None`` where nothing else
        would help. Each gives the server less to refuse, so that asking comes to an end."""
        ...

    def learner(self, client: openai.OpenAI, request: ModelRequest) -> Callable[[], None] | None:
        """Give what a translator of the answer calls when it sees that the model reasons, where that matters."""
        ...

    def translator(self, reading: Reading = UNREAD, start: int = 0) -> Translator:
        """Make a translator for one answer, whose first text is part ``start`` of the message."""
        ...

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell whether an event of a stream that nobody named a dialect for is of this one."""
        ...
