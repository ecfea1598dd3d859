"""Joins the routes to a blueprint, and that to an app."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import cast

from flask import Blueprint, Flask, Response, current_app, request, send_from_directory
from flask.blueprints import BlueprintSetupState
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException, NotFound

from ..errors import ConfigurationError, RequestError
from ..extension import Adopt, Assistants, Assistream, Client, Registration, current_assistream, register
from ..fast import switches
from ..log.protocol import LogUnavailableError
from ..platform import gunicorn
from ..settings import Settings, check_names
from ..store import database
from . import answers, doctor, routes_events, routes_runs, routes_threads, routes_tools
from .auth import Call, check_server, route


def create_blueprint(
    assistants: Assistants,
    *,
    owner: Callable[[], str | None] | None = None,
    client: Client | None = None,
    adopt: Adopt | None = None,
    name: str = "assistream",
    read: str = "bytes",
) -> Blueprint:
    """Give the blueprint to register in an app, under any ``url_prefix``.

    ``assistants`` is a list, or a callable that gives the list for the current request. ``owner`` names the
    caller of the current request by a text, a whole number or a UUID (``None``: nobody, answered 401), and is asked
    again while an event stream is open; without it a random id in Flask's signed session does, which needs
    ``SECRET_KEY``. ``client`` is an ``openai.OpenAI``, or a callable that makes one in the worker; without it
    ``OpenAI()``, so ``OPENAI_API_KEY`` and ``OPENAI_BASE_URL`` count. ``adopt`` takes the id of an assistant and the
    name of a thread's owner, and give the assistant, or ``None``: a worker asks it, in the app's context but without a
    request, where it goes on with another worker's run, for an id that no list has. Registered under two names, the two
    share nothing.

    ``read="sdk"`` asks with the client as it is given, and iterates over the SDK's own streams, so that tracing that is
    wrapped around a client or the SDK, as OpenTelemetry's is, sees whole answers; that costs many times what reading
    their bytes does. The client must not try again by itself: ``OpenAI(max_retries=0)``.

    Raises :class:`ConfigurationError`, here or at registration.
    """
    blueprint = Blueprint(name, __name__, cli_group="assistream")
    blueprint.cli.command("doctor")(doctor.command(lambda: _patient(current_assistream)))
    blueprint.record(lambda setup: _register(setup, Registration(assistants, owner, client, adopt, read)))
    blueprint.register_error_handler(RequestError, answers.request_error)
    blueprint.register_error_handler(HTTPException, answers.http_error)
    blueprint.register_error_handler(SQLAlchemyError, answers.store_error)
    blueprint.register_error_handler(LogUnavailableError, answers.log_error)
    blueprint.register_error_handler(Exception, answers.unexpected)
    # For what answers.json_answer has not made: Flask's own OPTIONS, what has no body, and an app's abort(response).
    blueprint.after_request(answers.private)
    blueprint.teardown_request(routes_events.let_go)
    for endpoint, file in (("helper", "assistream.js"), ("helper_min", "assistream.min.js")):
        blueprint.add_url_rule(f"/{file}", endpoint, _helper, defaults={"file": file})
    blueprint.add_url_rule("/assistants", "assistants", route(_assistants))
    blueprint.add_url_rule("/threads", "create_thread", route(routes_threads.create_thread), methods=["POST"])
    blueprint.add_url_rule("/threads", "threads", route(routes_threads.threads))
    thread = "/threads/<thread_id>"
    blueprint.add_url_rule(thread, "delete_thread", route(routes_threads.delete_thread), methods=["DELETE"])
    blueprint.add_url_rule(f"{thread}/messages", "messages", route(routes_threads.messages))
    blueprint.add_url_rule(f"{thread}/messages", "add_message", route(routes_threads.add_message), methods=["POST"])
    blueprint.add_url_rule(f"{thread}/runs", "create_runs", route(routes_runs.create_runs), methods=["POST"])
    blueprint.add_url_rule(f"{thread}/runs/<run_id>/cancel", "cancel", route(routes_runs.cancel), methods=["POST"])
    run = f"{thread}/runs/<run_id>"
    for rule, endpoint, view in (
        ("submit_tool_outputs", "submit_tool_outputs", routes_tools.submit_tool_outputs),
        ("approvals", "approvals", routes_tools.approvals),
        ("tool_calls/<call_id>/claim", "claim", routes_tools.claim),
    ):
        blueprint.add_url_rule(f"{run}/{rule}", endpoint, route(view), methods=["POST"])
    blueprint.add_url_rule(f"{thread}/events", "events", route(routes_events.events, is_crowded=True))
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
    check_names(app.config)
    settings = Settings.read(app.config)
    switches.wanted(settings.fast)
    state.slow_seconds = settings.slow_seconds
    if settings.database_url:
        database.check(settings.database_url)
    if not settings.redis_url:
        gunicorn.check_alone()
    state.begin()
    if setup.url_prefix and setup.url_prefix != "/":
        # Below a prefix of our own every path is ours, and what the router refuses there is JSON too.
        fixed = re.split("<[^>]*>", setup.url_prefix.rstrip("/") + "/")
        below = re.compile("[^/]+".join(map(re.escape, fixed)))
        app.before_request(lambda: answers.refused(below))


def _helper(file: str, **_: str) -> Response:
    response = send_from_directory(os.path.join(os.path.dirname(os.path.dirname(__file__)), "static"), file)
    response.mimetype = "text/javascript"
    return cast(Response, answers.Answer.force_type(response))


def _assistants(call: Call) -> Response:
    return answers.json_answer({"data": [assistant.public() for assistant in call.part.assistants().values()]})


def _patient(state: Assistream) -> doctor.Patient:
    """Give what the doctor looks at."""
    has_logins = hasattr(current_app, "login_manager")
    return doctor.Patient(state.settings(), state.parts, current_app.secret_key, state.patched, has_logins=has_logins)


def _doctor(**_: str) -> Response:
    if key := request.headers.get(doctor.HEADER):
        check_server()
        runtime = current_assistream.runtime()
        if doctor.admitted(runtime.store, key):
            patient = _patient(current_assistream)._replace(
                health=doctor.Health(runtime.longest_pause(), runtime.leases.skew, runtime.runner.executions.abandoned)
            )
            frames = doctor.frames(request.environ, request.host, patient)
            return Response(frames, headers=doctor.headers())
    raise NotFound(answers.NOTHING)
