"""An OpenAI stream in, parts of an answer out, whatever dialect the model server speaks.

:func:`open` starts a run upstream; :func:`resume` goes on with one that another process began;
:func:`translate` takes a stream that exists already. All give an :class:`Upstream`: an iterator of lists
of parts, one list a network read. :func:`cancel` ends a background response.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai

from ..assistants import Assistant
from ..errors import RunError
from ..events import Json
from . import assistants, background, chat, responses, wire
from .background import cancel
from .gate import Gate
from .parts import Begun, End, Part, Translator, Turn, code_of, failure

__all__ = ["Upstream", "cancel", "open", "resume", "translate"]

_log = logging.getLogger(__name__)

_CREATE: dict[str, Callable[[openai.OpenAI, Assistant, Sequence[Turn], float], Any]] = {
    "responses": responses.create,
    "chat": chat.create,
    "assistants": assistants.create,
}


_TRANSLATOR: dict[str, Callable[[], Translator]] = {
    "responses": responses.ResponsesTranslator,
    "chat": chat.ChatTranslator,
    "assistants": assistants.AssistantsTranslator,
}


class Upstream:
    """An answer that arrives. Iterating gives lists of parts; the last part of an answer is an
    :class:`.parts.End`. Raises :class:`RunError` when the answer fails, a missing end included.

    Go on iterating after the end: it reads the connection empty, so that it can be used again.
    """

    def __init__(
        self,
        stream: Any,
        translator: Translator | None = None,
        place: background.Place | None = None,
        poll: background.Poll | None = None,
    ) -> None:
        self._stream, self._translator, self._place, self._poll = stream, translator, place, poll
        self._state = place.state() if place is not None else None
        self.gate: Gate | None = None
        """Where it is set, an empty list is given before each read that can be waited for there, and before the first
        that can't, until the end."""

    def state(self) -> Json | None:
        """Gives what :func:`resume` needs to go on behind the last list, as JSON for nobody to change.

        ``None`` unless this is a background response whose id is known (:class:`.parts.Begun` says so). It costs
        nothing, so ask with each list, in the thread that iterates, and keep it with what the list was added to:
        in another thread it may be one list ahead of what that one was handed.
        """
        return self._state

    def __iter__(self) -> Iterator[list[Part]]:
        translator, place = self._translator, self._place
        ended = False
        try:
            # A place is counted in events.
            joined = place is None and isinstance(translator, responses.ResponsesTranslator)
            for batch in wire.read(self._stream, self.gate, joined=joined) if self._stream is not None else ():
                if ended:
                    continue
                if not batch:
                    yield []
                    continue
                parts: list[Part] = []
                failed: RunError | None = None
                try:
                    if place is None and isinstance(translator, responses.ResponsesTranslator):
                        texts = translator.texts(batch)
                        if texts is not None:
                            if texts:
                                yield texts
                            continue
                    for kind, data in batch:
                        translator = translator or _translator(kind, data)
                        if translator is None or (place is not None and place.repeats(data)):
                            continue
                        parts += translator.feed(kind, data)
                        if place is not None and place.passes(kind, data):
                            self._state = place.state()
                            yield [*parts, Begun()]
                            parts = []
                except RunError as error:
                    # What came before it in the same read was said.
                    failed = error
                if at := next((at for at, part in enumerate(parts, 1) if isinstance(part, End)), 0):
                    ended, parts = True, parts[:at]
                if parts:
                    if place is not None:
                        self._state = place.state()
                    yield parts
                if failed is not None:
                    raise failed
            if not ended and self._poll is not None:
                yield from self._polled(self._poll)
                ended = True
        except RunError:
            raise
        except Exception as error:
            if ended:
                return
            if translator is None or (end := translator.settled()) is None:
                _log.warning("the upstream stream broke: %r", error)
                code = _code(error, "upstream_cut")
                # The SDK has one class for a connection that failed and one that broke later.
                raise RunError("upstream_cut" if code == "upstream_unreachable" else code) from error
            yield [end]
            return
        if not ended:
            if translator is None or (end := translator.settled()) is None:
                raise RunError("upstream_ended_early")
            yield [end]

    def _polled(self, poll: background.Poll) -> Iterator[list[Part]]:
        """The rest of a response that is streamed no more, once it is over."""
        response = poll.wait()
        place = background.Place(self._state, again=True)
        parts = place.translator.missing(response)
        try:
            parts += place.translator.feed(f"response.{response['status']}", {"response": response})
        except RunError:
            if parts:
                self._state = place.state()
                yield parts
            raise
        self._state = place.state()
        yield parts

    def close(self) -> None:
        """Closes the connection, and waits no longer for a polled response. Idempotent, from any greenlet or thread.

        The model server sees it and stops, unless it answers in the background: see :func:`cancel`.
        """
        if self._poll is not None:
            self._poll.close()
        wire.close(self._stream)


def open(client: openai.OpenAI, assistant: Assistant, turns: Sequence[Turn], stall: float) -> Upstream:
    """Asks ``assistant`` for the next message after ``turns``. ``stall`` is in seconds without a byte.

    Raises :class:`RunError`; the cause is in the log.
    """
    try:
        # The SDK would retry a POST that has no idempotency key: a run generated, and paid, twice.
        stream = _CREATE[assistant.upstream](client.with_options(max_retries=0), assistant, turns, stall)
    except Exception as error:
        code = _code(error, "server_error")
        _log.warning("%r: %s: %r, from %r", assistant, code, error, error.__cause__)
        raise RunError(code) from error
    if assistant.background:
        place = background.Place()
        return Upstream(stream, place.translator, place)
    return Upstream(stream, _TRANSLATOR[assistant.upstream]())


def resume(client: openai.OpenAI, assistant: Assistant, state: Json, stall: float, *, every: float = 2.0) -> Upstream:
    """Goes on with a background response behind ``state``, which :meth:`Upstream.state` gave in any process.

    Nothing is given twice and nothing is left out. A server that numbers its events sends those that are new;
    of one that does not, the response is read from its start and what was told already is dropped, by counting
    the characters of each part. A response that the server streams no more (OpenAI's limit is five minutes), or
    whose stream stops without an end, is asked for ``every`` so many seconds until it is over; the rest then comes
    in one list, and failures of the network or the server that pass are waited out.

    Raises :class:`RunError`: ``worker_lost`` when the server does not know the response (any more); the cause is
    in the log. ``stall`` is in seconds without a byte.
    """
    quick = client.with_options(max_retries=0)
    try:
        stream = background.retrieve(quick, state, stall)
    except RunError:
        raise
    except Exception as error:
        code = _code(error, "server_error")
        _log.warning("%r: %s: %r, from %r", assistant, code, error, error.__cause__)
        raise RunError(code) from error
    place = background.Place(state, again=state["sequence"] is None)
    poll = background.Poll(quick, state["response_id"], stall, every)
    return Upstream(stream, place.translator, place, poll)


def translate(stream: Any) -> Upstream:
    """Takes any OpenAI stream: the SDK's ``Stream`` of the three dialects, or an iterator of its events.

    Raises ``TypeError`` for what cannot be iterated, such as an async stream.
    """
    # An answer that came whole can be iterated too: stream=True was forgotten.
    if not hasattr(stream, "__iter__") or isinstance(stream, openai.BaseModel | str | bytes | dict):
        raise TypeError(
            f"got {type(stream).__name__}: pass what client.responses.create(..., stream=True), "
            "client.chat.completions.create(..., stream=True) or an Assistants run with stream=True gives "
            "(the synchronous client's)"
        )
    return Upstream(stream)


def _translator(kind: str, data: Json) -> Translator | None:
    """Tells the dialect by an event, once one is known."""
    if kind == "error":
        raise failure(data)
    if kind.startswith("thread."):
        return assistants.AssistantsTranslator()
    if kind.startswith("response."):
        return responses.ResponsesTranslator()
    return chat.ChatTranslator() if "choices" in data else None


def _code(error: Exception, otherwise: str) -> str:
    if isinstance(error, openai.APITimeoutError) or wire.timed_out(error):
        return "upstream_unreachable" if wire.not_connected(error) else "upstream_stalled"
    if isinstance(error, openai.RateLimitError):
        return "rate_limit_exceeded"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return "upstream_unauthorized"
    if isinstance(error, openai.BadRequestError) and re.search("context.?(length|size|window)", str(error), re.I):
        return "context_length_exceeded"
    if isinstance(error, openai.APIStatusError):
        return "upstream_error" if error.status_code >= 500 else "upstream_rejected"
    if isinstance(error, openai.APIConnectionError):
        return "upstream_unreachable"
    if isinstance(error, openai.APIError):
        return code_of({"code": error.code, "type": error.type})
    if isinstance(error, openai.OpenAIError):
        return "upstream_unauthorized"
    if isinstance(error, ValueError):
        return "upstream_malformed"
    return otherwise
