"""What `storm.py` attacks: the app that gunicorn serves, and the model server that answers well, slowly or badly.

python -m benchmarks.storm_servers PORT
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

from .hostile import CASES, make_bomb, send
from .stream_servers import Peer, Upstream

WORDS: Final = 40
MODELS: Final = {"chat": f"20:{WORDS}", "slow": "1:300", **{name: name for name in CASES}}
"""The model that each assistant asks."""


def make_app() -> Any:
    """Give the app, for gunicorn: settings come in APP_CONFIG. It names nobody, so whom it has are sessions."""
    from flask import Flask, Response, jsonify

    from assistream_flask import Assistant, create_blueprint

    app = Flask("storm")
    app.config.update(json.loads(os.environ["APP_CONFIG"]), SECRET_KEY="only for a benchmark")
    assistants = [Assistant(id, model=model) for id, model in MODELS.items()]
    app.register_blueprint(create_blueprint(assistants), url_prefix="/assistream")

    @app.get("/page")
    def page() -> str:
        return "."

    @app.get("/state")
    def state() -> Response:
        runtime = app.extensions["assistream"].runtime()
        return jsonify(streams=runtime.open_streams, runs=len(runtime.runner.active.all()))

    return app


class _Model(Upstream):
    """Leaves hostile answers to a process each, so that they hold up no others."""

    def answer(self, fd: int, peer: Peer) -> None:
        if peer.model not in CASES:
            super().answer(fd, peer)
            return
        with self.give(fd) as connection:
            if os.fork() == 0:
                os.nice(5)
                connection.setblocking(True)
                with contextlib.suppress(OSError):
                    send(connection, CASES[peer.model])
                os._exit(0)


def main() -> None:
    """Serve until it is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    make_bomb()
    model = _Model(int(sys.argv[1]))
    parent = os.getppid()
    while Path(f"/proc/{parent}").exists() and os.getppid() == parent:
        model.turn()


if __name__ == "__main__":
    main()
