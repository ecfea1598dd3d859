"""What runs see of their thread: the messages before theirs, as many as their assistants take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import openai

from ..assistants import Assistant
from ..events import Said
from ..settings import Settings
from ..store.sql import ThreadStore
from ..upstream import items
from ..upstream.items import Limit, Names, Shorten, Turn


class RunRequest(NamedTuple):
    """An assistant to run, the client to ask it with, the names that the history's speakers have, the app's own way to
    shorten a history, and the app's context, which its tools are executed in."""

    assistant: Assistant
    client: Callable[[], openai.OpenAI]
    names: Names
    shorten: Shorten | None = None
    within: Callable[[], AbstractContextManager[object]] = nullcontext


class _SharedReading:
    """The messages before runs that start together, read from the store once for all of them.

    As much is read as the one takes that takes most. It is kept until the last has it.
    """

    def __init__(self, limits: Sequence[Limit]) -> None:
        self._limit = Limit(max(one.characters for one in limits), max(one.messages for one in limits))
        self._left = len(limits)
        # Held while the store is read: whoever else needs the same waits for that.
        self._guard = threading.Lock()
        self._read: tuple[list[Said], bool] | None = None

    def get(self, store: ThreadStore, message_id: str) -> tuple[list[Said], bool]:
        """Give the messages, and whether there are older ones."""
        with self._guard:
            found = self._read if self._read is not None else store.history(message_id, *self._limit)
            self._left -= 1
            self._read = found if self._left > 0 else None
        return found


class ThreadHistory(NamedTuple):
    """What one run is to see, and how much of it."""

    reading: _SharedReading
    limit: Limit

    def turns(self, store: ThreadStore, message_id: str, request: RunRequest) -> list[Turn]:
        """Give what to send to the model server before the message ``message_id``, oldest first. Raises SQLAlchemy's
        errors where the store cannot be read."""
        said, is_cut = self.reading.get(store, message_id)
        newest = self.limit.of(said)
        is_cut = is_cut or len(newest) < len(said)
        if request.shorten is not None:
            newest = items.shortened(newest, request.shorten)
        return items.turns_of(newest, request.assistant.id, request.names, is_cut=is_cut)


def histories(requests: Sequence[RunRequest | None], settings: Settings, *, shared: bool) -> list[ThreadHistory]:
    """Give what each run is to see of its thread, in their order. Those that start together have it ``shared``: the
    others see different messages."""
    whole = Limit(settings.max_history_chars, settings.max_history_messages)
    limits = [whole.within(one.assistant.max_history) if one is not None else whole for one in requests]
    if shared and limits:
        reading = _SharedReading(limits)
        return [ThreadHistory(reading, limit) for limit in limits]
    return [ThreadHistory(_SharedReading([limit]), limit) for limit in limits]
