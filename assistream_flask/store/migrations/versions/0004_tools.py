"""Runs call tools, and what they are resent as is kept. Workers of older releases go on without either."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns and the tables."""
    json = sa.JSON(none_as_null=True)
    op.add_column("assistream_runs", sa.Column("required_action", json))
    op.add_column("assistream_runs", sa.Column("expires_at", sa.BigInteger))
    op.add_column("assistream_runs", sa.Column("loop", json))
    op.create_table(
        "assistream_tool_calls",
        _run_id(),
        sa.Column("call_id", sa.String(64), primary_key=True),
        sa.Column("thread_id", sa.String(64), nullable=False, index=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("step_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("arguments", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("needs", sa.String(16)),
        sa.Column("decision", json),
        sa.Column("remember", sa.Boolean, nullable=False),
        sa.Column("output", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("holder", sa.String(255)),
        sa.Column("until", sa.Float),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),
    )
    op.create_table(
        "assistream_items",
        _run_id(),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("thread_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("item", json, nullable=False),
        sa.Index("assistream_items_thread", "thread_id", "run_id"),
    )


def _run_id() -> sa.Column[str]:
    return sa.Column("run_id", sa.String(64), sa.ForeignKey("assistream_runs.id", ondelete="CASCADE"), primary_key=True)
