"""Settings, read from ``app.config`` under ``ASSISTREAM_<NAME>``."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import urlsplit

from .errors import ConfigurationError, meant

_log = logging.getLogger(__name__)

_PREFIX: Final = "ASSISTREAM_"


def _setting(default: Any, doc: str, minimum: float = 0, *, is_secret: bool = False) -> Any:
    # A URL has a password, and whoever prints all settings prints it.
    return field(default=default, repr=not is_secret, metadata={"doc": doc, "minimum": minimum})


@dataclass(frozen=True)
class Settings:
    """All settings with their defaults. Seconds are seconds; a limit is per caller where it says so."""

    database_url: str = _setting(
        "",
        "SQLAlchemy URL of an SQLite or PostgreSQL database; default: an SQLite file in the app's instance folder",
        is_secret=True,
    )
    database_pool: int = _setting(10, "connections that a worker may have open to PostgreSQL", 1)
    redis_url: str = _setting(
        "", "URL of the Redis that has the event log; unset: it is in memory, for one worker", is_secret=True
    )
    max_message_chars: int = _setting(100_000, "longest message, in characters", 1)
    max_answer_chars: int = _setting(
        1_000_000, "characters of an answer, the model's reasoning included; it is cut there, and ends `incomplete`", 1
    )
    max_history_chars: int = _setting(1_000_000, "characters of a thread that a model is sent, the newest messages", 1)
    max_history_messages: int = _setting(1_000, "messages of a thread that a model is sent, the newest", 1)
    max_runs: int = _setting(50, "runs a caller may have waiting or under way", 1)
    max_questions: int = _setting(200, "runs that a caller may have beside these, which wait for a page or a person")
    max_bytes: int = _setting(10_000_000, "bytes of messages a caller may write in a minute", 1)
    max_streams: int = _setting(50, "event streams a caller may have open in a worker", 1)
    max_threads: int = _setting(0, "threads a caller may keep; 0: any number")
    max_messages: int = _setting(0, "messages a thread may have, its answers included; 0: any number")
    address_streams: int = _setting(
        300, "event streams that visitors without `owner=` may have open in a worker from one address; 0: any number"
    )
    address_runs: int = _setting(
        200, "runs that they may have waiting or under way in a worker from one address; 0: any number"
    )
    address_bodies: int = _setting(
        100, "bodies of requests that an address may have under way in a worker; its oldest is cut for one more; 0: any"
    )
    address_sessions: int = _setting(
        120, "new sessions that may begin in a worker from one address in a minute; 0: any number"
    )
    worker_streams: int = _setting(
        0, "event streams a worker has open at most; 0: nine tenths of its connections, or of its server's threads"
    )
    worker_runs: int = _setting(900, "answers a worker has under way; more wait, and callers take turns", 1)
    max_assistants: int = _setting(16, "assistants that one POST may ask", 1)
    stall_seconds: float = _setting(60.0, "a run fails when the model server sends no byte for so long", 0.1)
    run_seconds: float = _setting(600.0, "a run fails when it takes longer", 0.1)
    run_tools: int = _setting(8, "tools a run executes at a time", 1)
    worker_tools: int = _setting(100, "tools a worker executes at a time; more wait", 1)
    action_seconds: float = _setting(86_400.0, "a run that waits for a page or a person expires after so long", 1)
    claim_seconds: float = _setting(
        90.0, "a page that executes a tool has it for so long, unless it says again that it does", 1
    )
    heartbeat_seconds: float = _setting(
        15.0, "a `ping` goes out when nothing else did for so long, or up to a quarter less", 0.05
    )
    stream_seconds: float = _setting(
        900.0, "a thread's event stream ends after so long at most, and the page comes back as who it is then", 1
    )
    pace_seconds: float = _setting(
        0.033, "with more than 20 answers or viewers, an answer is told so often; 0: as it comes"
    )
    flush_seconds: float = _setting(2.0, "growing text is stored at least so often", 0.05)
    log_events: int = _setting(10_000, "newest events a thread's log keeps for viewers that come back", 200)
    log_bytes: int = _setting(8 << 20, "bytes a thread's log keeps at most, about", 65_536)
    log_memory: int = _setting(
        128 << 20,
        "bytes that all threads' logs keep at most, about, in a worker's memory or in Redis, there no more than half "
        "of its `maxmemory`; those nobody views go first",
        1 << 20,
    )
    log_seconds: float = _setting(600.0, "a thread's log is kept so long after its last event or viewer", 1)
    slow_seconds: float = _setting(
        8.0, "who reads an event stream, or any other answer, is cut off where they take nothing for so long", 0.1
    )
    body_seconds: float = _setting(30.0, "a request's body comes whole within so long, or is refused", 0.1)
    drain_seconds: float = _setting(
        10.0, "at shutdown, runs under way may finish for so long; none where Werkzeug's reloader ends it"
    )
    fast: str = _setting(
        "on",
        "what is there only for speed: `on`, `off`, or what is to be off, each with a minus: `-chunk_reader`, "
        "`-event_template`, `-batched_reading`, `-direct_send`, with commas between",
    )
    tracing: str = _setting("on", "spans of runs where OpenTelemetry is installed (the extra `otel`): `on` or `off`")
    allowed_origins: str = _setting("", "origins besides the page's own that may send commands, space between")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Settings:
        """Take ``app.config``; numbers may be strings. Raises :class:`ConfigurationError`."""
        found: dict[str, Any] = {}
        for setting in fields(cls):
            name = _PREFIX + setting.name.upper()
            value = config.get(name)
            if value is None or value == "":
                continue
            kind: Any = type(setting.default)
            try:
                found[setting.name] = kind(value)
            except (TypeError, ValueError):
                raise ConfigurationError(f"{name} is {value!r}: give a {kind.__name__}") from None
            if kind is not str and not setting.metadata["minimum"] <= found[setting.name] < float("inf"):
                raise ConfigurationError(f"{name} is {value!r}: give at least {setting.metadata['minimum']}")
        settings = cls(**found)
        if settings.tracing not in ("on", "off"):
            raise ConfigurationError(f"ASSISTREAM_TRACING is {settings.tracing!r}: give on or off")
        if settings.redis_url:
            _check_redis(settings.redis_url)
        return settings


def _check_redis(url: str) -> None:
    # The messages don't have the URL itself: it may have a password.
    scheme = url.partition("://")[0].lower()
    for kind in ("Sentinel", "Cluster"):
        if kind.lower() in scheme:
            raise ConfigurationError(
                f"ASSISTREAM_REDIS_URL names a Redis {kind}, which assistream cannot use: give one Redis that runs by "
                "itself, redis://host:6379/0, or an address that leads to the primary wherever that is"
            )
    if not _is_redis_url(url):
        raise ConfigurationError(
            "ASSISTREAM_REDIS_URL is no URL of a Redis: give redis://host:6379/0, or rediss://, and of a password "
            "write / as %2F, # as %23, ? as %3F and @ as %40"
        )
    if importlib.util.find_spec("redis") is None:
        raise ConfigurationError(
            "ASSISTREAM_REDIS_URL is set, and its client is not installed: pip install 'assistream-flask[redis]'"
        )


def check_names(config: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigurationError` for a name in ``app.config`` that is like a setting's and is none's: it would
    change nothing, in silence. One that is like none, which may be the app's own, is only told in the log."""
    known = {setting.name.upper() for setting in fields(Settings)}
    for name in config:
        wide = name.upper()
        ours = wide.startswith(_PREFIX)
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in known:
            continue
        # All of an app's settings are there: of another's only a slip in the prefix is ours to find.
        near = (
            meant(wide.removeprefix(_PREFIX), known)
            if ours
            else meant(wide, {_PREFIX + one for one in known}, 0.93).removeprefix(_PREFIX)
        )
        if near:
            raise ConfigurationError(f"{name} in app.config is no setting of assistream: write {_PREFIX}{near}")
        if ours:
            _log.warning("%s in app.config is no setting of assistream, and changes nothing: remove it", name)


def _is_redis_url(url: str) -> bool:
    try:
        # A password with a slash makes a part of itself the port, which whoever reads it would say in an error.
        urlsplit(url).port  # noqa: B018
    except ValueError:
        return False
    return url.startswith(("redis://", "rediss://", "unix://"))
