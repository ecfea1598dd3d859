"""`flask assistream doctor`: looks at a deployment from the shell, and through the public URL from inside a worker.

The shell puts a random key into the database and shows it to ``GET P/doctor``; who cannot write there gets 404. So
an answer proves that shell and worker share a database, and it comes the way of every event stream.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import secrets
import socket
import ssl
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from email.message import Message
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit

import click
import openai
import sqlalchemy as sa
from gevent import monkey
from sqlalchemy.exc import SQLAlchemyError

from .. import sse
from ..errors import ConfigurationError, RequestError, RunError, masked
from ..fast import install
from ..log import redis_requirements
from ..mcp import McpServer
from ..platform import gunicorn, openai_sdk, reliances
from ..runs import mcp_tools
from ..settings import Settings
from ..store import tables
from ..store.leases import SKEW_SECONDS
from ..store.sql import Owner, StoredAnswer, ThreadStore
from . import addresses, validation

HEADER: Final = "X-Assistream-Doctor"

_WHERE: Final = Owner("assistream.doctor", "doctor")
_KEY_SECONDS: Final = 60
# Each is longer than a proxy is late that is only slow.
_SILENCES: Final = 2
_SILENCE_SECONDS: Final = 1.5
_HELD_SECONDS: Final = 1.0
_MCP_SECONDS: Final = 10.0
# Caddy before 2.6.3 compresses, and so holds, what begins with more than 512 bytes; others have 4 KiB.
_SNAPSHOT_BYTES: Final = 8_192
_LOOKS: Final = 8
_PAUSE_SECONDS: Final = 3.0
_REDIS: Final = (7, 0)
# Each stream passes through these. Others may keep a plain lock or sleep on purpose, as profilers do.
_OURS: Final = re.compile(
    r"(assistream_flask|flask|httpcore2?|httpx2?|jinja2|openai|psycopg|redis|sqlalchemy|werkzeug)\b"
)
_GEVENT: Final = "run gunicorn with --worker-class gevent"
_PATCH: Final = (
    "drop gunicorn's --preload, or make `from gevent import monkey; monkey.patch_all()` the first lines of "
    "gunicorn.conf.py"
)
_RELEASE: Final = "upgrade assistream-flask, or install an older release of that library"
_REFUSALS: Final[dict[object, tuple[str, str]]] = {
    "sync_worker": ("the worker class is sync, so one event stream holds up all else", _GEVENT),
    "too_many_workers": (
        "several workers serve, each with an event log of its own",
        "set ASSISTREAM_REDIS_URL, or run gunicorn with --workers 1",
    ),
    404: (
        "the server there does not use this shell's database, or the URL is not the blueprint's",
        "give the server and this shell the same ASSISTREAM_DATABASE_URL, and end --url in the blueprint's url_prefix",
    ),
}
# What is held back: a stream as an old thread's, one as a new thread's.
_HELD: Final = {
    (True, True): "the proxy buffers: all events came at once, at the end",
    (True, False): "the proxy buffers what begins with many bytes, as a thread's snapshot: its events came late",
    (False, True): "the proxy buffers what begins with few bytes, as a new thread's stream: its events came late",
}
# By the name that a proxy gives itself; "others" is for one that gives none.
_BUFFERED: Final[dict[str, str]] = {
    "nginx": "`proxy_buffering off;` in this location, or no `proxy_ignore_headers X-Accel-Buffering;`",
    "Caddy": "no `buffer_responses` or `response_buffers` in `reverse_proxy`",
    "lighttpd": "`server.stream-response-body = 2`",
    "others": "no response buffering for text/event-stream",
}
_COMPRESSED: Final[dict[str, str]] = {
    "nginx": "take text/event-stream out of `gzip_types`, or `gzip off;` in this location",
    "Caddy": "give `encode` a `match` of Content-Types without text/event-stream, as deploy/Caddyfile has, "
    "or run Caddy 2.6.3 or newer",
    "lighttpd": "take text/event-stream, and prefixes of it such as text/, out of `deflate.mimetypes`",
    "others": "take text/event-stream out of what is compressed",
}
_HOST: Final[dict[str, str]] = {
    "nginx": "`proxy_set_header Host $http_host;`",
    "Caddy": "no `header_up Host` in `reverse_proxy`",
    "lighttpd": "no `map-host-request` in `proxy.header`",
    "others": "pass Host on as it came",
}


class Finding(NamedTuple):
    """One line for the operator. ``level`` is "ok", "warn" or "FAIL"."""

    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:4} {self.text}" + (f"\n     fix: {self.fix}" if self.fix else "")


class Part(Protocol):
    """One blueprint of the app. ``owner`` is ``None`` where the session names the caller."""

    owner: Callable[[], str | None] | None

    def client(self) -> openai.OpenAI:
        """Give the client of its runs."""
        ...

    def mcp_servers(self) -> Sequence[tuple[McpServer, Callable[[], dict[str, str]]]]:
        """Give the MCP servers that are known, and what gives the headers of each."""
        ...


class Health(NamedTuple):
    """How a worker is: the longest time within ten minutes in which nothing else went on in it, by how much its clock
    is ahead of the database's, in seconds, and how many threads compute for tools that were given up."""

    pause: float
    skew: float | None
    abandoned: int = 0


class Patient(NamedTuple):
    """The app. ``patched`` is what :func:`.gunicorn.patched` gave when its first blueprint was registered; ``health``
    is for a worker to say; ``has_logins`` says whether the app has Flask-Login."""

    settings: Settings
    parts: Mapping[str, Part]
    secret_key: str | bytes | None
    patched: bool
    health: Health | None = None
    has_logins: bool = False


def command(patient: Callable[[], Patient]) -> Callable[[str | None], None]:
    """Give the function of the command, with its options."""

    @click.option("--url", help="The blueprint's public address, such as https://example.org/assistream.")
    def doctor(url: str | None) -> None:
        """Check this deployment. Each finding comes with its fix; the exit status is 1 when one failed.

        Without --url neither workers nor proxy are looked at.
        """
        failed = False
        for finding in _examine(patient, url):
            click.echo(finding)
            failed = failed or finding.level == "FAIL"
        sys.exit(failed)

    return doctor


# From the shell


def _examine(patient: Callable[[], Patient], url: str | None) -> Iterator[Finding]:
    try:
        app = patient()
    except ConfigurationError as error:
        yield _misconfigured(error)
        return
    yield Finding("ok", "settings are valid")
    yield from _callers(app)
    if url is None:
        yield from _fast(app.settings, in_worker=False)
    if app.settings.redis_url:
        yield from _redis(app.settings.redis_url)
    for name, part in app.parts.items():
        yield _model_server(name, part)
        for server, headers_of in part.mcp_servers():
            yield _mcp_server(server, headers_of)
    try:
        with closing(ThreadStore(app.settings.database_url)) as store:
            yield _store(store)
            before = time.time()
            skew = (before + time.time()) / 2 - store.now()
            yield _clock(skew)
            if url is None:
                yield Finding("warn", "workers and proxy were not looked at", "give the public address with --url")
            else:
                yield from _probe(url, store, app.settings)
    except ConfigurationError as error:
        yield _misconfigured(error)
    except SQLAlchemyError as error:
        at = sa.make_url(app.settings.database_url)
        yield Finding(
            "FAIL",
            f"database {_database(at)} cannot be used: {_why(getattr(error, 'orig', None) or error, at.password)}",
            "start it, or correct ASSISTREAM_DATABASE_URL",
        )


def _callers(app: Patient) -> Iterator[Finding]:
    by_session = [name for name, part in app.parts.items() if part.owner is None]
    if by_session and len(app.secret_key or b"") < 16:
        yield Finding(
            "warn",
            "SECRET_KEY is short: who guesses it can take any caller's threads",
            "make one with `python -c 'import secrets; print(secrets.token_hex())'`",
        )
    if by_session and app.has_logins:
        yield Finding(
            "warn",
            f"the app has logins, and {by_session[0]!r} knows browsers, not users: a user's threads stay behind in the "
            "browser where they began",
            "pass create_blueprint(..., owner=lambda: current_user.get_id()), which Flask-Login gives None for nobody",
        )


def _misconfigured(error: ConfigurationError) -> Finding:
    what, _, fix = str(error).partition(": ")
    return Finding("FAIL", what, fix)


def _why(error: BaseException, secret: object = None) -> str:
    """Give the first line of what ``error`` says, without the ``secret``."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return said.replace(str(secret), "***") if secret else said


def _database(url: sa.URL) -> str:
    server = f" at {url.host}" if url.host else ""
    return f"{url.get_backend_name()} {url.database or 'in memory'}{server}" + (f":{url.port}" if url.port else "")


def _store(store: ThreadStore) -> Finding:
    with store.read() as connection:
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
        newest = connection.scalar(sa.select(sa.func.max(tables.schema.c.version)))
        return Finding("ok", f"database {_database(connection.engine.url)}: version {version}, schema {newest}")


def _clock(skew: float) -> Finding:
    if abs(skew) <= SKEW_SECONDS:
        return Finding("ok", "the clock agrees with the database's")
    way = "ahead of" if skew > 0 else "behind"
    return Finding("warn", f"the clock is {abs(skew):.0f} s {way} the database's", "set both machines' clocks by NTP")


def _health(health: Health) -> Iterator[Finding]:
    if health.skew is not None:
        yield _clock(health.skew)
    said = f"within ten minutes it stood still for {health.pause:.1f} s at most"
    if health.pause <= _PAUSE_SECONDS:
        yield Finding("ok", said)
    else:
        fix = "have gevent.get_hub().threadpool, or a job queue, do what computes or waits outside of Python"
        yield Finding("warn", f"{said}, and all its streams with it", fix)
    if health.abandoned:
        said = f"{health.abandoned} threads still compute for tools whose time was over"
        yield Finding("warn", said, "have those functions end by themselves in time: nothing else can end a thread")


def _fast(settings: Settings, *, in_worker: bool) -> Iterator[Finding]:
    """Tell which of the fast ways are on, and what else does without a name of a library."""
    states = install.states(settings.fast, in_worker=in_worker)
    for state in states:
        if state.is_missing:
            yield Finding("warn", f"{state.name} is off: {state.why_off}", f"all works, but slower: {_RELEASE}")
        else:
            yield Finding("ok", f"{state.name} is " + (f"off: {state.why_off}" if state.why_off else "on"))
    known = {state.name for state in states}
    for who, missing in reliances.all_missing().items():
        if who not in known:
            yield Finding("warn", f"{who} is off: {missing}", _RELEASE)


def _redis(url: str) -> Iterator[Finding]:
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        yield Finding("FAIL", "ASSISTREAM_REDIS_URL is set without redis-py", "pip install 'assistream-flask[redis]'")
        return
    try:
        parts = urlsplit(url)
        name = f"Redis at {parts.hostname or 'localhost'}:{parts.port or 6379}{parts.path}"
        options: dict[str, Any] = {"socket_timeout": 2, "socket_connect_timeout": 2, "protocol": 2}
        client = redis.Redis.from_url(url, **options, retry=Retry(NoBackoff(), 0))
    except ValueError:
        # It repeats what it could not read, the password maybe.
        yield Finding("FAIL", "ASSISTREAM_REDIS_URL is not a URL", "give one such as redis://localhost:6379/0")
        return
    try:
        with closing(client):
            took, about = _looked_at(client)
    except (redis.RedisError, redis_requirements.UnfitRedisError) as error:
        what, _, fix = redis_requirements.advice(error).partition(": ")
        yield Finding(
            "FAIL",
            f"{name} cannot be used: {what or _why(error, parts.password)}",
            fix or "start it, or correct ASSISTREAM_REDIS_URL",
        )
        return
    version = str(about["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < _REDIS:
        yield Finding("FAIL", f"{name}: version {version} is too old", "run Redis {}.{} or newer".format(*_REDIS))
    else:
        yield Finding("ok", f"{name}: version {version}, round trip {took:.1f} ms")
    if about.get("maxmemory") and about.get("maxmemory_policy") != "noeviction":
        yield Finding(
            "warn",
            f"{name} may drop event logs when it is full (maxmemory-policy {about.get('maxmemory_policy')}): "
            "viewers then get the whole thread again",
            "set maxmemory-policy to noeviction",
        )


def _looked_at(redis: Any) -> tuple[float, dict[str, Any]]:
    """Give how long a round trip takes, in milliseconds, and what that Redis tells of itself. Raises
    :class:`.redis_requirements.UnfitRedisError`, and what the client raises."""
    line = redis.connection_pool.get_connection()
    try:
        redis_requirements.check(line, f"assistream:{line.db or 0}:none")
    finally:
        # After what it was asked it may be of no use.
        line.disconnect()
        redis.connection_pool.release(line)
    redis.ping()
    start = time.perf_counter()
    redis.ping()
    return (time.perf_counter() - start) * 1000, redis.info()


def _model_server(name: str, part: Part) -> Finding:
    label = f"model server of {name!r}"
    try:
        client = part.client()
        label += f" at {client.base_url.host}"
        quick = client.with_options(max_retries=0, timeout=10)
        openai_sdk.bound(quick)
        quick.models.list()
    except openai.APIStatusError as error:
        # What it says may repeat the key.
        status = error.status_code
        if status in (401, 403):
            fix = "set OPENAI_API_KEY, or the client's api_key, to a key of that server that may list models"
            return Finding("FAIL", f"{label} refuses the key ({status})", fix)
        if status < 400 and (to := error.response.headers.get("Location")):
            fix = "give the address behind it as OPENAI_BASE_URL, or as the client's base_url"
            return Finding("FAIL", f"{label} answers {status} and leads to {masked(to)}", fix)
        if status == 429 or status >= 500:
            return Finding("FAIL", f"{label} answers {status}", "look at its status, and at your quota there")
        return Finding("ok", f"{label} answers; it has no list of models to try the key on ({status})")
    except openai.APIConnectionError as error:
        return Finding(
            "FAIL",
            f"{label} cannot be reached: {_why(error.__cause__ or error)}",
            "start it, or correct OPENAI_BASE_URL; see that this machine may connect to it",
        )
    except openai.OpenAIError:
        return Finding("FAIL", f"{label}: there is no key", "set OPENAI_API_KEY")
    except RunError as error:
        return Finding("FAIL", f"{label} answers with {error.said}", "see what stands at that address")
    return Finding("ok", f"{label} takes the key")


def _mcp_server(server: McpServer, headers_of: Callable[[], dict[str, str]]) -> Finding:
    label = f"MCP server {server.name!r} at {urlsplit(server.url).hostname}"
    try:
        # Its package is an extra.
        from ..upstream import mcp_session
    except Exception as error:
        said = f"{label} cannot be asked: of the package mcp, {type(error).__name__} was met"
        return Finding("FAIL", said, "pip install --force-reinstall 'assistream-flask[mcp]'")
    try:
        sent = headers_of()
    except Exception as error:
        fix = "see what it needs: the doctor asks it of no run, with empty ids and no owner"
        return Finding("warn", f"{label} was not asked: headers= raised {type(error).__name__}", fix)

    async def listed() -> mcp_session.Listed:
        try:
            return await mcp_session.listed(server.url, sent, _MCP_SECONDS, server.allowed)
        finally:
            await mcp_session.ended()

    mcp_session.keep_quiet()
    try:
        found = asyncio.run(listed())
    except mcp_session.McpError as error:
        fix = "start it, or correct its address and headers=; runs go on without its tools meanwhile"
        return Finding("FAIL", f"{label} gives no list of tools: {error.why}", fix)
    given = mcp_tools.told(server, found.tools)
    if given.missing:
        return Finding("warn", f"{label} has no tool {given.missing[0]!r}", "correct allowed=")
    if given.left_out:
        name, why = next(iter(given.left_out.items()))
        said = f"{label} has {len(given.left_out)} tools that no model can be told of, such as {name[:80]!r}: {why}"
        return Finding("warn", said, "leave them out with allowed=, or correct them at the server")
    return Finding("ok", f"{label} answers; models are told of {len(given.tools)} tools")


# From the worker


def admitted(store: ThreadStore, key: str) -> bool:
    """Tell whether ``key`` was put into the database within the last minute."""
    found = store.answer(_WHERE, key) if re.fullmatch("[0-9a-f]{64}", key) else None
    return found is not None and bool(store.now() < found.body["expires"])


def headers() -> dict[str, str]:
    """Give the headers of the answer, which name the worker."""
    return {**sse.HEADERS, HEADER: f"{socket.gethostname()}/{os.getpid()}"}


def frames(environ: Mapping[str, Any], host: str, patient: Patient) -> Iterator[bytes]:
    """Give what the shell reads: a stream as a thread's with a snapshot, of many bytes at once, then silence.

    It begins with what the worker finds; ``host`` is the request's own. With ``?new`` it is as a new thread's, which
    begins with few bytes. A proxy may hold back one of the two only.
    """
    if environ.get("QUERY_STRING") == "new":
        first = sse.encode("ping", json.dumps({"seconds": 0}))
    else:
        found = [*_worker(environ, patient.patched), *_ends(environ, patient.settings)]
        found += _fast(patient.settings, in_worker=True)
        found += _health(patient.health) if patient.health else []
        found += _visitors(environ, patient)
        found += [_model_server(name, part) for name, part in patient.parts.items()]
        redis = patient.settings.redis_url
        found += _redis(redis) if redis else []
        report = {"seconds": 0, "host": host, "redis": bool(redis), "findings": found}
        first = sse.encode("doctor", json.dumps({**report, "padding": "." * _SNAPSHOT_BYTES}))
    start = time.monotonic()
    yield sse.RETRY + first
    for _ in range(_SILENCES):
        time.sleep(_SILENCE_SECONDS)
        yield sse.encode("ping", json.dumps({"seconds": time.monotonic() - start}))


def _worker(environ: Mapping[str, Any], patched_before: bool) -> Iterator[Finding]:
    name = environ.get("SERVER_SOFTWARE") or "an unnamed server"
    if workers := gunicorn.setting("workers"):
        name += f", {workers} worker{'s' if workers > 1 else ''}"
    if gunicorn.patched():
        yield Finding("ok", f"{name}, patched by gevent")
        held = _unpatched()
        ours = [name for name in held if _OURS.match(name)]
        if ours or not patched_before:
            example = f": {ours[0]} among others" if ours else ""
            yield Finding("FAIL", f"gevent patched late, after modules that it must change{example}", _PATCH)
        elif held:
            yield Finding("warn", f"a module was imported before gevent patched: {held[0]}", _PATCH)
    elif environ.get("wsgi.multithread"):
        yield Finding("warn", f"{name}, without gevent: each open event stream holds a thread", _GEVENT)
    else:
        yield Finding("FAIL", f"{name}, without gevent: one event stream holds up all else", _GEVENT)


def _ends(environ: Mapping[str, Any], settings: Settings) -> Iterator[Finding]:
    if not environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        return
    graceful = gunicorn.setting("graceful_timeout")
    if graceful is None:
        yield Finding(
            "warn",
            "the app handles SIGTERM itself: that gunicorn ends its worker is not seen, and at a deploy streams and "
            "answers are cut",
            "drop that handler: what is to be done at the end goes into gunicorn's hook worker_exit, or into atexit",
        )
        return
    if graceful <= settings.drain_seconds:
        yield Finding(
            "warn",
            f"gunicorn ends its workers after {graceful} s, before answers had ASSISTREAM_DRAIN_SECONDS "
            f"({settings.drain_seconds:g}) at a deploy",
            "run gunicorn with a longer --graceful-timeout, or shorten the drain",
        )
    if gunicorn.setting("keepalive") == 0:
        yield Finding(
            "warn",
            "with a --keep-alive of 0 gunicorn waits for a request's headers for ever: who sends half of them holds "
            "one of the worker's connections for good",
            "run gunicorn with --keep-alive 2, or let a proxy before it wait for whole requests, as nginx does",
        )
    if most := gunicorn.setting("max_requests"):
        if gunicorn.is_kept():
            yield Finding("ok", f"a worker that has served {most} requests (--max-requests) ends between answers")
        else:
            yield Finding(
                "warn",
                f"a worker that has served {most} requests (--max-requests) ends in the midst of answers",
                "drop --max-requests: this server does not count requests as gunicorn's own workers do",
            )


def _visitors(environ: Mapping[str, Any], patient: Patient) -> Iterator[Finding]:
    if all(part.owner for part in patient.parts.values()):
        # None is limited by an address.
        return
    if addresses.origin(environ).is_a_proxys:
        yield Finding(
            "warn",
            f"all visitors have the proxy's address, {environ['REMOTE_ADDR']}: there are no limits for each address",
            addresses.PROXY_FIX,
        )
    else:
        yield Finding("ok", f"this request comes from {environ.get('REMOTE_ADDR') or 'a Unix socket'}")


def _unpatched() -> list[str]:
    """Give the names in modules, of neither Python nor the server, that still mean what gevent has replaced."""
    replaced = {
        "_thread": ("allocate_lock", "start_new_thread"),
        "queue": ("SimpleQueue",),
        "select": ("select", "poll"),
        "socket": ("socket", "create_connection", "getaddrinfo"),
        "ssl": ("SSLContext",),
        "subprocess": ("Popen",),
        "threading": ("Lock", "Thread", "Event"),
        "time": ("sleep",),
    }
    originals = {id(monkey.get_original(name, item)) for name, items in replaced.items() for item in items}
    originals -= {id(getattr(sys.modules.get(name), item, None)) for name, items in replaced.items() for item in items}
    passed = sys.stdlib_module_names | {"gevent", "gunicorn"}
    return sorted(
        f"{name}.{item}"
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in passed
        for item, value in list(getattr(module, "__dict__", {}).items())
        if id(value) in originals
    )


# Through the proxy


class _Stream:
    """The stream as it came back: its headers, its frames and how late the latest of them came."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.headers = answer.headers
        self.frames: list[sse.Frame] = []
        at: list[float] = []
        inflate, decoder = zlib.decompressobj(wbits=47), sse.Decoder()
        while chunk := answer.read1(65_536):
            if self.encoding:
                with suppress(zlib.error):
                    chunk = inflate.decompress(chunk)
            self.frames += decoder.feed(chunk)
            at += [time.monotonic()] * (len(self.frames) - len(at))
        sent = map(_sent, self.frames)
        late = [came - left for came, left in zip(at, sent, strict=True) if left is not None]
        self.held = bool(late) and max(late) - min(late) > _HELD_SECONDS

    @property
    def encoding(self) -> str:
        """Give how it is compressed, "" where it is not."""
        return _encoding(self.headers)


def _encoding(headers: Message) -> str:
    return str(headers.get("Content-Encoding", "")).lower().replace("identity", "")


def _sent(frame: sse.Frame) -> float | None:
    """Give the worker's seconds from its first frame to this one; one of another release tells none."""
    try:
        return float(json.loads(frame.data)["seconds"])
    except (ValueError, LookupError, TypeError):
        return None


def _probe(url: str, store: ThreadStore, settings: Settings) -> Iterator[Finding]:
    try:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}"
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        yield Finding("FAIL", "--url is not a URL", "give one such as https://example.org/assistream")
        return
    key = secrets.token_hex(32)
    store.remember(_WHERE, StoredAnswer(key, "", 0, {"expires": store.now() + _KEY_SECONDS}))
    try:
        with ThreadPoolExecutor() as pool:
            old, new = pool.map(lambda query: _read(parts, key, query), ("", "?new"))
        if not isinstance(old, _Stream) or not isinstance(new, _Stream):
            yield next(one for one in (old, new) if isinstance(one, Finding))
            return
        workers = {old.headers[HEADER], new.headers[HEADER]}
        for _ in range(_LOOKS):
            with _ask(parts, key, method="HEAD") as answer:
                workers.add(answer.headers[HEADER])
        encoding = old.encoding or new.encoding
        if not encoding:
            # What the browsers take besides; it can't be read here.
            with _ask(parts, key, accepts="br, zstd") as answer:
                encoding = _encoding(answer.headers)
        proxy = _proxy(parts, old.headers)
    except ssl.SSLCertVerificationError as error:
        yield Finding(
            "FAIL",
            f"{origin} has no valid certificate: {error.verify_message}",
            "renew it, and serve it with its chain; for a CA of your own set SSL_CERT_FILE here",
        )
    except (OSError, http.client.HTTPException, ValueError) as error:
        yield Finding(
            "FAIL",
            f"{origin} cannot be read: {_why(error)}",
            "start the server, whose log says why where it does not start, or correct --url",
        )
    else:
        yield from _judge(old, new, encoding, proxy, len(workers - {None}), origin, settings)


def _read(url: SplitResult, key: str, query: str) -> _Stream | Finding:
    with _ask(url, key, query) as answer:
        found = _refusal(answer) if answer.status != 200 else _Stream(answer)
    if isinstance(found, _Stream) and found.held:
        # Once more: a busy machine can look like a buffer.
        with _ask(url, key, query) as answer:
            found = _Stream(answer)
    return found


@contextmanager
def _ask(
    url: SplitResult, key: str, query: str = "", *, method: str = "GET", accepts: str = "gzip"
) -> Iterator[http.client.HTTPResponse]:
    with closing(_connection(url)) as connection:
        headers = {HEADER: key, "Accept": "text/event-stream", "Accept-Encoding": accepts}
        connection.request(method, f"{url.path.rstrip('/')}/doctor{query}", headers=headers)
        yield connection.getresponse()


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(str(url.hostname), url.port, timeout=30)


def _proxy(url: SplitResult, headers: Message) -> str:
    """Give the proxy's name where we have advice for it, else ""."""
    said = [*headers.get_all("Server", []), *headers.get_all("Via", [])]
    # Lighttpd passes on the app's name; to this it answers itself.
    with suppress(OSError, http.client.HTTPException), closing(_connection(url)) as connection:
        connection.request("OPTIONS", "*")
        said += connection.getresponse().headers.get_all("Server", [])
    return next((name for name in _BUFFERED if re.search(rf"\b{name}\b", " ".join(said), re.IGNORECASE)), "")


def _advice(known: Mapping[str, str], proxy: str) -> str:
    return ". ".join(f"{name}: {fix}" for name, fix in known.items() if name == proxy or not proxy)


def _refusal(answer: http.client.HTTPResponse) -> Finding:
    try:
        error = json.loads(answer.read(65536))["error"]
        code, message = error["code"], f": {error['message']}"
    except (ValueError, LookupError, TypeError):
        code = message = ""
    if known := _REFUSALS.get(code) or _REFUSALS.get(answer.status):
        return Finding("FAIL", *known)
    if to := answer.headers.get("Location"):
        return Finding("FAIL", f"the URL answers {answer.status} and leads to {to}", "give the address behind it")
    return Finding(
        "FAIL",
        f"the URL answers {answer.status}{message}",
        "look at the logs of app and proxy; whatever else stands before the blueprint must let P/doctor through",
    )


def _judge(
    old: _Stream, new: _Stream, encoding: str, proxy: str, workers: int, origin: str, settings: Settings
) -> Iterator[Finding]:
    if not old.frames or old.frames[0].event != "doctor":
        yield Finding("FAIL", "something else than the blueprint answers at the URL", _REFUSALS[404][1])
        return
    report = json.loads(old.frames[0].data)
    yield Finding("ok", "the server at the URL uses this database")
    for level, text, fix in report["findings"]:
        yield Finding(level, f"in the worker: {text}", fix)
    if workers > 1 and not report["redis"]:
        yield Finding("FAIL", *_REFUSALS["too_many_workers"])
    if held := [stream for stream in (old, new) if stream.held]:
        fix = _advice(_BUFFERED, proxy)
        if all(stream.encoding for stream in held):
            fix = f"stop the compression, as below; where that is not enough, {fix}"
        yield Finding("FAIL", _HELD[old.held, new.held], fix)
    else:
        yield Finding("ok", "events come through the proxy one by one")
    if encoding:
        yield Finding(
            "FAIL",
            f"the proxy, or the app, compresses event streams ({encoding})",
            _advice(_COMPRESSED, proxy),
        )
    else:
        yield Finding("ok", "event streams are not compressed")
    try:
        validation.same_origin(origin, report["host"], settings.allowed_origins.split())
        yield Finding("ok", "the app sees the host that browsers see")
    except RequestError:
        yield Finding(
            "FAIL",
            f"the app sees the host {report['host']}, browsers see {origin}: their commands are refused",
            f"{_advice(_HOST, proxy).rstrip('.')}. Or add the origin to ASSISTREAM_ALLOWED_ORIGINS",
        )
