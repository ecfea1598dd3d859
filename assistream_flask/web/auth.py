"""Who calls, whether the server can serve them, and whether the thread is theirs: what comes before each route."""

from __future__ import annotations

import io
import logging
import secrets
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Final, NamedTuple

from flask import Response, current_app, request, session
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException

from ..errors import RequestError
from ..extension import SESSION_KEY, Registration, current_assistream
from ..platform import gunicorn, threaded
from ..runs.runtime import Runtime
from ..runs.service import Service
from ..store.sql import Owner
from . import addresses, validation
from .answers import throttle

_log = logging.getLogger(__name__)


# The first request's own: what reads its body and what was made of it.
_NOT_AGAIN: Final = {"wsgi.input", "werkzeug.request", "werkzeug.socket", "gunicorn.socket"}
_NO_ANSWER: Final = {429, 502, 503, 504}


class Call(NamedTuple):
    """The current request's part, runtime, service and caller, and the ``address`` that counts for limits, ``None``
    where none does."""

    part: Registration
    runtime: Runtime
    service: Service
    owner: Owner | None
    address: str | None = None


def route(view: Callable[..., Response], *, is_crowded: bool = False) -> Callable[..., Response]:
    """Check what every route checks before ``view`` does anything, whose thread it is about too.

    ``view`` takes the call, the thread that the path names, if it does, and the other ids of the path by name. One that
    ``is_crowded``, as viewers come to it all at once, looks that up a few at a time.
    """

    @wraps(view)
    def checked(**path: str) -> Response:
        check_server()
        state = current_assistream
        part = state.parts[request.blueprint or ""]
        if request.method not in ("GET", "HEAD"):
            allowed = state.runtime().settings.allowed_origins.split()
            validation.same_origin(request.headers.get("Origin"), request.host, allowed)
        runtime = state.runtime()
        address = _address(part)
        service = Service(runtime, part.listed, address)
        call = Call(part, runtime, service, _caller(part, request.blueprint or ""), address)
        if "thread_id" not in path:
            return view(call)
        # A crowd of viewers leaves connections to the database, and the processor, to commands.
        with runtime.arrivals() if is_crowded else nullcontext():
            thread = call.service.open(call.owner, path["thread_id"])
        return view(call, thread, **{key: path[key] for key in ("run_id", "call_id") if key in path})

    return checked


def _address(part: Registration) -> str | None:
    """Give the address that counts for who calls: without ``owner=`` anybody can be a new caller at each request. An
    app's own users are limited by their names, and thousands of them may sit behind one company's address."""
    if part.owner is not None:
        return None
    found = addresses.origin(request.environ)
    if found.is_a_proxys:
        current_assistream.warn_once(
            _log,
            "all visitors come from a proxy's address, %s, so limits for each address are off: %s",
            *(request.remote_addr, addresses.PROXY_FIX),
        )
    return found.address


def check_server() -> None:
    """Refuse what would fail in silence, and say so in the log too."""
    shared = bool(current_app.config.get("ASSISTREAM_REDIS_URL"))
    fix = gunicorn.unfit(request.environ, shared) or threaded.unfit(request.environ)
    if fix is not None:
        throttle().warn(_log, "assistream cannot serve as the server runs: %s", fix[1], level=logging.ERROR)
        # Not 503: trying again does not help.
        raise RequestError(500, fix[0], f"This server is not set up for event streams. {fix[1]}")


def _caller(part: Registration, scope: str) -> Owner | None:
    name = part.caller()
    if name is None and part.owner is not None:
        raise RequestError(401, "unauthenticated", "This app does not know who you are. Sign in first.")
    return None if name is None else Owner(scope, name)


def asking_again(call: Call) -> Callable[[], bool]:
    """Give what asks the app once more, as the present request did, whether ``call.owner`` is who calls.

    The app's ``before_request`` functions and ``owner=`` are asked, in a request of their own with the present one's
    headers. What is away then is no answer, and leaves things as they are.
    """
    app, scope, log_throttle = call.part.app, request.blueprint or "", throttle()
    environ = {key: value for key, value in request.environ.items() if key not in _NOT_AGAIN}

    def ask() -> bool:
        try:
            with app.request_context({**environ, "wsgi.input": io.BytesIO(), "CONTENT_LENGTH": "0"}):
                given = app.preprocess_request()
                if given is None:
                    return _caller(call.part, scope) == call.owner
                status = app.make_response(given).status_code
        except HTTPException as error:
            status = error.get_response().status_code
        except RequestError as error:
            status = error.status
        except (OSError, SQLAlchemyError) as error:
            log_throttle.error(_log, error, "it could not be asked who looks at an event stream")
            return True
        except Exception as error:
            log_throttle.error(_log, error, "an event stream ended, as asking who looks at it failed")
            return False
        return status in _NO_ANSWER

    return ask


def someone(call: Call) -> Owner:
    """Give the caller, who is given a name where the session is to have one. Raise :class:`RequestError` where a link,
    or another site's page, asks."""
    if call.owner is not None:
        return call.owner
    if request.headers.get("Sec-Fetch-Mode") == "navigate" or request.headers.get("Sec-Fetch-Site") == "cross-site":
        # No cookie that is SameSite=Strict comes along: a new session would take the place of the user's, and sign
        # them out.
        raise RequestError(
            401, "unauthenticated", "This address is for the app's own pages to ask. Open the app's page, not this one."
        )
    wait = 0 if call.address is None else call.runtime.sessions.take(call.address, 1)
    if wait:
        said = "Too many new visitors came from your address. Try again in a moment, and keep the cookie."
        raise RequestError(429, "too_many_sessions", said, retry_after=wait)
    session[SESSION_KEY] = secrets.token_hex(16)
    return Owner(request.blueprint or "", call.part.caller() or "")
