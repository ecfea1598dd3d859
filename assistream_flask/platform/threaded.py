"""What is known of servers that answer few requests at once, a thread each, and of the one for who develops."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from . import gunicorn

_log = logging.getLogger(__name__)


class ThreadedServer(NamedTuple):
    """A server that answers ``requests`` at once, and lets others wait: an event stream is one for as long as it is
    open."""

    name: str
    requests: int
    more: str
    """How its operator gives it more."""

    @property
    def fix(self) -> str:
        """Say what to do where they are too few."""
        return f"give it more ({self.more}), or run gunicorn with --worker-class gevent"

    def most_streams(self, wanted: int) -> int:
        """Give how many of them may be event streams: so many as are ``wanted``, or, for 0, nine tenths; but never all,
        or no command would be answered."""
        return min(wanted or self.requests * 9 // 10, self.requests - 1)


def server(environ: Mapping[str, Any]) -> ThreadedServer | None:
    """Give the server of a request; ``None`` where it is another kind, or not known how many it answers at once."""
    for known in _KNOWN:
        found = known(environ)
        if found is not None and isinstance(found.requests, int) and found.requests > 0:
            return found
    return None


def unfit(environ: Mapping[str, Any]) -> tuple[str, str] | None:
    """Give an error's code and what to do where the server answers one request at a time."""
    found = server(environ)
    if found is None or found.requests > 1:
        return None
    return "sync_worker", f"{found.name} answers one request at a time, which an event stream would be: {found.fix}."


@cache
def warn(server: ThreadedServer, most: int) -> None:
    """Have the log say, once, that there are few."""
    _log.warning(
        "%s answers %d requests at once, and an event stream is one for as long as it is open: at most %d may be "
        "streams, and who asks for another gets 503. If that is too few: %s",
        *(server.name, server.requests, most, server.fix),
    )


def is_reloaded() -> bool:
    """Tell whether Werkzeug's reloader runs this process, and will start the next one when it ends, as ``flask run
    --debug`` does."""
    return os.environ.get("WERKZEUG_RUN_MAIN") == "true"


def _gthread(environ: Mapping[str, Any]) -> ThreadedServer | None:
    worker = gunicorn.worker()
    if worker is None or "ThreadWorker" not in (one.__name__ for one in type(worker).__mro__):
        return None
    return ThreadedServer("gunicorn's gthread worker", gunicorn.setting("threads"), "--threads")


def _waitress(environ: Mapping[str, Any]) -> ThreadedServer | None:
    # A method of the connection's, which knows its server and that its settings.
    channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
    settings = getattr(getattr(channel, "server", None), "adj", None)
    return ThreadedServer("waitress", getattr(settings, "threads", 0), "threads=")


def _uwsgi(environ: Mapping[str, Any]) -> ThreadedServer | None:
    # It is in its own processes only.
    known = sys.modules.get("uwsgi") if "uwsgi.version" in environ else None
    return ThreadedServer("uWSGI", getattr(known, "cores", 0), "--threads")


def _werkzeug(environ: Mapping[str, Any]) -> ThreadedServer | None:
    # With threads it starts one for each request.
    others = environ.get("wsgi.multithread") or environ.get("wsgi.multiprocess")
    if others or not environ.get("SERVER_SOFTWARE", "").startswith("Werkzeug/"):
        return None
    return ThreadedServer("Werkzeug", 1, "without --without-threads")


_KNOWN: Final[Sequence[Callable[[Mapping[str, Any]], ThreadedServer | None]]] = (_gthread, _waitress, _uwsgi, _werkzeug)
