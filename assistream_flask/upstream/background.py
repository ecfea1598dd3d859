"""Responses that go on when nobody listens: how far one was read, and the ways back to it.

https://developers.openai.com/api/docs/guides/background.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import openai

from ..errors import RunError, masked
from ..events import Json
from ..platform import openai_sdk
from . import event_reader
from .protocol import Reading
from .responses import ResponsesTranslator

_log = logging.getLogger(__name__)

_BEGINNINGS = ("response.created", "response.queued", "response.in_progress")
_GOING_ON = ("queued", "in_progress")
_OVER = ("completed", "incomplete", "failed", "cancelled")
_QUICK_SECONDS = 10.0


class ResumePoint:
    """How far one response was read: behind ``state``, or ``from_start`` where the server tells all of it again.

    Its first text is part ``start`` of the message.
    """

    def __init__(
        self, reading: Reading, start: int = 0, state: Json | None = None, *, from_start: bool = False
    ) -> None:
        self._reading = reading
        self.translator = ResponsesTranslator(reading, start)
        self._id: str | None = None
        self._sequence: int | None = None
        self._from_start = from_start
        if state is not None:
            self._id = state["response_id"]
            self._sequence = None if from_start else state["sequence"]
            self.translator.restore(state, from_start=from_start)
        self._resumed_at = self._sequence

    def again(self, state: Json | None) -> ResumePoint:
        """Give that of the same response, told from its start once more."""
        return ResumePoint(self._reading, self.translator.start, state, from_start=True)

    def state(self) -> Json | None:
        """Give what another process can go on with, as JSON; ``None`` while the id is not known."""
        if self._id is None:
            return None
        return {"response_id": self._id, "sequence": self._sequence, **self.translator.state()}

    def repeats(self, data: Json) -> bool:
        """Tell whether a server that does not know ``starting_after`` sends an event a second time."""
        number = data.get("sequence_number")
        return self._resumed_at is not None and type(number) is int and number <= self._resumed_at

    def passes(self, kind: str, data: Json) -> bool:
        """Take note of an event that was translated. Give whether the answer begins with it."""
        # A keepalive need not count as the answer's events do.
        if not kind.startswith("response."):
            return False
        number = data.get("sequence_number")
        # What is told from the start is counted in characters; a number from the midst of that would mislead.
        if type(number) is int and not self._from_start:
            self._sequence = number if self._sequence is None else max(number, self._sequence)
        if self._id is None:
            response = data.get("response")
            found = response.get("id") if isinstance(response, dict) else None
            if isinstance(found, str) and found:
                self._id = found
                return kind in _BEGINNINGS
        return False


class Poll:
    """Asks for a response until it is over."""

    def __init__(self, client: openai.OpenAI, response_id: str, stall: float, every: float) -> None:
        self._client, self._id, self._stall, self._every = client, response_id, stall, every
        self._closed = threading.Event()

    def close(self) -> None:
        """End :meth:`wait`, from any thread."""
        self._closed.set()

    def wait(self) -> Json:
        """Give the response in its last state. Goes on after failures that pass.

        Raises :class:`RunError`, or the SDK's error where asking again does not help.
        """
        while not self._closed.is_set():
            response = self._ask()
            status = None if response is None else response.get("status")
            if response is not None and status in _OVER:
                return response
            if response is not None and status not in _GOING_ON:
                _log.warning("the response %s has the status %r", self._id, status)
                raise RunError("upstream_malformed")
            self._closed.wait(self._every)
        raise RunError("upstream_cut")

    def _ask(self) -> Json | None:
        try:
            # As it was sent: the typed one takes an item of an unknown type for another.
            raw = self._client.responses.with_raw_response.retrieve(self._id, timeout=min(self._stall, _QUICK_SECONDS))
            found = raw.http_response.json()
        except openai.APIConnectionError as error:
            _log.info("polling %s: %s", self._id, masked(f"{error!r}, from {error.__cause__!r}"))
            return None
        except openai.APIStatusError as error:
            if error.status_code == 404:
                _log.warning("polling %s: %s", self._id, masked(repr(error)))
                raise RunError("worker_lost") from error
            if error.status_code != 429 and error.status_code < 500:
                raise
            _log.info("polling %s: %s", self._id, masked(repr(error)))
            return None
        if not isinstance(found, dict):
            raise RunError("upstream_malformed")
        return found


def retrieve(client: openai.OpenAI, state: Json, stall: float) -> Any:
    """Give the SDK's stream of what comes after ``state``, or ``None`` where the server streams it no more.

    Raises :class:`RunError`, or the SDK's error.
    """
    options: Json = dict(event_reader.unpadded(client))
    if state["sequence"] is not None:
        options["starting_after"] = state["sequence"]
    try:
        return client.responses.retrieve(state["response_id"], stream=True, timeout=stall, **options)
    except openai.APIStatusError as error:
        if error.status_code == 404:
            _log.warning("the response %s is gone: %s", state["response_id"], masked(repr(error)))
            raise RunError("worker_lost") from error
        if error.status_code in (401, 403, 429) or error.status_code >= 500:
            raise
        _log.info("the response %s is polled: %s", state["response_id"], masked(repr(error)))
        return None


def cancel(client: openai.OpenAI, state: Json) -> None:
    """Have the server end a response, if it has not ended. Raises nothing; the log has what failed."""
    try:
        quick = client.with_options()
        openai_sdk.bound(quick)
        quick.responses.cancel(state["response_id"], timeout=_QUICK_SECONDS)
    except Exception as error:
        _log.warning("the response %s was not cancelled: %s", state["response_id"], masked(repr(error)))
