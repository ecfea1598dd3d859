"""Routes, request checks and ownership. Beside the extension, the only module that imports Flask."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, Final, NamedTuple, cast

from flask import Blueprint, Flask, Response, current_app, g, request, send_from_directory, session
from flask.blueprints import BlueprintSetupState
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from .. import events, sse
from ..errors import AssistreamError, ConfigurationError, RequestError
from ..events import Json
from ..extension import (
    SESSION_KEY,
    Adopt,
    Assistants,
    Assistream,
    Client,
    Registration,
    current_assistream,
    register,
)
from ..fast import direct_send
from ..log.protocol import EventId, LogUnavailableError
from ..platform import gunicorn
from ..platform.log_throttle import LogThrottle
from ..runs import values
from ..runs.executor import Started
from ..runs.runtime import Runtime
from ..runs.service import OwnedThread, RunCommand, Service
from ..settings import Settings
from ..store import database
from ..store.sql import Answer, AnsweredBefore, Owner
from . import doctor, event_streams, validation
from .event_response import relay

_log = logging.getLogger(__name__)

_NOTHING: Final = "There is nothing at this address. assistream's README says where all routes are listed."


def create_blueprint(
    assistants: Assistants,
    *,
    owner: Callable[[], str | None] | None = None,
    client: Client | None = None,
    adopt: Adopt | None = None,
    name: str = "assistream",
) -> Blueprint:
    """Gives the blueprint to register in an app, under any ``url_prefix``.

    ``assistants`` is a list, or a callable that gives the list for the current request. ``owner`` names the
    caller of the current request (``None``: nobody, answered 401); without it a random id in Flask's signed
    session does, which needs ``SECRET_KEY``. ``client`` is an ``openai.OpenAI``, or a callable that makes one in
    the worker; without it ``OpenAI()``, so ``OPENAI_API_KEY`` and ``OPENAI_BASE_URL`` count. ``adopt`` takes the id of
    an assistant and the name of a thread's owner, and gives the assistant, or ``None``: a worker asks it, in the app's
    context but without a request, where it goes on with another worker's run, for an id that no list has. Registered
    under two names, the two share nothing.

    Raises :class:`ConfigurationError`, here or at registration.
    """
    blueprint = Blueprint(name, __name__, cli_group="assistream")
    blueprint.cli.command("doctor")(doctor.command(lambda: _patient(current_assistream)))
    blueprint.record(lambda setup: _register(setup, Registration(assistants, owner, client, adopt)))
    blueprint.register_error_handler(RequestError, _request_error)
    blueprint.register_error_handler(HTTPException, _http_error)
    blueprint.register_error_handler(SQLAlchemyError, _store_error)
    blueprint.register_error_handler(LogUnavailableError, _log_error)
    blueprint.register_error_handler(Exception, _unexpected)
    blueprint.teardown_request(_let_go)
    for endpoint, file in (("helper", "assistream.js"), ("helper_min", "assistream.min.js")):
        blueprint.add_url_rule(f"/{file}", endpoint, _helper, defaults={"file": file})
    blueprint.add_url_rule("/assistants", "assistants", _route(_assistants))
    blueprint.add_url_rule("/threads", "create_thread", _route(_create_thread), methods=["POST"])
    blueprint.add_url_rule("/threads", "threads", _route(_threads))
    thread = "/threads/<thread_id>"
    blueprint.add_url_rule(thread, "delete_thread", _route(_delete_thread), methods=["DELETE"])
    blueprint.add_url_rule(f"{thread}/messages", "messages", _route(_messages))
    blueprint.add_url_rule(f"{thread}/messages", "add_message", _route(_add_message), methods=["POST"])
    blueprint.add_url_rule(f"{thread}/runs", "create_runs", _route(_create_runs), methods=["POST"])
    blueprint.add_url_rule(f"{thread}/runs/<run_id>/cancel", "cancel", _route(_cancel), methods=["POST"])
    blueprint.add_url_rule(f"{thread}/events", "events", _route(_events))
    blueprint.add_url_rule("/doctor", "doctor", _doctor)
    return blueprint


def _register(setup: BlueprintSetupState, part: Registration) -> None:
    app = cast(Flask, setup.app)
    if part.owner is None and not app.secret_key:
        raise ConfigurationError(
            "nothing names the caller: set app.config['SECRET_KEY'] to a long random string before "
            "register_blueprint, or pass create_blueprint(..., owner=callable)"
        )
    state = register(app, f"{setup.name_prefix}.{setup.name}".lstrip("."), part)
    # What cannot work is told now, not to the first visitor.
    settings = Settings.read(app.config)
    if settings.database_url:
        database.check(settings.database_url)
    if not settings.redis_url:
        gunicorn.check_alone()
    state.begin()
    if setup.url_prefix and setup.url_prefix != "/":
        # Below a prefix of our own every path is ours, and what the router refuses there is JSON too.
        fixed = re.split("<[^>]*>", setup.url_prefix.rstrip("/") + "/")
        below = re.compile("[^/]+".join(map(re.escape, fixed)))
        app.before_request(lambda: _refused(below))


class _Call(NamedTuple):
    """The current request's part, runtime, service and caller."""

    part: Registration
    runtime: Runtime
    service: Service
    owner: Owner | None


def _route(view: Callable[..., Response]) -> Callable[..., Response]:
    """What every route checks before it does anything."""

    @wraps(view)
    def checked(**path: str) -> Response:
        _check_server()
        state = current_assistream
        part = state.parts[request.blueprint or ""]
        if request.method not in ("GET", "HEAD"):
            allowed = state.runtime().settings.allowed_origins.split()
            validation.same_origin(request.headers.get("Origin"), request.host, allowed)
        runtime = state.runtime()
        call = _Call(part, runtime, Service(runtime, part.listed), _caller(part, request.blueprint or ""))
        if "thread_id" not in path:
            return view(call)
        # A crowd of viewers leaves connections to the database, and the processor, to commands.
        with runtime.arrivals() if view is _events else nullcontext():
            thread = call.service.open(call.owner, path["thread_id"])
        return view(call, thread, **{key: path[key] for key in ("run_id",) if key in path})

    return checked


def _check_server() -> None:
    """Refuses what would fail in silence, and says so in the log too."""
    fix = gunicorn.unfit(request.environ, bool(current_app.config.get("ASSISTREAM_REDIS_URL")))
    if fix is not None:
        _complaints().warn(_log, "assistream cannot serve as the server runs: %s", fix[1], level=logging.ERROR)
        # Not 503: trying again does not help.
        raise RequestError(500, fix[0], f"This server is not set up for event streams. {fix[1]}")


def _caller(part: Registration, scope: str) -> Owner | None:
    name = part.caller()
    if name is None and part.owner is not None:
        raise RequestError(401, "unauthenticated", "This app does not know who you are. Sign in first.")
    return None if name is None else Owner(scope, name)


def _someone(call: _Call) -> Owner:
    """The caller, who is given a name where the session is to have one."""
    if call.owner is not None:
        return call.owner
    session[SESSION_KEY] = secrets.token_hex(16)
    return Owner(request.blueprint or "", session[SESSION_KEY])


# Errors


def _complaints() -> LogThrottle:
    return current_assistream.complaints


def _request_error(error: RequestError) -> Response:
    response = _json(error.body(), error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _http_error(error: HTTPException) -> Response:
    if error.response is not None:
        # The app's own abort(response), in its owner= say.
        return cast(Response, error.response)
    status = error.code or 500
    names = {401: "unauthenticated", 404: "not_found", 405: "method_not_allowed"}
    response = _json(RequestError(status, names.get(status, "invalid_request"), error.description or "").body(), status)
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(error.valid_methods)
    return response


def _store_error(error: SQLAlchemyError) -> Response:
    _complaints().error(_log, error, "the store failed")
    return _away("store_unavailable", "The database")


def _log_error(error: LogUnavailableError) -> Response:
    return _away("log_unavailable", "The event log", str(error))


def _away(code: str, what: str, why: str = "") -> Response:
    said = f"{what} cannot be used: {why}." if why else f"{what} cannot be reached. Try again."
    return _request_error(RequestError(503, code, said, retry_after=2))


def _unexpected(error: Exception) -> Response:
    if isinstance(error, AssistreamError):
        _complaints().warn(_log, "assistream cannot work as it is configured: %s", error, level=logging.ERROR)
    else:
        _complaints().error(_log, error, "a request failed")
    return _json(RequestError(500, "server_error", "Something failed on the server. Try again.").body(), 500)


def _refused(below: re.Pattern[str]) -> Response | None:
    """The router refuses before it knows of a blueprint, so no error handler of ours would be asked."""
    error = request.routing_exception
    if error is None or (error.code or 500) < 400 or not below.match(request.path):
        return None
    if isinstance(error, MethodNotAllowed):
        allowed = sorted(error.valid_methods or ())
        use = " or ".join(one for one in allowed if one not in ("HEAD", "OPTIONS"))
        error = MethodNotAllowed(allowed, f"Use {use} here.")
    elif isinstance(error, NotFound):
        error = NotFound(_NOTHING)
    return _http_error(error)


# Bodies and answers


def _json(value: object, status: int = 200) -> Response:
    response = Response(events.dumps(value) + "\n", status, mimetype="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response


def _body(runtime: Runtime, allowed: Sequence[str], required: Sequence[str] = ()) -> Json:
    # Twelve bytes a character is JSON's longest escape: a surrogate pair.
    limit = runtime.settings.max_message_chars * 12 + 65_536
    request.max_content_length = limit + 1
    try:
        raw = request.get_data(cache=True)
        # One without Content-Length is cut there, in silence.
        if len(raw) > limit:
            raise RequestEntityTooLarge
    except RequestEntityTooLarge:
        raise RequestError(
            413, "message_too_long", f"The body has more than the {limit} bytes that are allowed. Send a shorter one."
        ) from None
    return validation.body(raw, request.mimetype, allowed, required)


def _argument(name: str) -> str | None:
    try:
        return request.args.get(name)
    except UnicodeDecodeError:
        raise values.invalid("The query is not UTF-8. Percent-encode it.") from None


def _page() -> tuple[int, str | None]:
    """Read which page is asked for: its length, and the id that it comes before."""
    return validation.limit(_argument("limit")), _argument("before")


class _Once:
    """The request's Idempotency-Key: the same key and request get the first answer again.

    https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    """

    def __init__(self, call: _Call, owner: Owner) -> None:
        self._store, self._owner = call.runtime.store, owner
        self.key = validation.idempotency_key(request.headers.get("Idempotency-Key"))
        body = request.get_data(cache=True)
        # The part of the path that names the route and its objects; a prefix may change.
        route = json.dumps([request.endpoint, request.view_args])
        self._fingerprint = hashlib.sha256(route.encode() + b"\n" + body).hexdigest()

    def before(self) -> Answer | None:
        """Gives the first answer, where there is one. Raises :class:`RequestError` for a key used otherwise."""
        answer = self._store.answer(self._owner, self.key) if self.key else None
        if answer is not None and answer.fingerprint != self._fingerprint:
            raise RequestError(
                422, "idempotency_key_reused", "This Idempotency-Key was used for another request. Use a new one."
            )
        return answer

    def answer(self, status: int, body: Json, place: str | None = None, thread_id: str | None = None) -> Answer | None:
        """Gives what to store with the change that the request makes, to the thread that its path names or
        ``thread_id``."""
        thread_id = thread_id or (request.view_args or {}).get("thread_id")
        return Answer(self.key, self._fingerprint, status, body, place, thread_id) if self.key else None


# Routes


def _helper(file: str, **_: str) -> Response:
    response = send_from_directory(os.path.join(os.path.dirname(os.path.dirname(__file__)), "static"), file)
    response.mimetype = "text/javascript"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _assistants(call: _Call) -> Response:
    return _json({"data": [assistant.public() for assistant in call.part.assistants().values()]})


def _create_thread(call: _Call) -> Response:
    body = _body(call.runtime, ["metadata"])
    owner = _someone(call)
    once = _Once(call, owner)
    thread = call.service.new_thread(body.get("metadata"))
    answer = once.before()
    if answer is None:
        try:
            call.service.create_thread(owner, thread, once.answer(201, thread, thread_id=thread["id"]))
        except AnsweredBefore:
            answer = once.before()
    return _json(answer.body if answer else thread, 201)


def _threads(call: _Call) -> Response:
    # A page asks this first: naming the caller here keeps two first commands at once from making two callers.
    data, has_more = call.service.threads(_someone(call), *_page())
    return _json({"data": data, "has_more": has_more})


def _delete_thread(call: _Call, thread: OwnedThread) -> Response:
    thread.delete()
    return Response(status=204)


def _messages(call: _Call, thread: OwnedThread) -> Response:
    data, has_more, place = thread.messages(*_page())
    response = _json({"data": data, "has_more": has_more})
    response.headers["Last-Event-ID"] = str(place)
    return response


def _add_message(call: _Call, thread: OwnedThread) -> Response:
    body = _body(call.runtime, ["content"], ["content"])
    given = _start(call, thread, thread.message(body["content"]), 201, lambda started: started.message or {})
    return _json(given.body, 201)


def _create_runs(call: _Call, thread: OwnedThread) -> Response:
    body = _body(call.runtime, ["assistant_ids", "content", "mode"], ["assistant_ids"])
    command = thread.runs(body["assistant_ids"], body.get("content"), body.get("mode", "parallel"))

    def start() -> Answer:
        return _start(call, thread, command, 202, lambda started: {"message": started.message, "runs": started.runs})

    def follow(send: event_streams.Send) -> event_streams.Frames:
        given = start()
        message = given.body["message"]
        runs = {run["id"] for run in given.body["runs"]}
        message_id = message["message"]["id"] if message else None
        return event_streams.follow(call.runtime, thread.id, message_id, runs, EventId.parse(given.place), send)

    if any(kind.lower() == "text/event-stream" and quality for kind, quality in request.accept_mimetypes):
        return _streamed(call, follow)
    return _json(start().body, 202)


def _start(
    call: _Call, thread: OwnedThread, command: RunCommand, status: int, body: Callable[[Started], Json]
) -> Answer:
    """Stores and starts what the request asks for; gives the answer."""
    once = _Once(call, thread.owner)
    given = once.before()
    if given is not None:
        return given
    try:
        started = thread.start(command, lambda started: once.answer(status, body(started), str(started.place)))
    except AnsweredBefore:
        given = once.before()
        assert given is not None
        return given
    return Answer("", "", status, body(started), str(started.place))


def _cancel(call: _Call, thread: OwnedThread, run_id: str) -> Response:
    _body(call.runtime, [])
    once = _Once(call, thread.owner)
    given = once.before()
    if given is None:
        run = thread.cancel(run_id)
        given = once.answer(202, run) or Answer("", "", 202, run)
        if once.key:
            try:
                call.runtime.store.remember(thread.owner, given)
            except AnsweredBefore:
                given = once.before() or given
    return _json(given.body, 202)


def _patient(state: Assistream) -> doctor.Patient:
    """Give what the doctor looks at."""
    return doctor.Patient(state.settings(), state.parts, current_app.secret_key, state.patched)


def _doctor(**_: str) -> Response:
    if key := request.headers.get(doctor.HEADER):
        _check_server()
        runtime = current_assistream.runtime()
        if doctor.admitted(runtime.store, key):
            patient = _patient(current_assistream)._replace(
                health=doctor.Health(runtime.longest_pause(), runtime.leases.skew)
            )
            frames = doctor.frames(request.environ, request.host, patient)
            return Response(frames, headers=doctor.headers())
    raise NotFound(_NOTHING)


# Streams


def _events(call: _Call, thread: OwnedThread) -> Response:
    asked = request.headers.get("Last-Event-ID") or _argument("last_event_id")
    return _streamed(
        call, lambda send: event_streams.view(call.runtime, thread.id, EventId.parse(asked), send), begin=True
    )


def _streamed(
    call: _Call, start: Callable[[event_streams.Send], event_streams.Frames], begin: bool = False
) -> Response:
    """Answers with a stream; one that is to ``begin`` before the headers can still be answered with an error."""
    runtime, settings = call.runtime, call.runtime.settings
    if request.method == "HEAD":
        return Response(headers=sse.HEADERS)
    if runtime.stopping.is_set():
        raise RequestError(503, "shutting_down", "The server restarts. Try again.", retry_after=1)
    if runtime.full():
        raise RequestError(503, "server_full", "The server has too many event streams open. Try again.", retry_after=5)
    if not runtime.enter_stream(call.owner):
        fix = f"You may have {settings.max_streams} event streams open. Close one, such as a tab."
        raise RequestError(429, "too_many_streams", fix, retry_after=5)
    try:
        # Given up just before the second heartbeat after the first one that was not acknowledged.
        peer = direct_send.ViewerConnection(request.environ, settings.slow_seconds, 0.9 * settings.heartbeat_seconds)
        stream = start(peer.send)
        first = next(stream) if begin else b""
    except BaseException:
        runtime.leave_stream(call.owner)
        raise
    g.assistream_body = direct_send.Body(first, stream, peer, lambda: runtime.leave_stream(call.owner))
    return _Streamed(g.assistream_body, headers=sse.HEADERS)


def _let_go(error: BaseException | None) -> None:
    """Closes the body of a request that failed after its view, say in the app's ``after_request``: no server has it."""
    body = g.pop("assistream_body", None)
    if error is not None and body is not None:
        body.close()


class _Streamed(Response):
    def __call__(self, environ: Any, start_response: Any) -> Any:
        try:
            return direct_send.given(super().__call__(environ, start_response), self.response)
        except BaseException:
            self.close()
            raise


def event_response(stream: Any, *, heartbeat_seconds: float = 15) -> Response:
    """Gives a Flask response that streams any OpenAI iterator as events of the vocabulary.

    ``stream`` is what ``client.responses.create(..., stream=True)``, ``client.chat.completions.create(...,
    stream=True)`` or an Assistants run with ``stream=True`` gives, or an iterator of its events. Heartbeats go out
    while it is silent, it is closed when the client leaves, and the last frame is ``event: done``.

    Raises ``TypeError`` for what is no such iterator, an async one included.
    """
    return Response(relay(stream, heartbeat_seconds), headers=sse.HEADERS)
