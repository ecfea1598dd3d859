"""What `chaos.py` breaks and what it is asked by: the app that gunicorn serves, and the model server.

    python -m benchmarks.chaos_servers

serves as a model server and prints its URL, then a line for each time that it is asked: when, by which message's
token, and as which assistant.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from assistream_flask.testing import OfflineServer, Reply, Request

from .chaos_checks import answer

_ASKED: Final = re.compile(r"#([a-z]+\d+) (\d+) words, one each ([\d.]+) s")
PLAIN: Final = ("a", "b")
LASTING: Final = ("c", "d")


def question(token: str, words: int, pace: float) -> str:
    """Give the message that is answered with so many words."""
    return f"#{token} {words} words, one each {pace} s"


def set_clock(path: Path) -> None:
    """Have ``time.time`` be wrong by as many seconds as the file says, as of its last change."""
    # libfaketime (0.9.10) refuses every time.sleep of Python 3.11 as soon as the monotonic clock is to stay as it is.
    right, known = time.time, [float("-inf"), 0.0]

    def wrong() -> float:
        if time.monotonic() - known[0] > 0.2:
            known[:] = time.monotonic(), float(path.read_text())
        return right() + known[1]

    time.time = wrong


def make_app() -> Any:
    """Give the app, for gunicorn: settings come in APP_CONFIG, the file with the clock's error in CLOCK."""
    set_clock(Path(os.environ["CLOCK"]))
    from flask import Flask, Response, jsonify, request

    from assistream_flask import Assistant, create_blueprint

    app = Flask("chaos")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    assistants = [Assistant(id, model=id) for id in PLAIN]
    assistants += [Assistant(id, model=id, background=True) for id in LASTING]
    app.register_blueprint(create_blueprint(assistants, owner=lambda: "me"), url_prefix="/assistream")

    @app.after_request
    def sign(response: Response) -> Response:
        response.headers["X-Pid"] = str(os.getpid())
        if request.blueprint and response.status_code < 500:
            response.headers["X-Worker"] = app.extensions["assistream"].runtime().worker
        return response

    @app.get("/page")
    def page() -> str:
        return "."

    @app.get("/state")
    def state() -> Response:
        runtime = app.extensions["assistream"].runtime()
        return jsonify(pid=os.getpid(), worker=runtime.worker, streams=runtime.open_streams)

    @app.get("/compute")
    def compute() -> str:
        end, number = time.monotonic() + float(request.args["seconds"]), 0
        while time.monotonic() < end:
            number += 1
        return str(number)

    return app


class Model:
    """Answers each message as it asks, and tells whoever asked."""

    def __init__(self) -> None:
        self._asks: Counter[tuple[str, str]] = Counter()
        self._guard = threading.Lock()

    def __call__(self, request: Request) -> Reply:
        token, words, pace = _ASKED.findall(" ".join(text for _, text in request.messages))[-1]
        with self._guard:
            ask = self._asks[token, request.model]
            self._asks[token, request.model] += 1
            print(time.time(), token, request.model, flush=True)
        return Reply(answer(token, request.model, ask, int(words)), delay=float(pace))


def main() -> None:
    """Serve until stdin ends."""
    with OfflineServer(Model(), keep=20_000) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
