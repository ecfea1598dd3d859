"""Alembic runs this file for each command that :mod:`assistream_flask.store.migrations` gives it."""

from __future__ import annotations

from alembic import context

# No logging is set up here, as Alembic's template does: that is the app's.
context.configure(**context.config.attributes)
with context.begin_transaction():
    context.run_migrations()
