"""The database behind an SQLAlchemy URL: SQLite or PostgreSQL, as the thread store needs it."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
import time
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from .errors import ConfigurationError

WRITE: Final = "assistream_write"
"""The execution option of a transaction that writes."""

_PSYCOPG: Final = "postgresql+psycopg"
# What nothing may wait for longer than: a host that is gone must not hold a greenlet, and its thread, for ever.
_POSTGRES_ARGUMENTS: Final = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "client_encoding": "utf8",
}
# The operator's own limits stay. Not as connection options: PgBouncer refuses those.
_POSTGRES_LIMITS: Final = """
SELECT set_config(name, value, false)
FROM (VALUES
    ('statement_timeout', '15s'), ('lock_timeout', '5s'), ('idle_in_transaction_session_timeout', '30s')
) AS ours (name, value)
WHERE current_setting(name) = '0'
"""


def open_engine(url: str, pool: int) -> Engine:
    """Gives an engine of at most ``pool`` connections; SQLite, which has one writer, takes no ``pool``.

    Raises :class:`ConfigurationError` for a URL that cannot work.
    """
    engine = _engine(_parsed(url), pool)
    _check_psycopg()
    return engine


def check(url: str) -> None:
    """Raises :class:`ConfigurationError` for a URL that cannot work. Connects to nothing, and does not import
    psycopg: see :func:`_check_psycopg`."""
    parsed = _parsed(url)
    if parsed.drivername != _PSYCOPG:
        _engine(parsed, 1).dispose()


def _parsed(url: str) -> URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise _unusable(error) from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername=_PSYCOPG)
    if parsed.drivername == _PSYCOPG and importlib.util.find_spec("psycopg") is None:
        raise _no_psycopg()
    return parsed


def _engine(url: URL, pool: int) -> Engine:
    options: dict[str, Any] = {"pool_pre_ping": True, "pool_size": pool, "max_overflow": 0, "pool_timeout": 5}
    if url.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": 10}}
        if url.database in (None, "", ":memory:"):
            options = {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False}}
    elif url.drivername == _PSYCOPG:
        options["connect_args"] = {key: _POSTGRES_ARGUMENTS[key] for key in _POSTGRES_ARGUMENTS.keys() - url.query}
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
        sa.event.listen(engine, "connect", _postgres_connect)
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
    """Raises :class:`ConfigurationError` where one query would stop all greenlets: psycopg chooses how it waits
    when it is imported, and a process that gevent patches later keeps the choice."""
    patched, waiting = sys.modules.get("gevent.monkey"), sys.modules.get("psycopg.waiting")
    if patched and waiting and patched.is_module_patched("select") and waiting.wait is vars(waiting).get("wait_c"):
        raise ConfigurationError(
            "psycopg was imported before gevent patched this process, so that every query would stop all event "
            "streams: run gunicorn without --preload, or import psycopg only in the workers"
        )


def _postgres_connect(connection: Any, _: object) -> None:
    connection.execute(_POSTGRES_LIMITS)
    connection.commit()


def _sqlite_connect(connection: Any, _: object) -> None:
    # The driver begins transactions by itself otherwise, and late: see SQLAlchemy's notes on pysqlite.
    connection.isolation_level = None
    end = time.monotonic() + 10
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            # Two that change a new file's mode at once: SQLite does not wait here, whatever its timeout says.
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _sqlite_begin(connection: Connection) -> None:
    # A transaction that writes takes the write lock first: a later upgrade could fail at once.
    write = connection.get_execution_options().get(WRITE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
