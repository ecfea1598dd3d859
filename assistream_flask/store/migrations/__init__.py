"""Brings a database that an older release made up to date. ``env.py`` and ``versions/`` are Alembic's to run."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

# The app may use Alembic too, in the same database.
_revision: Final = sa.Table(
    "assistream_alembic", sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True)
)


def stamp(connection: sa.Connection, version: int) -> None:
    """Record that the schema is of ``version``, for a later :func:`upgrade` to start from."""
    _revision.create(connection)
    connection.execute(_revision.insert().values(version_num=f"{version:04}"))


def upgrade(connection: sa.Connection, found: int, to: str = "head") -> None:
    """Upgrade the schema from version ``found`` to the revision ``to``, in the transaction that ``connection`` is in.

    No two threads of a process may be in here at once: Alembic's ``op`` and ``context`` are global.
    """
    # Only here: it takes longer to import than the rest of a store's opening, and is seldom needed.
    from alembic import command
    from alembic.config import Config

    # The first release kept no record for Alembic, and an empty database has none.
    if found and not sa.inspect(connection).has_table(_revision.name):
        stamp(connection, found)
    config = Config(attributes={"connection": connection, "version_table": _revision.name})
    config.set_main_option("script_location", f"{__name__.rpartition('.')[0]}:migrations")
    command.upgrade(config, to)
