"""Who calls, whether the server can serve them, and whether the thread is theirs: what comes before each route."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import NamedTuple

from flask import Response, current_app, request, session

from ..errors import RequestError
from ..extension import SESSION_KEY, Registration, current_assistream
from ..platform import gunicorn
from ..runs.runtime import Runtime
from ..runs.service import Service
from ..store.sql import Owner
from . import validation
from .answers import throttle

_log = logging.getLogger(__name__)


class Call(NamedTuple):
    """The current request's part, runtime, service and caller."""

    part: Registration
    runtime: Runtime
    service: Service
    owner: Owner | None


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
        call = Call(part, runtime, Service(runtime, part.listed), _caller(part, request.blueprint or ""))
        if "thread_id" not in path:
            return view(call)
        # A crowd of viewers leaves connections to the database, and the processor, to commands.
        with runtime.arrivals() if is_crowded else nullcontext():
            thread = call.service.open(call.owner, path["thread_id"])
        return view(call, thread, **{key: path[key] for key in ("run_id",) if key in path})

    return checked


def check_server() -> None:
    """Refuse what would fail in silence, and say so in the log too."""
    fix = gunicorn.unfit(request.environ, bool(current_app.config.get("ASSISTREAM_REDIS_URL")))
    if fix is not None:
        throttle().warn(_log, "assistream cannot serve as the server runs: %s", fix[1], level=logging.ERROR)
        # Not 503: trying again does not help.
        raise RequestError(500, fix[0], f"This server is not set up for event streams. {fix[1]}")


def _caller(part: Registration, scope: str) -> Owner | None:
    name = part.caller()
    if name is None and part.owner is not None:
        raise RequestError(401, "unauthenticated", "This app does not know who you are. Sign in first.")
    return None if name is None else Owner(scope, name)


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
    session[SESSION_KEY] = secrets.token_hex(16)
    return Owner(request.blueprint or "", call.part.caller() or "")
