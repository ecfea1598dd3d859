"""What can go wrong, and what of it the public may read.

Raw exception text, keys and upstream messages go to the log. A client gets one of the fixed
sentences below, with a stable ``code`` it can act on.
"""

from __future__ import annotations

from typing import Final

RUN_ERRORS: Final[dict[str, str]] = {
    "rate_limit_exceeded": "The model server is busy or its quota is used up. Try again in a moment.",
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
    "upstream_stalled": "The model server went silent. Try again.",
    "run_time_limit": "The answer took longer than this app allows. Ask for something shorter.",
    "tools_not_supported": "The model asked for a tool, and this app has none. Ask for an answer without tools.",
    "worker_lost": "The server restarted before the answer was whole. Try again.",
    "server_error": "Something failed on the server. Try again.",
}
"""``last_error.code`` of a failed run, and the message that goes with it."""


class AssistreamError(Exception):
    """Base of all errors raised by assistream."""


class ConfigurationError(AssistreamError):
    """The app's code or settings cannot work; the message says what to change."""


class RunError(AssistreamError):
    """A run failed. ``code`` is a key of :data:`RUN_ERRORS`; the cause goes to the log only."""

    def __init__(self, code: str) -> None:
        super().__init__(RUN_ERRORS[code])
        self.code = code

    def public(self) -> dict[str, str]:
        """Gives ``{"code", "message"}``, the shape of ``run.last_error`` in the Assistants v2 API."""
        return {"code": self.code, "message": RUN_ERRORS[self.code]}


_TYPES: Final[dict[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(AssistreamError):
    """A request that gets a 4xx or 503. ``message`` is public and states the fix.

    ``retry_after`` is in seconds and becomes the ``Retry-After`` header.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def body(self) -> dict[str, dict[str, str]]:
        """Gives ``{"error": {"type", "code", "message"}}``, the shape of OpenAI's own errors."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"type": kind, "code": self.code, "message": self.message}}
