"""What a dialect is: a way to ask a model server, and a way to read what it answers.

A dialect is a module with a class of this protocol, and a line in :mod:`assistream_flask.upstream.dialects`, where all
are found by their names. The contract suite asks the offline server in it, which needs to know it too:
``testing/_answers.py`` and ``testing/_wire.py``. Background answers are those of the Responses API only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import openai

from ..events import Json
from .deltas import Delta, End, Failed
from .items import Turn


class ModelRequest(NamedTuple):
    """What a model server is asked for: the next message of an assistant after ``turns``.

    ``system`` is what is sent as instructions by themselves, ``arguments`` are the app's own for the SDK's call. The
    server is to fail that sends no byte for ``stall`` seconds.
    """

    assistant_id: str
    model: str | None
    system: str | None
    arguments: Mapping[str, Any]
    background: bool
    turns: Sequence[Turn]
    stall: float


class Translator(Protocol):
    """Translates the events of one answer to deltas. Made for one answer, and used by one thread at a time."""

    joins: ClassVar[bool]
    """Whether the texts of one read may come in one event."""

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
    """One of the APIs that model servers speak. It keeps nothing: one object serves all answers of a process."""

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

    def translator(self, most_tokens: int | None = None) -> Translator:
        """Make a translator for one answer, one of at most so many tokens where the request said so."""
        ...

    def recognises(self, kind: str, data: Json) -> bool:
        """Tell whether an event of a stream that nobody named a dialect for is of this one."""
        ...
