"""A database that is read and not written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

CUT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
"""Ends all other connections to a PostgreSQL database."""


@contextmanager
def locked_out(url: str, how: str) -> Iterator[None]:
    """Have nobody write meanwhile, while all can read: the runs are ``locked``, or the database is ``read-only``."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as admin:
        if how == "locked" and engine.dialect.name == "sqlite":
            admin.exec_driver_sql("BEGIN IMMEDIATE")
        elif how == "locked":
            admin.exec_driver_sql("BEGIN")
            admin.exec_driver_sql("LOCK TABLE assistream_runs IN SHARE MODE")
        else:
            admin.exec_driver_sql(f'ALTER DATABASE "{engine.url.database}" SET default_transaction_read_only = on')
            admin.exec_driver_sql(CUT)
        yield
        if how == "locked":
            admin.exec_driver_sql("ROLLBACK")
        else:
            admin.exec_driver_sql("SET default_transaction_read_only = off")
            admin.exec_driver_sql(f'ALTER DATABASE "{engine.url.database}" RESET default_transaction_read_only')
            admin.exec_driver_sql(CUT)
