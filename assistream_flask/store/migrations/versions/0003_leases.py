"""Runs count their claims, and workers say that they live. Workers of older releases go on without either."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column, an index and the table."""
    op.add_column("assistream_runs", sa.Column("claim", sa.Integer, nullable=False, server_default="0"))
    op.create_index("ix_assistream_runs_worker", "assistream_runs", ["worker"])
    op.create_table(
        "assistream_workers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("is_shared", sa.Boolean, nullable=False),
        sa.Column("seen", sa.Float, nullable=False),
    )
