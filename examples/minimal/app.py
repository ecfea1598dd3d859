"""The smallest chat on assistream: one assistant, one page. In the repository's folder:

    .venv/bin/gunicorn examples.minimal.app:app

With OPENAI_API_KEY in the environment a real model answers, without it an offline one.
"""

from __future__ import annotations

import os

from flask import Flask, Response, send_from_directory
from openai import OpenAI

from assistream_flask import Assistant, create_blueprint
from assistream_flask.testing import OfflineServer


def client() -> OpenAI:
    """Make the client in the worker, at its first run: a server that was started at import would not survive the
    fork."""
    return OpenAI() if os.environ.get("OPENAI_API_KEY") else OfflineServer(delay=0.03).start().client()


app = Flask(__name__)
secret = os.environ.get("SECRET_KEY")
app.config.update(
    # It signs the cookie that says whose threads these are.
    SECRET_KEY=secret or "only to try it out",
    SESSION_COOKIE_SAMESITE="Lax",
    # Where it is only tried out there is no HTTPS, and Safari would not take the cookie.
    SESSION_COOKIE_SECURE=secret is not None,
)
app.register_blueprint(
    create_blueprint([Assistant("tutor", model="gpt-6-luna", instructions="Explain step by step.")], client=client),
    url_prefix="/assistream",
)


@app.get("/")
def page() -> Response:
    """Serve the page."""
    return send_from_directory(app.root_path, "index.html")
