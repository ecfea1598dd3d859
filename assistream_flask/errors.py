"""What can go wrong, and what of it the public may read.

Raw exception text, keys and upstream messages go to the log. A client gets one of the fixed
sentences below, with a stable ``code`` it can act on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any, Final

from .types import ErrorBody, ErrorDetails, LastError

RUN_ERRORS: Final[dict[str, str]] = {
    "rate_limit_exceeded": "The model server is busy. Try again in a moment.",
    "insufficient_quota": "The model server's quota or balance is used up. The app's operator must top it up.",
    "content_filter": "The model server's content filter refused the question. Put it differently.",
    "model_loading": "The model is still loading. Try again in a minute.",
    "server_busy": "The server has too many answers under way. Try again in a moment.",
    "empty_answer": "The model gave no answer. Try again.",
    "upstream_unauthorized": "The model server refused this app's credentials. "
    "The app's operator must check OPENAI_API_KEY.",
    "upstream_rejected": "The model server refused the request. "
    "The app's operator must check the assistant's model and arguments; the log has the details.",
    "context_length_exceeded": "This thread has become too long for the model. Start a new one.",
    "upstream_error": "The model server failed. Try again.",
    "upstream_unreachable": "The model server could not be reached. Try again in a moment.",
    "upstream_cut": "The connection to the model server broke in mid-answer. Try again.",
    "upstream_ended_early": "The model server stopped without finishing its answer. Try again.",
    "upstream_malformed": "The model server sent something unreadable. Try again.",
    "upstream_redirected": "The model server's address leads to another one. "
    "The app's operator must check OPENAI_BASE_URL; the log has the details.",
    "answer_too_long": "The model server sent more at once than this app takes. Ask for something shorter.",
    "upstream_stalled": "The model server went silent. Try again.",
    "run_time_limit": "The answer took longer than this app allows. Ask for something shorter.",
    "tools_not_supported": "The model asked for a tool, and this app has none. Ask for an answer without tools.",
    "too_many_tool_calls": "The assistant called its tools again and again, and gave no answer. "
    "Put the question differently.",
    "worker_lost": "The server restarted before the answer was whole. Try again.",
    "server_error": "Something failed on the server. Try again.",
}
"""``last_error.code`` of a failed run, and the message that goes with it."""
MESSAGE_TOO_LONG: Final = "Your message is too long for the model. Send a shorter one."
"""The message of ``context_length_exceeded`` where a new thread would not help."""
STILL_LOADING: Final[LastError] = {"code": "model_loading", "message": "The model is still loading. It is asked again."}
"""``last_error`` of a run that waits for its model; gone as soon as that answers."""


class AssistreamError(Exception):
    """Base of all errors raised by assistream."""


class ConfigurationError(AssistreamError):
    """The app's code or settings cannot work; the message says what to change."""


class WaitTimeoutError(AssistreamError, TimeoutError):
    """Runs were waited for and have not ended in time. They go on."""


class RunError(AssistreamError):
    """A run failed. ``code`` is a key of :data:`RUN_ERRORS`, ``message`` is public and replaces the one that goes with
    it; ``said`` is what the model server said, for the log only, and kept masked."""

    def __init__(self, code: str, *, said: str = "", message: str | None = None) -> None:
        super().__init__(message or RUN_ERRORS[code])
        self.code, self.said = code, masked(said)

    def public(self) -> LastError:
        """Give ``{"code", "message"}``, the shape of ``run.last_error`` in the Assistants v2 API."""
        return {"code": self.code, "message": str(self)}


def meant(word: str, known: Collection[str], likeness: float = 0.65) -> str:
    """Give the one of ``known`` that ``word`` most likely was to be, "" where none is like it."""
    return next(iter(difflib.get_close_matches(word, known, 1, likeness)), "")


def masked(text: str) -> str:
    """Give ``text`` for the log: on one line, at most 500 characters, and without what may be a key or a password."""
    text = unsecret(text[:5000])
    text = text.encode("unicode_escape").decode() if re.search("[\x00-\x1f\x7f\u2028\u2029]", text) else text
    return text if len(text) <= 500 else text[:499] + "…"


def unsecret(text: str) -> str:
    """Give ``text`` without what may be a key or a password."""
    return _SECRET.sub(lambda found: found[0][: len(found[0]) - len(found[found.lastindex or 0])] + "***", text)


# The last group of each is what is left out.
_SECRET: Final = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|hf|key|r8|nvapi|pplx|fw|csk|tgp|ghp|gho)[-_](?P<own>[\w*-]{5,}[\w*]*)"
    r"|\b(?i:bearer|basic|api-key)\s+(?P<bearer>[\w.~+/=*-]{6,})"
    r"|\bAIza(?P<google>[\w-]{10,})|\bAKIA(?P<amazon>\w{12,})|\beyJ(?P<token>[\w-]{6,}(?:\.[\w-]*)*)"
    r"|(?i:(?:api[-_ ]?key|token|secret|password|authorization)[\\\"']*\s*[=:]\s*[\\\"']*)"
    r"(?!(?i:bearer|basic|api-key)\b)(?P<named>[^\s\\\"',;&}]{6,})"
    r"|(?i:api key provided:?\s*)(?P<provided>[^\s\"',;&}]{6,})"
    r"|[?&](?i:key|token|api_key|secret|pwd|\w*pass(?:word|wd)?)=(?P<query>[^\s&\"']+)"
    # A password may have a slash or an @ that nobody encoded.
    r"|://(?P<user>[^/\s:@\"']*:[^\s\"'<>]+|[^/\s:@\"']+)(?=@)"
    r"|\b(?P<hex>[0-9a-fA-F]{32,})\b"
)


_TYPES: Final[dict[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(AssistreamError):
    """A request that gets a 4xx or 503. ``message`` is public and states the fix.

    ``retry_after`` is in seconds and becomes the ``Retry-After`` header. ``decision`` is how a tool call was answered
    that is answered again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after: int | None = None,
        decision: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after
        self.decision = decision

    def body(self) -> ErrorBody:
        """Give ``{"error": {"type", "code", "message"}}``, the shape of OpenAI's own errors."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error: ErrorDetails = {"type": kind, "code": self.code, "message": self.message}
        if self.decision is not None:
            error["decision"] = self.decision
        return {"error": error}


class NotFoundError(RequestError):
    """There is no such thread, message, run or assistant, or it is another's: that it exists is told to its owner only.

    ``code`` is ``thread_not_found``, ``message_not_found``, ``run_not_found``, ``tool_call_not_found`` or
    ``assistant_not_found``. A route answers 404 with it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(404, code, message)
