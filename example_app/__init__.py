"""A chat page on assistream: one Flask app, four assistants, no build step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from dotenv import load_dotenv
from flask import Flask, Response, make_response, render_template, request, session
from flask.sessions import SecureCookieSessionInterface
from openai import OpenAI

from assistream_flask import Assistant, create_blueprint

from .observatory import TOOLS

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Sessions(SecureCookieSessionInterface):
    def get_cookie_secure(self, app: Flask) -> bool:
        # Whoever tries it out over plain HTTP would have no session else; a proxy that ends TLS says so to gunicorn.
        return request.is_secure or super().get_cookie_secure(app)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    load_dotenv(Path.cwd() / ".env")
    offline = not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))

    app = Flask(__name__)
    app.session_interface = _Sessions()
    app.config.update(
        SESSION_COOKIE_NAME="assistream_example",
        SESSION_COOKIE_SAMESITE="Lax",
        # The owner of the threads is in the session, so it lives long. Refreshing it with every answer
        # would let a slow answer put back an older session; the page below refreshes it instead.
        PERMANENT_SESSION_LIFETIME=365 * 24 * 3600,
        SESSION_REFRESH_EACH_REQUEST=False,
    )
    # One of them is for this app alone.
    ours = (name for name in os.environ if name.startswith("ASSISTREAM_") and name != "ASSISTREAM_UPSTREAM")
    app.config.update({name: os.environ[name] for name in ours})
    app.config.update(config or {})
    app.secret_key = app.secret_key or os.environ.get("SECRET_KEY") or _kept_secret(Path(app.instance_path))

    app.register_blueprint(
        create_blueprint(_assistants(offline), client=_offline_client if offline else None),
        url_prefix="/assistream",
    )
    if offline:
        app.logger.warning(
            "No OPENAI_API_KEY: answers come from the offline assistant. Set it in .env for a real model."
        )

    @app.get("/")
    def page() -> Response:
        session.permanent = True
        night = date.today() + timedelta(14)
        response = make_response(render_template("index.html", offline=offline, night=night))
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        response.headers["Cache-Control"] = "no-cache"
        return response

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "no-referrer")
        return response

    return app


def _assistants(offline: bool) -> list[Assistant]:
    model = os.environ.get("OPENAI_MODEL") or "gpt-6-luna"
    upstream = os.environ.get("ASSISTREAM_UPSTREAM") or "responses"
    return [
        Assistant(
            "tutor",
            name="Tutor",
            description="Explains step by step, from what you know already",
            model=model,
            upstream=upstream,
            instructions=(
                "You are a patient tutor. Start from what the reader most likely knows, go one step at a time, "
                "use one concrete example, and end with a single question that checks understanding. "
                "Keep it under 250 words unless asked for more. Use Markdown sparingly."
            ),
        ),
        Assistant(
            "critic",
            name="Critic",
            description="Looks for the weak spot, and says what would fix it",
            model=model,
            upstream=upstream,
            instructions=(
                "You are a fair but demanding critic. Name the strongest point in one sentence, then the two or "
                "three weakest in order of importance, each with what would fix it. Question hidden assumptions, "
                "never the person. When another assistant has answered before you, review that answer. "
                "Keep it under 200 words."
            ),
        ),
        Assistant(
            "poet",
            name="Poet",
            description="Answers in a few lines of verse",
            model=model,
            upstream=upstream,
            instructions=(
                "You are a poet who answers in verse: four to twelve lines, concrete images, no clichés, rhyme "
                "only where it comes by itself. What you say must still answer the question truthfully. "
                "No title and no explanation."
            ),
        ),
        Assistant(
            "astronomer",
            name="Astronomer",
            description="Looks things up, and books the telescope once you allow it",
            model=model,
            upstream=upstream,
            instructions=(
                "You help visitors of a small observatory. Look up what you say of planets and moons instead of "
                "remembering it. Call tools at once where they help, several together where they do not depend on "
                "each other, and say in one to three sentences what came of it."
            ),
            tools=TOOLS,
        ),
    ]


def _offline_client() -> OpenAI:
    # Called in the worker, on the first run: a server started at import would not survive the fork.
    from assistream_flask.testing import OfflineServer, Reply, Request, scripted

    def answer(request: Request) -> Reply:
        # Two of them reason aloud, to show what the page does with it.
        reply, who = scripted(request), request.instructions or ""
        if "critic" in who:
            return replace(reply, reasoning="A claim, and what it takes for granted. Two doubts, and what is good.")
        return replace(reply, reasoning="My tools know that better than I do.") if reply.calls else reply

    return OfflineServer(answer, first_delay=0.6, delay=0.03).start().client()


def _kept_secret(folder: Path) -> str:
    """Give the key in the instance folder; made by whichever worker comes first, then read by all."""
    kept = folder / "secret_key"
    if not kept.exists():
        folder.mkdir(0o700, parents=True, exist_ok=True)
        mine = folder / f".secret_key.{os.getpid()}.{secrets.token_hex(4)}"
        with open(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            # A link, not a rename: it appears whole, and never replaces the key another worker put there.
            os.link(mine, kept)
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return kept.read_text()
