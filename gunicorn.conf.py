"""How `gunicorn wsgi:app` runs: gevent workers, and more than one only where Redis has their event log."""

import gc
import os
from contextlib import suppress
from typing import Any

env: dict[str, str | None] = dict(os.environ)
with suppress(ImportError):
    from dotenv import dotenv_values

    # As the example app reads it, without a change of what the workers inherit: they read it anew at a reload.
    env = {**dotenv_values(".env"), **env}

bind = env.get("BIND") or (f"0.0.0.0:{env['PORT']}" if env.get("PORT") else "127.0.0.1:8000")
worker_class = "gevent"
workers = int(env.get("WEB_CONCURRENCY") or 1)
worker_connections = 2000
timeout = 60
graceful_timeout = 30
keepalive = 5


def on_starting(server: Any) -> None:
    """Refuse what would break in silence: a stream and a POST that meet different logs."""
    if server.cfg.workers > 1 and not env.get("ASSISTREAM_REDIS_URL"):
        raise SystemExit(
            f"assistream's event log is in memory, so it needs one worker, not {server.cfg.workers}: "
            "set ASSISTREAM_REDIS_URL in the environment or .env, or remove WEB_CONCURRENCY or --workers"
        )


def post_worker_init(worker: Any) -> None:
    """Have assistream begin with the worker, with --preload too, and the garbage collector look at what is new only,
    and seldom: it took a tenth of a busy worker's time."""
    ours = getattr(worker.wsgi, "extensions", {}).get("assistream")
    if ours is not None:
        ours.begin()
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 50, 20)
