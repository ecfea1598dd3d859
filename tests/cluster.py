"""Several gunicorn workers on one Redis and one database, and a model server of their own beside them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gunicorn_server import Gunicorn
from tests.redis_server import RedisServer

APP = """
import json, os, time
from flask import Flask, jsonify, request
from openai import OpenAI
from assistream_flask import Assistant, create_blueprint

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", **json.loads(os.environ["APP_CONFIG"]))
assistants = [
    Assistant("tutor", model="m"), Assistant("critic", model="m"),
    Assistant("lasting", model="m", background=True), Assistant("lasting2", model="m", background=True),
]
app.register_blueprint(
    create_blueprint(assistants, client=lambda: OpenAI(base_url=os.environ["MODEL_URL"], api_key="k"),
                     owner=lambda: request.headers.get("X-Caller", "me")),
    url_prefix="/assistream",
)

@app.get("/page")
def page():
    return "<!doctype html><title>test</title>"

@app.get("/pid")
def pid():
    return jsonify(os.getpid())

@app.get("/compute/<int:seconds>")
def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
    return jsonify(os.getpid())
"""


class Cluster:
    """Gunicorns that share everything; each connection lands on whichever worker is free."""

    def __init__(
        self,
        folder: Path,
        redis: RedisServer,
        database_url: str,
        *,
        gunicorns: int = 1,
        workers: int = 3,
        delay: float = 0.02,
        options: list[str] | None = None,
        model_url: str | None = None,
        app: str = APP,
        **settings: Any,
    ) -> None:
        """``model_url`` is of a model server that runs already; else there is one that waits ``delay`` a token."""
        self.redis = redis
        self._folder, self._delay, self._model_url = folder, delay, model_url
        settings = {"redis_url": redis.url, "database_url": database_url, "max_runs": 10_000, **settings}
        self.gunicorns = [
            Gunicorn(self._made(folder / f"g{at}"), app=app, workers=workers, options=options, **settings)
            for at in range(gunicorns)
        ]
        self._begun: list[Gunicorn] = []
        self._ends = contextlib.ExitStack()

    @staticmethod
    def _made(folder: Path) -> Path:
        folder.mkdir()
        return folder

    def start(self) -> None:
        """Start the model server, then the gunicorns."""
        model_url = self._model_url or self._start_model()
        for gunicorn in self.gunicorns:
            gunicorn.env["MODEL_URL"] = model_url
            self._begun.append(gunicorn)
            gunicorn.start()

    def _start_model(self) -> str:
        command = [sys.executable, "-m", "assistream_flask.testing", "--port", "0", "--delay", str(self._delay)]
        model = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        # Leaving it closes the pipe, and waits.
        self._ends.enter_context(model)
        self._ends.callback(model.send_signal, signal.SIGTERM)
        assert model.stdout is not None
        for line in model.stdout:
            if found := re.search(r"http://[\d.:]+/v1", line):
                return found[0]
        raise AssertionError("the model server does not start")

    def workers(self) -> list[int]:
        """Give the pids of all workers."""
        return [pid for gunicorn in self.gunicorns for pid in gunicorn.workers()]

    def stop(self) -> None:
        for gunicorn in self._begun:
            if gunicorn.process.poll() is None:
                gunicorn.process.terminate()
        for gunicorn in self._begun:
            gunicorn.process.wait(40)
        self._ends.close()

    def log(self) -> str:
        """Give all that they have logged."""
        return "\n".join(gunicorn.log() for gunicorn in self.gunicorns)


@contextlib.contextmanager
def clustered(folder: Path, redis: RedisServer, database_url: str, **options: Any) -> Iterator[Cluster]:
    """Give a started cluster, ended whatever happens."""
    cluster = Cluster(folder, redis, database_url, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
