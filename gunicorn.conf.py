"""How `gunicorn wsgi:app` runs: one gevent worker, since the event log is in its memory."""

import os
from typing import Any

bind = os.environ.get("BIND", "127.0.0.1:8000")
worker_class = "gevent"
workers = int(os.environ.get("WEB_CONCURRENCY", "1"))
worker_connections = 2000
timeout = 60
graceful_timeout = 30
keepalive = 5


def on_starting(server: Any) -> None:
    """Refuses what would break in silence: a stream and a POST that meet different logs."""
    if server.cfg.workers > 1:
        raise SystemExit(
            f"assistream's event log is in memory, so it needs one worker, not {server.cfg.workers}: "
            "remove WEB_CONCURRENCY or --workers"
        )
