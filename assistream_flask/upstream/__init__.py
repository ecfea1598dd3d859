"""An OpenAI stream in, parts of an answer out, whatever dialect the model server speaks.

:func:`open` starts a run upstream; :func:`translate` takes a stream that exists already.
Both give an :class:`Upstream`: an iterator of lists of parts, one list a network read.
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
from . import assistants, chat, responses, wire
from .parts import End, Part, Translator, Turn, code_of, failure

__all__ = ["Upstream", "open", "translate"]

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

    def __init__(self, stream: Any, translator: Translator | None = None) -> None:
        self._stream, self._translator = stream, translator

    def __iter__(self) -> Iterator[list[Part]]:
        translator = self._translator
        ended = False
        try:
            for batch in wire.read(self._stream):
                if ended:
                    continue
                parts: list[Part] = []
                for kind, data in batch:
                    translator = translator or _translator(kind, data)
                    if translator is not None:
                        parts += translator.feed(kind, data)
                ended = any(isinstance(part, End) for part in parts)
                if parts:
                    yield parts
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

    def close(self) -> None:
        """Closes the connection; the model server sees it and stops. Idempotent, from any greenlet or thread."""
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
    return Upstream(stream, _TRANSLATOR[assistant.upstream]())


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
