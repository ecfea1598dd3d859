"""The tables of the store, as the newest release has them.

``VERSION`` is recorded in the database; a change here comes with a revision in ``migrations/``.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

VERSION: Final = 4

metadata: Final = sa.MetaData()

# Object keys are column names: a row and the Assistants v2 object are the same mapping.
_JSON: Final = sa.JSON(none_as_null=True)
# SQLite counts up only in a column of exactly INTEGER PRIMARY KEY.
_SERIAL: Final = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _id(name: str, *args: Any, **kwargs: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(64), *args, **kwargs)


schema: Final = sa.Table("assistream_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))

threads: Final = sa.Table(
    "assistream_threads",
    metadata,
    sa.Column("number", _SERIAL, primary_key=True),
    _id("id", unique=True, nullable=False),
    sa.Column("scope", sa.String(255), nullable=False),
    sa.Column("owner", sa.String(255), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("metadata", _JSON, nullable=False),
    sa.Index("assistream_threads_owner", "scope", "owner", "number"),
    sqlite_autoincrement=True,
)

messages: Final = sa.Table(
    "assistream_messages",
    metadata,
    _id("id", primary_key=True),
    _id("thread_id", sa.ForeignKey(threads.c.id, ondelete="CASCADE"), nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("content", _JSON, nullable=False),
    _id("assistant_id"),
    _id("run_id"),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("completed_at", sa.BigInteger),
    sa.Column("incomplete_at", sa.BigInteger),
    sa.Column("incomplete_details", _JSON),
    sa.Column("metadata", _JSON, nullable=False),
    sa.UniqueConstraint("thread_id", "position"),
)

runs: Final = sa.Table(
    "assistream_runs",
    metadata,
    _id("id", primary_key=True),
    _id("thread_id", sa.ForeignKey(threads.c.id, ondelete="CASCADE"), nullable=False, index=True),
    _id("assistant_id", nullable=False),
    _id("message_id", nullable=False, unique=True),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("required_action", _JSON),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("last_error", _JSON),
    sa.Column("incomplete_details", _JSON),
    sa.Column("usage", _JSON),
    sa.Column("model", sa.String(255)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger),
    sa.Column("completed_at", sa.BigInteger),
    sa.Column("failed_at", sa.BigInteger),
    sa.Column("cancelled_at", sa.BigInteger),
    sa.Column("metadata", _JSON, nullable=False),
    # Ours, not the object's: the steps, the group of runs of one POST, the state of a background response,
    # who works on it till when (seconds of the database's clock), and how often it went from one worker to another.
    sa.Column("steps", _JSON, nullable=False),
    _id("group_id", nullable=False),
    sa.Column("mode", sa.String(16), nullable=False),
    # The event id as of which the text is exact, under the name that workers of older releases read.
    sa.Column("place", sa.String(64)),
    sa.Column("upstream", _JSON),
    _id("worker", nullable=False, index=True),
    sa.Column("lease", sa.Float, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    # Workers of an older release know nothing of it.
    sa.Column("claim", sa.Integer, nullable=False, server_default="0"),
    # How far its tool loop came: see ..runs.tool_loop. None where it has called nothing, and has no items.
    sa.Column("loop", _JSON),
)

tool_calls: Final = sa.Table(
    "assistream_tool_calls",
    metadata,
    _id("run_id", sa.ForeignKey(runs.c.id, ondelete="CASCADE"), primary_key=True),
    _id("call_id", primary_key=True),
    # Its run's: a thread of thousands of runs is not looked through for the few that called something.
    _id("thread_id", nullable=False, index=True),
    # Which answer of the model made it, and its place among all calls of the run.
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    _id("step_id", nullable=False),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("arguments", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    # What it waits for, or waited for: a page's output, or a person's approval; and how that was answered.
    sa.Column("needs", sa.String(16)),
    sa.Column("decision", _JSON),
    # Whether its tool is approved for the rest of the thread.
    sa.Column("remember", sa.Boolean, nullable=False),
    sa.Column("output", sa.Text),
    sa.Column("error", sa.Text),
    # The page that executes it, and till when, by the database's clock.
    sa.Column("holder", sa.String(255)),
    sa.Column("until", sa.Float),
    sa.Column("started_at", sa.BigInteger),
    sa.Column("completed_at", sa.BigInteger),
)

items: Final = sa.Table(
    "assistream_items",
    metadata,
    _id("run_id", sa.ForeignKey(runs.c.id, ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    _id("thread_id", nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    # What the model said, as it is resent: in the words of the Responses API.
    sa.Column("item", _JSON, nullable=False),
    sa.Index("assistream_items_thread", "thread_id", "run_id"),
)

workers: Final = sa.Table(
    "assistream_workers",
    metadata,
    _id("id", primary_key=True),
    # Host and process, for people; whether others read its event log; and when it was last heard of, by the database's
    # clock.
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("is_shared", sa.Boolean, nullable=False),
    sa.Column("seen", sa.Float, nullable=False),
)

answers: Final = sa.Table(
    "assistream_answers",
    metadata,
    sa.Column("scope", sa.String(255), primary_key=True),
    sa.Column("owner", sa.String(255), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("body", _JSON, nullable=False),
    # The event id before all that the request did, under the name that workers of older releases read.
    sa.Column("place", sa.String(64)),
    # What an answer repeats of a thread goes with the thread.
    _id("thread_id", index=True),
    sa.Column("created_at", sa.BigInteger, nullable=False, index=True),
)
