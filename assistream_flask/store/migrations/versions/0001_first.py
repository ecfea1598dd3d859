"""The schema of the first release."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _id(name: str, *args: Any, **kwargs: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(64), *args, **kwargs)


def upgrade() -> None:
    """Create all tables."""
    serial = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table("assistream_schema", sa.Column("version", sa.Integer, primary_key=True))
    op.create_table(
        "assistream_threads",
        sa.Column("number", serial, primary_key=True),
        _id("id", unique=True, nullable=False),
        sa.Column("scope", sa.String(255), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("assistream_threads_owner", "assistream_threads", ["scope", "owner", "number"])
    op.create_table(
        "assistream_messages",
        _id("id", primary_key=True),
        _id("thread_id", sa.ForeignKey("assistream_threads.id", ondelete="CASCADE"), nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
        _id("assistant_id"),
        _id("run_id"),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("incomplete_at", sa.BigInteger),
        sa.Column("incomplete_details", sa.JSON),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.UniqueConstraint("thread_id", "position"),
    )
    op.create_table(
        "assistream_runs",
        _id("id", primary_key=True),
        _id("thread_id", sa.ForeignKey("assistream_threads.id", ondelete="CASCADE"), nullable=False),
        _id("assistant_id", nullable=False),
        _id("message_id", nullable=False, unique=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("last_error", sa.JSON),
        sa.Column("incomplete_details", sa.JSON),
        sa.Column("usage", sa.JSON),
        sa.Column("model", sa.String(255)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("failed_at", sa.BigInteger),
        sa.Column("cancelled_at", sa.BigInteger),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("steps", sa.JSON, nullable=False),
        _id("group_id", nullable=False),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("place", sa.String(64)),
        _id("worker", nullable=False),
        sa.Column("lease", sa.Float, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
    )
    op.create_index("ix_assistream_runs_thread_id", "assistream_runs", ["thread_id"])
    op.create_index("ix_assistream_runs_status", "assistream_runs", ["status"])
    op.create_table(
        "assistream_answers",
        sa.Column("scope", sa.String(255), primary_key=True),
        sa.Column("owner", sa.String(255), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("place", sa.String(64)),
        _id("thread_id"),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_assistream_answers_thread_id", "assistream_answers", ["thread_id"])
    op.create_index("ix_assistream_answers_created_at", "assistream_answers", ["created_at"])
