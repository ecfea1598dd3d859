"""JSON in and out: a request's body and query, the answers, and what becomes of errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, cast

from flask import Response, request
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from .. import events
from ..errors import AssistreamError, RequestError
from ..events import Json
from ..extension import current_assistream
from ..log.protocol import LogUnavailableError
from ..platform import connection, gunicorn
from ..platform.log_throttle import LogThrottle
from ..runs import values
from ..runs.runtime import Runtime
from . import addresses, validation

_log = logging.getLogger(__name__)

NOTHING: Final = "There is nothing at this address. assistream's README says where all routes are listed."


class Answer(Response):
    """An answer whose reader is cut off where they take nothing of it for ``ASSISTREAM_SLOW_SECONDS``."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Give the server the body, as any WSGI app does."""
        seconds = current_assistream.slow_seconds
        return connection.TimedBody(environ, super().__call__(environ, start_response), seconds)


def json_answer(value: object, status: int = 200) -> Response:
    """Answer with ``value`` as JSON, which nothing on the way may keep."""
    return private(Answer(events.dumps(value) + "\n", status, mimetype="application/json"))


def private(response: Response) -> Response:
    """Have nobody keep ``response``, or take it for another type, where it does not say otherwise itself."""
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    return response


def read_body(runtime: Runtime, allowed: Sequence[str], required: Sequence[str] = ()) -> Json:
    """Read the request's body, a JSON object with no fields but the ``allowed`` and all that are ``required``. Raises
    :class:`RequestError` for any other, and for one that does not come within ``ASSISTREAM_BODY_SECONDS``."""
    # Twelve bytes a character is JSON's longest escape: a surrogate pair.
    limit = runtime.settings.max_message_chars * 12 + 65_536
    request.max_content_length = limit + 1
    seconds = runtime.settings.body_seconds
    begin = partial(runtime.bodies.begin, addresses.origin(request.environ).address)
    try:
        with connection.read_within(request.environ, seconds, begin):
            raw = request.get_data(cache=True)
        # One without Content-Length is cut there, in silence.
        if len(raw) > limit:
            raise RequestEntityTooLarge
    except TimeoutError:
        raise RequestError(
            408,
            "body_too_slow",
            f"The body did not come whole within {seconds:g} s, or before many others from your address. "
            "Send the request again.",
        ) from None
    except gunicorn.malformed():
        raise RequestError(
            400, "invalid_json", "The body's chunks are not as HTTP has them. Send a JSON object with Content-Length."
        ) from None
    except RequestEntityTooLarge:
        raise RequestError(
            413, "message_too_long", f"The body has more than the {limit} bytes that are allowed. Send a shorter one."
        ) from None
    return validation.body(raw, request.mimetype, allowed, required)


def argument(name: str) -> str | None:
    """Read an argument of the query, ``None`` where there is none. Raise :class:`RequestError` for what is no UTF-8."""
    try:
        return request.args.get(name)
    except UnicodeDecodeError:
        raise values.invalid("The query is not UTF-8. Percent-encode it.") from None


def page() -> tuple[int, str | None]:
    """Read which page is asked for: its length, and the id that it comes before."""
    return validation.limit(argument("limit")), argument("before")


# Errors


def throttle() -> LogThrottle:
    """Give the app's own throttle for what fails over and over."""
    return current_assistream.throttle


def request_error(error: RequestError) -> Response:
    """Answer with what is wrong with the request, in the shape of OpenAI's own errors."""
    response = json_answer(error.body(), error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def http_error(error: HTTPException) -> Response:
    """Answer with an error of werkzeug's, or of the app's ``abort()``, as JSON too."""
    if error.response is not None:
        # The app's own abort(response), in its owner= say.
        return cast(Response, error.response)
    status = error.code or 500
    names = {401: "unauthenticated", 404: "not_found", 405: "method_not_allowed"}
    response = json_answer(
        RequestError(status, names.get(status, "invalid_request"), error.description or "").body(), status
    )
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(error.valid_methods)
    return response


def store_error(error: SQLAlchemyError) -> Response:
    """Answer 503: the database is away."""
    throttle().error(_log, error, "the store failed")
    return _away("store_unavailable", "The database")


def log_error(error: LogUnavailableError) -> Response:
    """Answer 503: the event log is away, or refuses what is asked of it."""
    return _away("log_unavailable", "The event log", str(error))


def _away(code: str, what: str, why: str = "") -> Response:
    said = f"{what} cannot be used: {why}." if why else f"{what} cannot be reached. Try again."
    return request_error(RequestError(503, code, said, retry_after=2))


def unexpected(error: Exception) -> Response:
    """Answer 500 and tell nothing of what happened, which is for the server's log."""
    if isinstance(error, AssistreamError):
        throttle().warn(_log, "assistream cannot work as it is configured: %s", error, level=logging.ERROR)
    else:
        throttle().error(_log, error, "a request failed")
    return json_answer(RequestError(500, "server_error", "Something failed on the server. Try again.").body(), 500)


def refused(below: re.Pattern[str]) -> Response | None:
    """Answer what the router refuses before it knows of a blueprint: no error handler of ours would be asked."""
    error = request.routing_exception
    if error is None or (error.code or 500) < 400 or not below.match(request.path):
        return None
    if isinstance(error, MethodNotAllowed):
        allowed = sorted(error.valid_methods or ())
        use = " or ".join(one for one in allowed if one not in ("HEAD", "OPTIONS"))
        error = MethodNotAllowed(allowed, f"Use {use} here.")
    elif isinstance(error, NotFound):
        error = NotFound(NOTHING)
    return http_error(error)
