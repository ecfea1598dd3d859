"""The database behind an SQLAlchemy URL: SQLite or PostgreSQL, as the thread store needs it."""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ..errors import ConfigurationError

WRITE: Final = "assistream_write"
"""The execution option of a transaction that writes."""


class UnsettledError(SQLAlchemyError):
    """A COMMIT failed: whether what was written is there is not known. All other errors leave nothing behind."""


class Now(FunctionElement[float]):
    """Seconds since the epoch by the clock of the database, which is the same for all workers."""

    type = sa.Float()
    inherit_cache = True


@compiles(Now)
def _now(element: Now, compiler: Any, **_: Any) -> str:
    # As of this moment: CURRENT_TIMESTAMP is the transaction's beginning, and that may have waited for a lock.
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction of ``engine``, which has the option :data:`WRITE`. Raises :class:`UnsettledError`."""
    with engine.connect() as connection:
        transaction = connection.begin()
        try:
            yield connection
        except BaseException:
            with suppress(SQLAlchemyError):
                transaction.rollback()
            raise
        try:
            transaction.commit()
        except SQLAlchemyError as error:
            raise UnsettledError(*error.args) from error


_LOCKED_SECONDS: Final = 10.0
"""How long the other writers of this process are waited for."""
_PSYCOPG: Final = "postgresql+psycopg"
PATIENCE: Final = 15.0
"""Seconds that nothing is waited for longer: a host that is gone must not hold a greenlet, and its thread, for ever."""
_POSTGRES_ARGUMENTS: Final = {
    "keepalives_count": 3,
    "client_encoding": "utf8",
    # A pooler between, such as PgBouncer in transaction mode, gives each transaction to another server's session, which
    # knows none of the statements that were prepared in the last one.
    "prepare_threshold": None,
}
# The operator's own limits stay. Not as connection options: PgBouncer refuses those.
_POSTGRES_LIMITS: Final = """
SELECT set_config(name, value, {local})
FROM (VALUES
    ('statement_timeout', '{all:.0f}'), ('lock_timeout', '{lock:.0f}'), ('idle_in_transaction_session_timeout', '30s')
) AS ours (name, value)
WHERE current_setting(name) = '0'
"""
_POOLED: Final = "assistream_pooled"

T = TypeVar("T")


def open_engine(url: str, pool: int, patience: float = PATIENCE) -> Engine:
    """Give an engine of at most ``pool`` connections, each of whose statements takes at most ``patience`` seconds;
    SQLite, which has one writer, takes no ``pool``.

    Raises :class:`ConfigurationError` for a URL that cannot work.
    """
    parsed = _parsed(url)
    engine = _engine(parsed, pool, patience)
    _check_psycopg()
    if parsed.get_backend_name() == "sqlite" and not _in_memory(parsed):
        _make_private(str(parsed.database))
    return engine


def check(url: str) -> None:
    """Raise :class:`ConfigurationError` for a URL that cannot work. Connects to nothing, and does not import
    psycopg: see :func:`_check_psycopg`."""
    parsed = _parsed(url)
    if parsed.drivername != _PSYCOPG:
        _engine(parsed, 1, PATIENCE).dispose()


def _parsed(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        # From none: what could not be read may be of the password, and stands in that error's own words.
        raise _unusable(error) from None
    if "@" in (parsed.host or ""):
        raise ConfigurationError(
            "ASSISTREAM_DATABASE_URL cannot be used, as its host has an @: of a password write @ as %40, and / as %2F"
        )
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername=_PSYCOPG)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        # Locks and clocks differ from one to the next, and the statements are tried on these two only.
        raise ConfigurationError(
            f"ASSISTREAM_DATABASE_URL names a {parsed.get_backend_name()} database, and threads are kept in SQLite or "
            "PostgreSQL only: give sqlite:////var/lib/app/assistream.sqlite3 or "
            "postgresql://user:password@host/database; the app's own tables stay where they are"
        )
    if parsed.drivername != _PSYCOPG and _is_async(parsed):
        raise ConfigurationError(
            f"ASSISTREAM_DATABASE_URL names the driver {parsed.get_driver_name()}, which is for asyncio: "
            f"give {parsed.get_backend_name()}:// without a driver"
        )
    if parsed.drivername == _PSYCOPG and importlib.util.find_spec("psycopg") is None:
        raise _no_psycopg()
    return parsed


def _is_async(url: URL) -> bool:
    try:
        return url.get_dialect().is_async
    except sa.exc.NoSuchModuleError as error:
        raise _unusable(error) from error


def is_private(url: str) -> bool:
    """Tell whether no other process can see the database: it is in this one's memory."""
    return _in_memory(_parsed(url))


def _make_private(file: str) -> None:
    """Create a new SQLite file for this user alone: conversations are in it. What SQLite puts beside it has its mode.

    A file that is there keeps the mode that the operator gave it, and one that is named by a URI is SQLite's to create.
    """
    if file.startswith("file:"):
        return
    # A folder that is not there, or not to be written to, is told by SQLite itself. Only what nobody has open yet is
    # opened here: to close a file is to give up all locks that this process has on it.
    with suppress(OSError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _in_memory(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")


def _engine(url: URL, pool: int, patience: float) -> Engine:
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_size": pool, "max_overflow": 0, "pool_timeout": 5}
    if url.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": patience * 2 / 3}}
        if url.get_driver_name() == "pysqlite":
            options["connect_args"]["factory"] = _Connection
        if _in_memory(url):
            options = {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False}}
    elif url.drivername == _PSYCOPG:
        third = max(1, int(patience / 3))
        waits = {
            "connect_timeout": max(2, third),
            "keepalives_idle": 2 * third,
            "keepalives_interval": third,
            "tcp_user_timeout": int(patience * 1000),
        }
        arguments = {**_POSTGRES_ARGUMENTS, **waits}
        options["connect_args"] = {key: arguments[key] for key in arguments.keys() - url.query}
        # What add() and its like rely on: a statement sees what was committed before it.
        options["isolation_level"] = "READ COMMITTED"
    try:
        engine = sa.create_engine(url, **options)
    except ImportError as error:
        raise _no_psycopg() if url.drivername == _PSYCOPG else _unusable(error) from error
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError) as error:
        raise _unusable(error) from error
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _sqlite_connect)
        sa.event.listen(engine, "begin", _sqlite_begin)
    elif url.drivername == _PSYCOPG:
        limits = partial(_POSTGRES_LIMITS.format, all=patience * 1000, lock=patience * 1000 / 3)
        sa.event.listen(engine, "connect", partial(_postgres_connect, limits(local="false")))
        sa.event.listen(engine, "begin", partial(_postgres_begin, limits(local="true")))
    return engine


def _unusable(error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"ASSISTREAM_DATABASE_URL cannot be used ({type(error).__name__}): give an SQLAlchemy URL such as "
        "sqlite:////var/lib/app/assistream.sqlite3 or postgresql://user:password@host/database, "
        "and install the driver that it names"
    )


def _no_psycopg() -> ConfigurationError:
    return ConfigurationError(
        "ASSISTREAM_DATABASE_URL names a PostgreSQL database, and its driver is not installed: "
        "pip install 'assistream-flask[postgres]'"
    )


def _check_psycopg() -> None:
    """Raise :class:`ConfigurationError` where one query would stop all greenlets: psycopg chooses how it waits
    when it is imported, and a process that gevent patches later keeps the choice."""
    patched, waiting = sys.modules.get("gevent.monkey"), sys.modules.get("psycopg.waiting")
    if patched and waiting and patched.is_module_patched("select") and waiting.wait is vars(waiting).get("wait_c"):
        raise ConfigurationError(
            "psycopg was imported before gevent patched this process, so that every query would stop all event "
            "streams: run gunicorn without --preload, or import psycopg only in the workers"
        )


def _postgres_connect(limits: str, connection: Any, record: Any) -> None:
    # A pooler tells a process id of its own making, as it has none of one server's.
    (server,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    record.info[_POOLED] = server != connection.info.backend_pid
    if not record.info[_POOLED]:
        connection.execute(limits)
    connection.commit()


def _postgres_begin(limits: str, connection: Connection) -> None:
    # Set for good, the limits would go to whoever has that server's session next, and not with this transaction.
    if connection.info[_POOLED]:
        connection.exec_driver_sql(limits)


class OneWriter(AbstractContextManager[None]):
    """Lets one at a time in, as SQLite has one writer: of many who ask for the file's lock at once, some would get it
    never. Whoever has it may come again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        """Wait for the others. Raises :class:`sqlalchemy.exc.TimeoutError` when the others take too long."""
        # Behind one who waits for another process all would wait in turn, each as long again.
        if not self._lock.acquire(timeout=_LOCKED_SECONDS):
            raise sa.exc.TimeoutError(f"other writers have had the SQLite database for {_LOCKED_SECONDS:g} s")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Connection(sqlite3.Connection):
    """Waits up to ``timeout`` seconds for other processes' locks: see :func:`_patiently`."""

    def __init__(self, database: str, timeout: float, **more: Any) -> None:
        super().__init__(database, 0, **more)
        self.patience = timeout

    def cursor(self, _: object = None) -> sqlite3.Cursor:  # type: ignore[override]
        return super().cursor(_Cursor)

    def commit(self) -> None:
        _patiently(self.patience, super().commit)


class _Cursor(sqlite3.Cursor):
    def execute(self, *statement: Any) -> sqlite3.Cursor:  # type: ignore[override]
        return _patiently(cast(_Connection, self.connection).patience, super().execute, *statement)


def _patiently(seconds: float, call: Callable[..., T], *arguments: Any) -> T:
    """Give what ``call`` gives, as soon as no other process has the file locked. After so many seconds it raises as
    SQLite does.

    SQLite's own busy timeout sleeps inside C, where under gevent all event streams and answers of the worker stand
    still with it. A statement that finds the file locked has done nothing, and a transaction whose commit does is still
    open, so both can be tried again; what writes has the lock from its BEGIN on, and never asks for it with a snapshot
    that is old.
    """
    end, pause = 0.0, 0.001
    while True:
        try:
            return call(*arguments)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            now = time.monotonic()
            end = end or now + seconds
            if now >= end:
                raise
        # gevent's, where it has patched this process.
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _sqlite_connect(connection: Any, _: object) -> None:
    # The driver begins transactions by itself otherwise, and late: see SQLAlchemy's notes on pysqlite.
    connection.isolation_level = None
    # The connection's own execute() waits for nobody.
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    # A transaction that writes takes the write lock first: a later upgrade could fail at once.
    write = connection.get_execution_options().get(WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
