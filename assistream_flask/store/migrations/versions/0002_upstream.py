"""Runs keep the state of a background response. Workers of the first release go on without it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("assistream_runs", sa.Column("upstream", sa.JSON))
